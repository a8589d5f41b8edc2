"""The agent's side of a rollout: turns, tool calls in a pool, observations appended as they come.

It never waits for a tool while a strand can decode, and never decodes and re-encodes what the policy wrote. A
trajectory depends on its prompt, its identity (seed, step, prompt, sample) and its tools alone: not on its slot, its
neighbours, the chunk size, the pages there are or how long a tool took.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hdpo_jax.config import AgentConfig, RolloutConfig
from hdpo_jax.rollout.calls import CallPool, GivenUp
from hdpo_jax.rollout.engine import Chunk
from hdpo_jax.rollout.live import Live
from hdpo_jax.rollout.prompts import Intake, PromptEncoder, count_patches
from hdpo_jax.rollout.scheduler import Round, Sampled, Scheduler
from hdpo_jax.rollout.strands import Strand
from hdpo_jax.tools.protocol import parse_tool_call
from hdpo_jax.tools.results import error_in_words
from hdpo_jax.tools.toolbox import Session, ToolBox
from hdpo_jax.types import Observation, Prompt, StopReason, ToolCall, Trajectory, Turn
from models.policy import PolicyProcessor
from models.qwen3_vl import EncodedImage

log = logging.getLogger(__name__)

MOMENT = 0.02
"""Seconds that a process waits for its tools, at most, while others may be able to decode."""
PATIENCE = 5.0
"""Seconds that an interrupted rollout waits for its sessions to end; what is left of them ends with the process."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A tool's observation as the model gets it, ready to append."""

    token_ids: Int[np.ndarray, " tokens"]
    """The end of the assistant's turn, the observation's turn, and the beginning of the next."""
    images: Sequence[EncodedImage]
    turn: Turn
    lost: bool


