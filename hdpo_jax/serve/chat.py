"""`hdpo chat`: a conversation in the terminal, with images and tools; every call and its result is shown."""

import contextlib
import io
import queue
import shlex
import signal
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax

from hdpo_jax.config import AgentConfig, Dtype, ModelConfig, RolloutConfig, ToolsConfig
from hdpo_jax.rollout.sources import Member
from hdpo_jax.serve.exchange import Follower, Told, Wish
from hdpo_jax.serve.service import Closed, Service
from hdpo_jax.serve.text_stream import TextStream
from hdpo_jax.tools.protocol import parse_tool_call
from hdpo_jax.tools.system_prompt import system_prompt
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt, StopReason, Turn
from models.qwen3_vl.pixels import load_image
from models.qwen3_vl.sources import read_file
from sharding.mesh import MeshAxes

HELP = """\
/image FILE   show an image with what you say next
/new          forget the conversation
/quit         leave (as Ctrl-D does); Ctrl-C stops an answer"""


def run_chat(
    model: Path,
    *,
    temperature: float,
    seed: int | None,
    dtype: Dtype,
    mesh: MeshAxes,
    agent: AgentConfig,
    tools: ToolsConfig,
    rollout: RolloutConfig,
) -> None:
    """Talks until the input ends, or /quit."""
    # Also where a shell has what it starts ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console(highlight=False)
    with open_toolbox(tools) as toolbox, tempfile.TemporaryDirectory(prefix="hdpo-chat-") as folder:
        with Console(stderr=True).status(f"loading {model}, compiling"):
            policy = load_policy(ModelConfig(path=str(model), dtype=dtype, param_dtype=dtype), mesh)
            service = Service(policy, toolbox, agent=agent, rollout=rollout)
            service.start()
        try:
            words = system_prompt(toolbox.schemas)
            wish = Wish(most_tokens=agent.max_response_tokens, temperature=temperature, seed=seed)
            Chat(service, console, wish, Path(folder), words).run()
        finally:
            service.stop(seconds=0)


@dataclass
class Conversation:
    """What was said, as the chat template takes it."""

    system: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    def __post_init__(self):
        self.messages.append({"role": "system", "content": self.system})

    def say(self, role: str, text: str, images: list[bytes]) -> None:
        parts = [{"type": "image"} for _ in images]
        self.images += images
        self.messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}] if parts else text})

    def add(self, turns: list[Turn]) -> None:
        """The policy's turns and what tools showed it, which it saw as the user's."""
        for turn in turns:
            self.say("assistant" if turn.role == "assistant" else "user", turn.text, [_png(one) for one in turn.images])

    def prompt(self) -> Prompt:
        return Prompt(id="", messages=self.messages, images=self.images, ground_truth="", data_source="")


class Chat:
    def __init__(self, service: Service, console: Console, wish: Wish, folder: Path, system: str):
        self._service = service
        self._console = console
        self._wish = wish
        self._folder = folder
        self._system = system
        self._conversation = Conversation(system)
        self._attached: list[bytes] = []
        self._pictures = 0

    def run(self) -> None:
        self._console.print(HELP, style="dim")
        for line in self._lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/new":
                self._conversation, self._attached = Conversation(self._system), []
            elif command == "/image":
                self._attach(rest)
            elif command.startswith("/"):
                self._console.print(HELP, style="dim")
            else:
                self._answer(line)

    def _lines(self) -> Iterator[str]:
        """What the user writes; Ctrl-C forgets a line."""
        while True:
            try:
                line = self._console.input("[bold cyan]you[/] ").strip()
            except KeyboardInterrupt:
                self._console.print("\n(/quit or Ctrl-D to leave)", style="dim")
                continue
            except EOFError:
                return
            if line:
                yield line

    def _attach(self, name: str) -> None:
        try:
            names = shlex.split(name) or [""]
            file = read_file(str(Path(names[0]).expanduser()), "image")
            image = load_image(file)
        except ValueError as error:
            self._console.print(escape(str(error)), style="red", soft_wrap=True)
            return
        self._attached.append(file)
        self._console.print(f"image {len(self._attached)}: {image.width} x {image.height}", style="dim")

    def _answer(self, line: str) -> None:
        """Asks, and shows what comes; what was said stays, also of an answer that was stopped."""
        before = len(self._conversation.messages), len(self._conversation.images)
        self._conversation.say("user", line, self._attached)
        try:
            question = self._service.question(self._conversation.prompt())
        except ValueError as error:
            del self._conversation.messages[before[0] :], self._conversation.images[before[1] :]
            self._console.print(f"{escape(str(error))}; /new begins again", style="red", soft_wrap=True)
            return
        self._attached = []
        told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        stream = partial(TextStream, self._service.policy.processor.decode)
        follower = Follower(0, stream, told.put)
        ended = partial(told.put, None)
        self._service.watch(ended)
        self._service.ask(
            question, [Member((self._wish.drawn_seed, 0, 0), self._wish.most_tokens, self._wish.own, follower)]
        )
        try:
            with _on_interrupt(lambda: setattr(follower, "gone", True)):
                self._conversation.add(self._shown(told))
        finally:
            self._service.unwatch(ended)

    def _shown(self, told: "queue.SimpleQueue[Told | None]") -> list[Turn]:
        """Prints what is told as it comes; the turns, the one that was stopped included."""
        turns: list[Turn] = []
        said = ""
        self._console.print("[bold magenta]model[/] ", end="")
        while True:
            one = told.get()
            if one is None:
                raise Closed("the engine has ended; the lines above say why")
            if one.rewound:
                said = one.rewound
                self._console.print("\n(that call is not sent)", style="dim")
                self._console.print(_plain(said), end="", soft_wrap=True)
            said += one.text
            if one.text:
                self._console.print(_plain(one.text), end="", soft_wrap=True)
            if one.turn:
                turns.append(one.turn)
                said = ""
                self._show(one.turn)
            if one.stop is not None:
                self._end(one.stop)
                return [*turns, Turn(role="assistant", text=said)] if said else turns

    def _show(self, turn: Turn) -> None:
        self._console.print()
        if turn.role == "assistant":
            call = parse_tool_call(turn.text)
            code = call.arguments.get("code") if call and not call.error else None
            if call and isinstance(code, str):
                self._console.print(Panel(Syntax(_printable(code), "python", word_wrap=True), title=_plain(call.name)))
            return
        pictures = [f"\\[{image.width} x {image.height}: {self._saved(image)}]" for image in turn.images]
        self._console.print(Panel("\n".join([_plain(turn.text), *pictures]).strip(), title="result", style="green"))
        self._console.print("[bold magenta]model[/] ", end="")

    def _saved(self, image: Any) -> Path:
        self._pictures += 1
        path = self._folder / f"{self._pictures}.png"
        image.save(path)
        return path

    def _end(self, stop: StopReason) -> None:
        said = {
            StopReason.CUT: "stopped",
            StopReason.TOKEN_BUDGET: "cut: no room for more (/new begins again)",
            StopReason.CALL_LIMIT: "ended: it asked for one call more than it may send",
            StopReason.DROPPED: "ended: its tools are gone",
        }
        if stop in said:
            self._console.print(f"({said[stop]})", style="dim")


@contextlib.contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` meanwhile, and raises nothing wherever it may come."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _printable(text: str) -> str:
    """Without what would speak to the terminal: what a model writes or a web page says is not trusted."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs"))


def _plain(text: str) -> str:
    """Printable, and no markup."""
    return escape(_printable(text))


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()
