"""The sessions that a tool server keeps for trajectories: opened, called in order, freed. Knows nothing of HTTP.

All of it runs in one event loop, and tools in threads. A trajectory's calls run one after another, in the order in
which they came; those of different trajectories run side by side, as many as there are workers.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hdpo_jax.config import ToolServerConfig
from hdpo_jax.tools.calls import CallPool, GivenUp
from hdpo_jax.tools.protocol import Tools, TrajectoryTools
from hdpo_jax.tools.results import encodable
from hdpo_jax.tools.wire import image_uri
from hdpo_jax.types import Observation, ToolCall

CLOSERS = 8
"""Sessions that are closed at a time."""
CLOSE_SECONDS = 30.0
"""How long one may take to close: a call that is given up may hold it."""
PATIENCE = 5.0
"""How long all of them may take when the server ends; what is left of them ends with the tools."""
LOST = "[The tool server does not know this trajectory any more: all variables are lost, and the call was not run.]"
FORGOTTEN = "[The call ran, but its answer is not kept any more; it was not run again.]"

logger = logging.getLogger(__name__)


class Busy(Exception):
    """There is no room for what was asked; the message says of what there is too much."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One call of a trajectory, as it was asked for."""

    trajectory: str
    call: ToolCall
    images: Sequence[bytes] = ()
    keys: Sequence[str] = ()
    opened: bool = False
    """The trajectory has called before: if it is not known, its state is lost, and nothing is run."""
    name: str | None = None
    """What a repetition is known by."""
    valid: bool = True
    """There is something to run."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call gave, ready to be sent."""

    text: str
    images: Sequence[str] = ()
    """Data URIs."""
    ok: bool
    lost: bool = False
    timed_out: bool = False
    seconds: float = 0.0
    """From the call's turn to its answer."""

    @property
    def size(self) -> int:
        return len(self.text) + sum(map(len, self.images))


