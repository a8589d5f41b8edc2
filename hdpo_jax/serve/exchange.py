"""One request under way: followers in the engine's thread tell what was sampled, and whoever asked hears of it."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hdpo_jax.rollout.prompts import Question
from hdpo_jax.rollout.sampling import OwnSampling
from hdpo_jax.rollout.scheduler import Sampled
from hdpo_jax.rollout.sources import Member
from hdpo_jax.serve.service import Closed, Service
from hdpo_jax.serve.text_stream import TextStream
from hdpo_jax.types import StopReason, Trajectory, Turn

LARGEST_SEED = 2**31
LARGEST_TOP_K = 2**20
"""More than any vocabulary has."""
SMALLEST_TOP_P = 1e-6
"""Less is nothing in fp32; the likeliest token is all that is left before that."""
COLDEST = 1e-3
"""Of temperatures; below it the likeliest token is taken."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What there is to say of one choice since the last time."""

    choice: int
    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    rewound: str = ""
    """What the turn under way goes on from: a call was held back, and what was told of it is void."""
    turn: Turn | None = None
    """A turn that has ended."""
    stop: StopReason | None = None
    """Nothing follows; None: something does."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a request wants to be answered."""

    choices: int = 1
    most_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """The same one gives the same answers; None: another one each time."""
    stops: Sequence[str] = ()

    @property
    def drawn_seed(self) -> int:
        return secrets.randbelow(LARGEST_SEED) if self.seed is None else self.seed % LARGEST_SEED

    @property
    def own(self) -> OwnSampling:
        # Logits over a number that small are no numbers any more, and the likeliest token is all that can be drawn.
        temperature = self.temperature if self.temperature >= COLDEST else 0.0
        numbers: Any = temperature, min(self.top_k, LARGEST_TOP_K), max(self.top_p, SMALLEST_TOP_P), self.min_p
        return OwnSampling(*numbers)


class Follower:
    """A trajectory's listener that tells `send` of it, from the engine's thread."""

    def __init__(self, choice: int, stream: Callable[[], TextStream], send: Callable[[Told], None]):
        self.gone = False
        self._choice = choice
        self._stream = stream
        self._text = stream()
        self._said = ""
        """Of the turn under way."""
        self._send = send

    def sampled(self, new: Sampled) -> bool:
        text = self._text.add(new.tokens)
        self._said += text
        self._send(Told(choice=self._choice, text=text, tokens=new.tokens, logprobs=new.logprobs))
        return self._text.stopped

    def rewound(self, text: str) -> None:
        self._text, self._said = self._stream(), text
        self._send(Told(choice=self._choice, rewound=text))

    def turned(self, turn: Turn) -> None:
        if turn.role == "assistant":
            rest = self._text.end()
            turn = replace(turn, text=self._said) if self._text.stopped else turn
        else:
            rest = ""
        self._text, self._said = self._stream(), ""
        self._send(Told(choice=self._choice, text=rest, turn=turn))

    def finished(self, trajectory: Trajectory) -> None:
        self._send(Told(choice=self._choice, stop=trajectory.stop))


@dataclass
class Exchange:
    """A question that was put to a service, and what comes of it."""

    service: Service
    question: Question
    wish: Wish
    _told: asyncio.Queue[Told | BaseException] = field(default_factory=asyncio.Queue)
    _followers: list[Follower] = field(default_factory=list)
    _ended: Callable[[], None] = print

    def begin(self) -> None:
        """Raises Busy or Closed."""
        loop, wish, processor = asyncio.get_running_loop(), self.wish, self.service.policy.processor
        send = partial(_from_thread, loop, self._told)
        stream = partial(TextStream, processor.decode, wish.stops)
        self._followers = [Follower(choice, stream, send) for choice in range(wish.choices)]
        seed = wish.drawn_seed
        members = [
            Member((seed, 0, choice), wish.most_tokens, wish.own, follower)
            for choice, follower in enumerate(self._followers)
        ]
        self._ended = partial(send, Closed("the engine has ended"))
        self.service.watch(self._ended)
        try:
            self.service.ask(self.question, members)
        except BaseException:
            self.service.unwatch(self._ended)
            raise

    async def __aiter__(self) -> AsyncIterator[Told]:
        """What is told, until every choice has ended. Raises Closed where the engine ends before."""
        left = self.wish.choices
        while left:
            told = await self._told.get()
            if isinstance(told, BaseException):
                raise told
            left -= told.stop is not None
            yield told

    def leave(self) -> None:
        """Nobody listens any more: what is still sampled is given up."""
        self.service.unwatch(self._ended)
        for follower in self._followers:
            follower.gone = True


def _from_thread(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, told: Told | BaseException) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever asked with it
        loop.call_soon_threadsafe(queue.put_nowait, told)