class Rollout:
    """All trajectories of one batch of prompts: says what is to run next, and takes what came of it.

    Ask `next` for a round, run its programs, give `next` the chunk that they sampled, until there is no round. What
    runs them, and where, is not known here.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        processor: PolicyProcessor,
        toolbox: ToolBox | None,
        *,
        agent: AgentConfig,
        config: RolloutConfig,
        encode: PromptEncoder,
        prompts: Sequence[Prompt],
        order: Sequence[int],
        samples: int,
        step: int,
        numbers: Sequence[int],
        alone: bool = True,
        on_finished: Callable[[Trajectory], None] | None = None,
    ):
        """`order`: in which prompts are started. `numbers`: of each prompt in the step.

        `alone`: nobody else decodes when this process has nothing to decode, so it may wait for its tools.
        """
        self._scheduler = scheduler
        self._processor = processor
        self._toolbox = toolbox
        self._agent = agent
        self._config = config
        self._prompts = Intake(encode, prompts, order, ahead=2 * max(rows for rows, _, _ in config.shapes))
        self._samples = samples
        self._step = step
        self._numbers = numbers
        self._patience = math.inf if alone else MOMENT
        self._on_finished = on_finished
        self._pool = CallPool(toolbox.workers if toolbox else 0, agent.call_seconds)
        self._in_flight = config.in_flight or 2 * config.slots
        self._live: dict[Strand, Live] = {}
        self._calls: dict[Future[_Answer], Live] = {}
        self._finished: deque[Trajectory] = deque()
        self._cancelled: Future[_Answer] = Future()
        self.stats = scheduler.stats

    def next(self, chunk: Chunk | None) -> Round | None:
        """What to run now, after `chunk` (None: nothing was decoded); None when every trajectory has ended."""
        self._check_cancelled()
        if chunk is not None:
            self.stats.count(chunk)
            for sampled in self._scheduler.take(chunk):
                self._take(sampled)
        self._collect_answers()
        self._start()
        self._gather_answers()
        if not self._live and not self._prompts:
            return None
        return self._scheduler.plan()

    def record(self, experts: Sequence[Int[np.ndarray, "rows tokens layers chosen"] | None]) -> None:
        """What the extensions of the round told, before `next` hears of its chunk; None of one that tells nothing."""
        self._scheduler.record(experts)

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those that have ended, in the order of prompts and samples."""
        return sorted(self._finished, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def cancel(self) -> None:
        """From any thread: the rollout is given up, and `next` raises CancelledError, also where it waits."""
        if not self._cancelled.done():
            self._cancelled.set_exception(CancelledError("the rollout was cancelled"))

    def close(self) -> None:
        """Ends the pools, and the sessions that an interrupted run still holds, in the midst of a call or not."""
        self._pool.cancel()
        held = [live.session for live in self._live.values() if live.session]
        enders = [threading.Thread(target=_close, args=(session,), daemon=True) for session in held]
        for ender in enders:
            ender.start()
        until = time.monotonic() + PATIENCE
        for ender in enders:
            ender.join(max(0.0, until - time.monotonic()))
        self._pool.close()
        self._prompts.close()

    # Prompts

    def _start(self) -> None:
        """Opens groups while more may be under way."""
        while self._prompts and len(self._live) < self._in_flight:
            place, question = self._prompts.pop()
            group = self._numbers[place]
            prompt = Strand.of(question)
            limit = min(self._config.capacity, prompt.length + self._agent.max_response_tokens)
            members = []
            for sample in range(self._samples):
                strand = prompt.fork((self._step, group, sample), limit)
                self._live[strand] = Live.start(question, group, sample, strand)
                members.append(strand)
            self._scheduler.open(prompt, members)

    # Turns

    def _take(self, sampled: Sampled) -> None:
        live = self._live[sampled.strand]
        live.add_sampled(sampled)
        if sampled.ended:
            self._end_turn(live)

    def _end_turn(self, live: Live) -> None:
        strand, calls = live.strand, self._processor.tool_call_end
        spent = strand.length >= strand.limit
        turn = strand.token_ids[strand.turn_start :]
        text = self._processor.decode(turn)
        live.turns.append(Turn(role="assistant", text=text))
        if turn[-1] in self._processor.stop_ids:
            forced = not live.sampled[-1]
            self._finish(live, StopReason.TOKEN_BUDGET if forced else StopReason.END_OF_TURN)
        elif tuple(turn[-len(calls) :]) != calls or spent:
            self._finish(live, StopReason.TOKEN_BUDGET)
        elif live.calls >= self._agent.max_calls:
            self._finish(live, StopReason.CALL_LIMIT)
        else:
            assert self._toolbox is not None  # without one, nothing ends at a call
            live.calls += 1
            prompt = live.question.prompt
            live.session = live.session or self._toolbox.session(prompt.images, prompt.keys)
            call = parse_tool_call(text) or ToolCall(
                name="", arguments={}, error="there is a </tool_call> but no <tool_call> before it"
            )
            self._scheduler.pause(strand)
            room = self._config.patches - strand.patches
            self._calls[self._pool.submit(self._run_call, live.session, call, room)] = live

    def _finish(self, live: Live, stop: StopReason) -> None:
        self._end_session(live)
        del self._live[live.strand]
        self._scheduler.close(live.strand)
        trajectory = live.finished(stop)
        self._finished.append(trajectory)
        if self._on_finished:
            self._on_finished(trajectory)

    # Tools

    def _run_call(self, session: Session, call: ToolCall, room: int) -> _Answer:
        """In a thread of the pool: the call, and what it answers made ready. `room`: image patches still allowed."""
        return self._answer(session.call(call), room)

    def _end_session(self, live: Live) -> None:
        session, live.session = live.session, None
        _close(session)

    def _answer_of(self, live: Live, future: Future[_Answer]) -> _Answer:
        """What a call gave; where it failed, raised or gave nonsense, words that say so: the policy's to deal with."""
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, GivenUp):
            # The session is stuck in that call: the next call gets a new one, and this one ends when it can.
            session, live.session = live.session, None
            threading.Thread(target=_close, args=(session,), daemon=True).start()
            said = f"it did not answer within {self._agent.call_seconds:g} s; its state is lost"
        else:
            said = error_in_words(error)
        log.warning("a tool call failed: %s", said)
        return self._answer(Observation(text=f"[The tool failed: {said}]", ok=False), room=0)

    def _answer(self, observation: Observation, room: int) -> _Answer:
        """An image that the model can not take is named and left out; what is too long is cut."""
        images, encoded, refused = [], [], []
        for image in observation.images:
            try:
                patches = self._processor.encode_image(image)
            except ValueError as error:
                refused.append(f"[image left out: {error}]")
                continue
            if len(patches.patches) > min(self._config.image_patches, room - count_patches(encoded)):
                refused.append("[image left out: no room]")
                continue
            encoded.append(patches)
            images.append(image)
        text = "\n".join(filter(None, [observation.text, *refused])) if refused else observation.text
        closing = self._processor.close_turn
        longest = self._agent.max_observation_tokens - len(closing)
        ids, kept, said = self._processor.observation_turn(text, encoded, longest)
        return _Answer(
            token_ids=np.concatenate([closing, ids]),
            images=encoded[:kept],
            turn=Turn(role="tool", text=said, images=tuple(images[:kept])),
            lost=observation.lost,
        )

    def _gather_answers(self) -> None:
        """Waits for tools: until one answers where nothing else can go on, or else a moment while few slots can.

        A decode step takes as long for a few slots as for all, so a handful of early answers is worth a pause.
        Where there are other processes, something else always can.
        """
        started = time.perf_counter()
        while self._calls:
            ready = self._scheduler.running + self._scheduler.coming
            longest = min(self._config.gather_seconds if ready else math.inf, self._patience)
            left = started + longest - time.perf_counter()
            expires = self._pool.expire()
            if 2 * ready >= min(len(self._live), self._config.slots) or left <= 0:
                break
            wait([*self._calls, self._cancelled], timeout=min(left, expires), return_when=FIRST_COMPLETED)
            self._collect_answers()
            self._start()
        self.stats.wait_seconds += time.perf_counter() - started

    def _collect_answers(self) -> None:
        self._check_cancelled()
        for future in [future for future in self._calls if future.done()]:
            live = self._calls.pop(future)
            answer = self._answer_of(live, future)
            if answer.lost:
                self._finish(live, StopReason.DROPPED)
            elif live.strand.length + len(answer.token_ids) >= live.strand.limit:
                self._finish(live, StopReason.TOKEN_BUDGET)
            else:
                self._observe(live, answer)

    def _check_cancelled(self) -> None:
        if self._cancelled.done():
            self._cancelled.result()

    def _observe(self, live: Live, answer: _Answer) -> None:
        live.turns.append(answer.turn)
        live.add_given(len(answer.token_ids))
        live.strand.append(answer.token_ids, list(answer.images), self._processor.config)
        self._scheduler.resume(live.strand)


def _close(session: Session | None) -> None:
    """What a session does not let go of is not its trajectory's concern: that is whole."""
    try:
        if session:
            session.close()
    except Exception as error:
        log.warning("a tool's session did not close: %s", error_in_words(error))
