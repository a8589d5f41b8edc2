"""The `python` tool: model-written code in a sandboxed interpreter of its own, which keeps its state over the calls.

A session is forked from a prepared process at its first call (most trajectories make none). Whatever the code does, a
call comes back within its timeout and a short grace, with text that says what happened.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.bubblewrap import with_a_way_out
from hdpo_jax.tools.fork_server import CPU_FACTOR, End, ForkServer, Kernel, ServerLost
from hdpo_jax.tools.kernel import frames
from hdpo_jax.tools.kernel.pictures import CALL_PIXELS, MAX_PIXELS
from hdpo_jax.tools.protocol import PYTHON_SCHEMA, Subject
from hdpo_jax.tools.results import NO_OUTPUT, encodable
from hdpo_jax.types import Observation

INTERRUPT_SECONDS = 2.0
"""How long interrupted code may take to give up before its session is killed."""
TRANSFER_SECONDS = 10.0
"""How long an answer may take from its first byte to its last."""
MOST = 10**6
"""Numbers that are told, from a session that may say any."""

logger = logging.getLogger(__name__)


class PythonTool:
    """Opens sessions; all are forks of one server, which ends with this object."""

    name = "python"
    schema = PYTHON_SCHEMA

    def __init__(self, config: ToolsConfig):
        if config.sandbox == "none":
            warning = "Model-written code runs WITHOUT a sandbox, with all your rights (--tools.sandbox none)."
            Console(stderr=True).print(warning, style="bold red")
        self._config = config
        self._running = threading.BoundedSemaphore(config.workers)
        self._server = ForkServer(config)
        self._refuse_unless_it_works()

    @property
    def server(self) -> ForkServer:
        return self._server

    def open(self, subject: Subject) -> "PythonSession":
        """Its images become `image_1`…; nothing is started before the first call."""
        return PythonSession(self._config, self._server, self._running, subject.images)

    def close(self) -> None:
        self._server.stop()

    def _refuse_unless_it_works(self) -> None:
        session = self.open(Subject())
        try:
            session.check()
        except Exception:
            self.close()
            raise
        finally:
            session.close()


class PythonSession:
    """One trajectory's interpreter. Calls come one at a time."""

    def __init__(
        self, config: ToolsConfig, server: ForkServer, running: threading.BoundedSemaphore, images: Sequence[bytes]
    ):
        self._config = config
        self._server = server
        self._running = running
        self._images = images
        self._lock = threading.Lock()
        self._kernel: Kernel | None = None
        self._closed = False

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        """Runs `arguments["code"]`. Never raises for what the policy wrote, never waits past the timeout and grace."""
        code = arguments.get("code")
        if not isinstance(code, str):
            found = "nothing" if code is None else type(code).__name__
            return Observation(text=f"The python tool needs a string `code`; found {found}.", ok=False)
        with self._lock, self._running:
            if self._closed:
                return Observation(text="The session is closed.", ok=False, lost=True)
            try:
                return self._run(code)
            except ServerLost as error:
                logger.error("the python tool is lost: %s", error)
                return Observation(text=f"The python tool is not available: {error}", ok=False, lost=True)

    def close(self) -> None:
        """Kills the interpreter and every process that it started."""
        with self._lock:
            self._closed = True
            if self._kernel is not None:
                self._server.close(self._kernel)
                self._kernel = None

    def check(self) -> None:
        """Runs a line of code in a session of its own. Raises ConfigError when sessions do not work here."""
        observation = self.call({"code": "print(6 * 7)"})
        if observation.text.strip() != "42":
            problem = observation.text.strip("[]\n").removesuffix(f". {self._state_lost()}")
            raise ConfigError(f"the python tool's sessions do not start here: {with_a_way_out(problem)}")

    def _run(self, code: str) -> Observation:
        token = os.urandom(frames.TOKEN_BYTES)
        fresh = self._kernel is None
        kernel = self._kernel = self._kernel or self._server.open()
        if not fresh:
            self._server.begin(kernel)
        deadline = time.monotonic() + self._config.timeout_seconds
        late = False
        try:
            frames.send(kernel.connection, token, {"code": code}, self._images if fresh else (), deadline)
            if not frames.arrives(kernel.connection, deadline):
                late = True
                self._server.interrupt(kernel)
                if not frames.arrives(kernel.connection, time.monotonic() + INTERRUPT_SECONDS):
                    return self._restarted(f"{self._timed_out()} and did not react to an interrupt", timed_out=True)
            answer = self._answer(kernel, token)
        except frames.DeadlineError:
            return self._restarted("The Python process did not take its code, or began an answer and did not end it")
        except frames.FrameError as error:
            return self._restarted(f"The Python process had to be ended: {encodable(' '.join(str(error).split()))}")
        except frames.Closed:
            return self._ended()
        # Code that was done when the interrupt came is done.
        if not late or answer.ok:
            return answer
        note = f"[{self._timed_out()} and was interrupted. Variables are kept.]"
        return Observation(text=_lines(answer.text, note), images=answer.images, ok=False, timed_out=True)

    def _answer(self, kernel: Kernel, token: bytes) -> Observation:
        """Reads one answer: bytes that model-written code may have forged, so every number is checked."""
        config = self._config
        frame = frames.receive(
            kernel.connection,
            max_header=12 * config.output_chars + 65_536,
            max_bytes=3 * CALL_PIXELS,
            expected=token,
            deadline=time.monotonic() + TRANSFER_SECONDS,
        )
        header = frame.header
        if frame.token != token:
            raise frames.FrameError(str(header.get("failure", "an answer that was not asked for"))[:200])
        text, ok, sizes, dropped = (header.get(key) for key in ("text", "ok", "sizes", "dropped"))
        if not isinstance(text, str) or not isinstance(ok, bool) or type(dropped) is not int or dropped < 0:
            raise frames.FrameError("an answer without text")
        if not isinstance(sizes, list) or len(sizes) != len(frame.blobs) or len(sizes) > config.max_images:
            raise frames.FrameError("an answer with images that do not add up")
        images = [_image(size, pixels) for size, pixels in zip(sizes, frame.blobs, strict=True)]
        most = f"{config.max_images}, and {CALL_PIXELS // 10**6} million pixels,"
        note = f"[{min(dropped, MOST)} more images are left out: one call returns {most} at most.]" if dropped else ""
        text = _lines(encodable(text[: config.output_chars + 200]), note)
        return Observation(text=text if text or images else NO_OUTPUT, images=images, ok=ok)

    def _timed_out(self) -> str:
        return f"The code ran longer than {self._config.timeout_seconds:g} s"

    def _restarted(self, reason: str, *, timed_out: bool = False) -> Observation:
        """Kills the session; the next call opens another."""
        if self._end() is None:
            return self._server_lost()
        return Observation(text=f"[{reason}. {self._state_lost()}]", ok=False, timed_out=timed_out)

    def _ended(self) -> Observation:
        """The process is gone: says why, and whose fault it is."""
        end = self._end()
        if end is None:
            return self._server_lost()
        return Observation(text=f"[The Python process ended: {self._cause(end)}. {self._state_lost()}]", ok=False)

    def _cause(self, end: End) -> str:
        """Why a process is gone, in words."""
        config = self._config
        number = os.WTERMSIG(end.status) if os.WIFSIGNALED(end.status) else 0
        match end.reason:
            case "memory":
                return f"out of memory; it and what it started may use {config.memory_mb} MiB together"
            case "CPU time":
                most = f"{config.timeout_seconds * CPU_FACTOR:g} s"
                return f"too much CPU time; it and what it started may use {most} together until the next call"
            case "closed":
                return "it closed the connection on which it is asked"
            case "" if number:
                hint = ", perhaps because the machine is out of memory" if number == signal.SIGKILL else ""
                return f"signal {number} ({signal.strsignal(number)}{hint})"
            case "":
                return f"exit code {os.waitstatus_to_exitcode(end.status)}"
        return f"it could not be started: {end.reason}"

    def _end(self) -> End | None:
        kernel, self._kernel = self._kernel, None
        return None if kernel is None else self._server.end(kernel)

    def _server_lost(self) -> Observation:
        logger.error("the python tool's fork server is gone, and with it a session")
        return Observation(text=f"[The Python tool was lost. {self._state_lost()}]", ok=False, lost=True)

    def _state_lost(self) -> str:
        images = len(self._images)
        names = {0: "", 1: " with image_1"}.get(images, f" with image_1 to image_{images}")
        return f"All variables are lost; the next call starts afresh{names}."


def _image(size: Any, pixels: bytearray) -> Image.Image:
    match size:
        case [int(width), int(height)] if width > 0 and height > 0 and width * height <= MAX_PIXELS:
            if 3 * width * height == len(pixels):
                return Image.frombytes("RGB", (width, height), pixels)
    raise frames.FrameError("an answer with an image that does not add up")


def _lines(*parts: str) -> str:
    return "\n".join(part.rstrip("\n") for part in parts if part.strip())