@dataclass(eq=False, kw_only=True)
class _Trajectory:
    key: str
    tools: TrajectoryTools
    order: Order
    """The first, which says what the session is about."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: dict[str, "Pending"] = field(default_factory=dict)
    pending: int = 0
    used: float = 0.0


class Pending:
    """A call that was taken on: waits, runs, and has its answer."""

    def __init__(self):
        self.running = False
        self.task: asyncio.Task[Answer]

    async def answer(self) -> Answer:
        """Waits for it. That the one who waits goes away does not stop the call."""
        return await asyncio.shield(self.task)

    def abandon(self) -> None:
        """Nobody wants the answer: what has not begun does not begin."""
        if not self.running:
            self.task.cancel()


class Sessions:
    """The open trajectories. `start` and `close` are called, once each, in the event loop that uses it."""

    def __init__(
        self, tools: Tools, config: ToolServerConfig, on_answer: Callable[[Order, Answer], None] = lambda *_: None
    ):
        """`on_answer`: hears of every call that ended."""
        self._tools = tools
        self._config = config
        self._on_answer = on_answer
        self._trajectories: dict[str, _Trajectory] = {}
        self._kept: OrderedDict[tuple[_Trajectory, str], int] = OrderedDict()
        self._kept_size = 0
        self._workers = asyncio.Semaphore(tools.workers)
        self._pool = CallPool(tools.workers, config.call_seconds)
        self._closers = CallPool(CLOSERS, CLOSE_SECONDS)
        self._closing: set[asyncio.Task[None]] = set()
        self._pending: set[Pending] = set()
        self._clock: asyncio.Task[None] | None = None

    @property
    def open(self) -> int:
        """Trajectories that hold something, those that are being closed among them."""
        return len(self._trajectories) + len(self._closing)

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return sum(not pending.running for pending in self._pending)

    def __contains__(self, trajectory: str) -> bool:
        return trajectory in self._trajectories

    def start(self) -> None:
        self._clock = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Frees every trajectory; does not wait for those that do not come back."""
        if self._clock is not None:
            self._clock.cancel()
        self._pool.cancel()
        for pending in self._pending:
            pending.abandon()
        for trajectory in list(self._trajectories.values()):
            self._end(trajectory, in_turn=False)
        if self._closing:
            await asyncio.wait(self._closing, timeout=PATIENCE)
        self._closers.cancel()

    def submit(self, orders: Sequence[Order]) -> list[Pending]:
        """Takes on all of the calls, or none: raises Busy.

        One whose name its trajectory knows is not run again: its answer is that of the first.
        """
        new = [order for order in orders if not self._known(order)]
        opening = {order.trajectory for order in new if not order.opened} - self._trajectories.keys()
        if opening and self.open + len(opening) > self._config.sessions:
            raise Busy(f"{self.open:,} trajectories are open already")
        room = self._config.queue + self._tools.workers - len(self._pending)
        if len(new) > room:
            raise Busy(f"{self.waiting:,} calls are waiting already, and there is room for {max(room, 0):,} more")
        return [self._submit(order) for order in orders]

    def finish(self, trajectory: str) -> "asyncio.Future[None] | None":
        """Frees a trajectory once the calls that it has sent are done; None: it is not open."""
        found = self._trajectories.get(trajectory)
        return None if found is None else asyncio.shield(self._end(found))

    def _known(self, order: Order) -> bool:
        trajectory = self._trajectories.get(order.trajectory)
        return trajectory is not None and order.name is not None and order.name in trajectory.answers

    def _submit(self, order: Order) -> Pending:
        trajectory = self._trajectories.get(order.trajectory)
        if trajectory and order.name is not None and (first := trajectory.answers.get(order.name)):
            return first
        pending = Pending()
        if trajectory is None and order.opened:
            pending.task = asyncio.create_task(self._lost(order))
            return pending
        if trajectory is None:
            tools = self._tools.session(order.images, order.keys)
            trajectory = _Trajectory(key=order.trajectory, tools=tools, order=order)
            self._trajectories[order.trajectory] = trajectory
        trajectory.pending += 1
        self._pending.add(pending)
        pending.task = asyncio.create_task(self._answer(trajectory, order, pending))
        pending.task.add_done_callback(lambda _: self._done(trajectory, order, pending))
        if order.name is not None:
            trajectory.answers[order.name] = pending
        return pending

    async def _lost(self, order: Order) -> Answer:
        answer = Answer(text=LOST, ok=False, lost=True)
        self._on_answer(order, answer)
        return answer

    async def _answer(self, trajectory: _Trajectory, order: Order, pending: Pending) -> Answer:
        async with trajectory.turn, self._workers:
            pending.running = True
            started = time.monotonic()
            future = self._pool.submit(_run, trajectory.tools, order.call)
            try:
                answer = await asyncio.wrap_future(future)
            except GivenUp:
                answer = self._given_up(trajectory)
            answer = replace(answer, seconds=time.monotonic() - started)
        self._on_answer(order, answer)
        return answer

    def _given_up(self, trajectory: _Trajectory) -> Answer:
        """The session is stuck in its call: the next one gets another, and this one is closed when it can be."""
        stuck, order = trajectory.tools, trajectory.order
        trajectory.tools = self._tools.session(order.images, order.keys)
        self._closers.submit(stuck.close)
        text = f"[The tool did not answer within {self._config.call_seconds:g} s; its state is lost.]"
        return Answer(text=text, ok=False, timed_out=True)

    def _done(self, trajectory: _Trajectory, order: Order, pending: Pending) -> None:
        self._pending.discard(pending)
        trajectory.pending -= 1
        trajectory.used = time.monotonic()
        if order.name is None:
            return
        if pending.task.cancelled() or pending.task.exception():
            trajectory.answers.pop(order.name, None)
        elif self._trajectories.get(trajectory.key) is trajectory:
            self._keep(trajectory, order.name, pending.task.result().size)

    def _keep(self, trajectory: _Trajectory, name: str, size: int) -> None:
        """Forgets the oldest answers where all together are too large."""
        self._kept[trajectory, name] = size
        self._kept_size += size
        while self._kept_size > self._config.answers_mb * 2**20:
            (oldest, its_name), its_size = self._kept.popitem(last=False)
            if its_name in oldest.answers:
                # The name stays: a call that is asked for once more does not run once more.
                oldest.answers[its_name] = _forgotten()
            self._kept_size -= its_size

    def _end(self, trajectory: _Trajectory, *, in_turn: bool = True) -> asyncio.Task[None]:
        """From here on its id stands for a new trajectory. `in_turn`: after the calls that it has sent."""
        del self._trajectories[trajectory.key]
        for name in trajectory.answers:
            self._kept_size -= self._kept.pop((trajectory, name), 0)
        task = asyncio.create_task(self._free(trajectory, in_turn))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _free(self, trajectory: _Trajectory, in_turn: bool) -> None:
        if in_turn:
            async with trajectory.turn:
                pass
        try:
            await asyncio.wrap_future(self._closers.submit(trajectory.tools.close))
        except GivenUp:
            logger.warning("a session did not close within %g s", CLOSE_SECONDS)
        except Exception:
            logger.exception("a session did not close")

    async def _tick(self) -> None:
        """Ends what takes too long, and what nobody asks for any more."""
        while True:
            try:
                longest = min(self._pool.expire(), self._closers.expire(), self._config.idle_seconds / 4, 1.0)
            except RuntimeError:  # no thread can be started now, and later one can
                logger.exception("a call that takes too long could not be given up")
                longest = 1.0
            await asyncio.sleep(max(longest, 0.01))
            before = time.monotonic() - self._config.idle_seconds
            for trajectory in list(self._trajectories.values()):
                if not trajectory.pending and trajectory.used < before:
                    self._end(trajectory)


def _forgotten() -> Pending:
    """In place of an answer that is not kept any more."""
    pending = Pending()
    pending.running = True
    pending.task = asyncio.create_task(_said(Answer(text=FORGOTTEN, ok=False)))
    return pending


async def _said(answer: Answer) -> Answer:
    return answer


def _run(tools: TrajectoryTools, call: ToolCall) -> Answer:
    """In a thread: the call, and what it answers made ready to be sent."""
    try:
        return _presented(tools.call(call))
    except Exception:
        logger.exception("a tool failed")
        return Answer(text="The tool failed.", ok=False)


def _presented(observation: Observation) -> Answer:
    return Answer(
        # Lone surrogates can not be sent.
        text=encodable(observation.text),
        images=[image_uri(image) for image in observation.images],
        ok=observation.ok,
        lost=observation.lost,
        timed_out=observation.timed_out,
    )
