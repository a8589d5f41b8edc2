"""The agent's side of a rollout: turns, tool calls in a pool, observations appended as they come.

It never waits for a tool while a strand can decode, and never decodes and re-encodes what the policy wrote. A
trajectory depends on its prompt, its identity (seed, step, prompt, sample) and its tools alone: not on its slot, its
neighbours, the chunk size, the pages there are or how long a tool took.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hdpo_jax.config import AgentConfig, RolloutConfig
from hdpo_jax.rollout.engine import Chunk
from hdpo_jax.rollout.gate import Gate
from hdpo_jax.rollout.live import Live
from hdpo_jax.rollout.prompts import count_patches
from hdpo_jax.rollout.scheduler import Round, Sampled, Scheduler
from hdpo_jax.rollout.sources import Source
from hdpo_jax.rollout.strands import Strand
from hdpo_jax.tools.calls import CallPool, GivenUp
from hdpo_jax.tools.protocol import TOOL_CALL_START, Tools, TrajectoryTools, parse_tool_call
from hdpo_jax.tools.results import error_in_words
from hdpo_jax.types import Observation, StopReason, ToolCall, Trajectory, Turn
from models.policy import PolicyProcessor
from models.qwen3_vl import EncodedImage

log = logging.getLogger(__name__)

MOMENT = 0.02
"""Seconds that a process waits for its tools, at most, while others may be able to decode."""
PATIENCE = 5.0
"""Seconds that an interrupted rollout waits for its sessions to end; what is left of them ends with the process."""
ANSWER_START = "<answer>"
"""What is written in place of a call that is not sent."""


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
        toolbox: Tools | None,
        *,
        agent: AgentConfig,
        config: RolloutConfig,
        source: Source,
        gate: Gate | None = None,
        alone: bool = True,
    ):
        """`alone`: nobody else decodes when this process has nothing to decode, so it may wait for its tools.

        `gate`: which calls are sent; None: all.
        """
        self._scheduler = scheduler
        self._processor = processor
        self._toolbox = toolbox
        self._agent = agent
        self._config = config
        self._source = source
        self._gate = gate
        self._call_start = processor.encode_text(TOOL_CALL_START).tolist()
        self._answer_start = processor.encode_text(ANSWER_START).tolist()
        self._patience = math.inf if alone else MOMENT
        self._pool = CallPool(toolbox.workers if toolbox else 0, agent.call_seconds)
        self._in_flight = config.in_flight or 2 * config.slots
        self._live: dict[Strand, Live] = {}
        self._calls: dict[Future[_Answer], Live] = {}
        self._cancelled: Future[_Answer] = Future()
        self.stats = scheduler.stats

    def next(self, chunk: Chunk | None) -> Round | None:
        """What to run now, after `chunk` (None: nothing was decoded); None when every trajectory has ended."""
        self._check_cancelled()
        if chunk is not None:
            self.stats.count(chunk)
            for sampled in self._scheduler.take(chunk):
                self._take(sampled)
        self._forget_gone()
        self._collect_answers()
        if not self._live:
            self._source.wait()
        self._start()
        self._gather_answers()
        if not self._live and self._source.ended:
            return None
        return self._scheduler.plan()

    def record(self, experts: Sequence[Int[np.ndarray, "rows tokens layers chosen"] | None]) -> None:
        """What the extensions of the round told, before `next` hears of its chunk; None of one that tells nothing."""
        self._scheduler.record(experts)

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those that have ended, in the order of prompts and samples."""
        return self._source.trajectories

    @property
    def under_way(self) -> int:
        """Trajectories that have begun and not ended."""
        return len(self._live)

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
        self._source.close()

    # Prompts

    def _start(self) -> None:
        """Opens groups while more may be under way."""
        while self._source and len(self._live) < self._in_flight:
            opening = self._source.pop()
            if opening is None:
                continue
            question, group, members = opening
            prompt = Strand.of(question)
            strands = []
            for sample, member in enumerate(members):
                limit = min(self._config.capacity, prompt.length + member.most)
                strand = prompt.fork(member.identity, limit, member.own)
                self._live[strand] = Live.start(question, group, sample, strand, member.listener)
                strands.append(strand)
            self._scheduler.open(prompt, strands)

    # Turns

    def _take(self, sampled: Sampled) -> None:
        live = self._live[sampled.strand]
        live.add_sampled(sampled)
        if live.listener and live.listener.sampled(sampled):
            self._end_here(live, StopReason.CUT)
        elif sampled.ended:
            self._end_turn(live)

    def _end_turn(self, live: Live) -> None:
        strand, calls = live.strand, self._processor.tool_call_end
        spent = strand.length >= strand.limit
        turn = strand.token_ids[strand.turn_start :]
        text = self._turn_text(live)
        called = tuple(turn[-len(calls) :]) == calls
        if called and not spent and self._held_back(live):
            return
        live.add_turn(Turn(role="assistant", text=text))
        if turn[-1] in self._processor.stop_ids:
            forced = not live.sampled[-1]
            self._finish(live, StopReason.TOKEN_BUDGET if forced else StopReason.END_OF_TURN)
        elif not called or spent:
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

    def _held_back(self, live: Live) -> bool:
        """Whether the gate keeps a call back: its turn goes on as an answer where the call began, or ends for good."""
        strand, start = live.strand, self._call_start
        begun = _last(strand.token_ids, start, strand.turn_start)
        if begun is None:
            return False
        probability = math.exp(sum(live.logprobs[begun : begun + len(start)]))
        live.call_probabilities.append(probability)
        if self._gate is None or self._gate.sends(probability):
            return False
        if live.held_back:
            self._end_here(live, StopReason.CALL_LIMIT)
            return True
        if begun + len(self._answer_start) >= strand.limit:
            self._end_here(live, StopReason.TOKEN_BUDGET)
            return True
        live.held_back = True
        live.rewind(begun)
        live.add_given(len(self._answer_start))
        strand.rewrite(begun, self._answer_start)
        if live.listener:
            live.listener.rewound(self._turn_text(live))
        self._scheduler.pause(strand)
        self._scheduler.resume(strand)
        return True

    def _end_here(self, live: Live, stop: StopReason) -> None:
        """In the midst of a turn."""
        live.add_turn(Turn(role="assistant", text=self._turn_text(live)))
        self._finish(live, stop)

    def _turn_text(self, live: Live) -> str:
        """Of the turn under way, so far."""
        return self._processor.decode(live.strand.token_ids[live.strand.turn_start :])

    def _forget_gone(self) -> None:
        """Ends trajectories that nobody listens to any more, wherever they are."""
        for live in [live for live in self._live.values() if live.listener and live.listener.gone]:
            for future in [future for future, other in self._calls.items() if other is live]:
                del self._calls[future]
                self._end_session_later(live)
            self._finish(live, StopReason.CUT)

    def _finish(self, live: Live, stop: StopReason) -> None:
        self._end_session(live)
        del self._live[live.strand]
        self._scheduler.abandon(live.strand)
        trajectory = live.finished(stop)
        self._source.finished(trajectory)
        if live.listener:
            live.listener.finished(trajectory)

    # Tools

    def _run_call(self, session: TrajectoryTools, call: ToolCall, room: int) -> _Answer:
        """In a thread of the pool: the call, and what it answers made ready. `room`: image patches still allowed."""
        return self._answer(session.call(call), room)

    def _end_session(self, live: Live) -> None:
        session, live.session = live.session, None
        _close(session)

    def _end_session_later(self, live: Live) -> None:
        """Its session is in a call: it ends when that does, and another call would get a new one."""
        session, live.session = live.session, None
        threading.Thread(target=_close, args=(session,), daemon=True).start()

    def _answer_of(self, live: Live, future: Future[_Answer]) -> _Answer:
        """What a call gave; where it failed, raised or gave nonsense, words that say so: the policy's to deal with."""
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, GivenUp):
            self._end_session_later(live)
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
        live.add_turn(answer.turn)
        live.add_given(len(answer.token_ids))
        live.strand.append(answer.token_ids, list(answer.images), self._processor.config)
        self._scheduler.resume(live.strand)


def _last(ids: Sequence[int], wanted: Sequence[int], begin: int) -> int | None:
    """Where `wanted` stands for the last time, from `begin` on."""
    size = len(wanted)
    places = range(len(ids) - size, begin - 1, -1)
    return next((place for place in places if list(ids[place : place + size]) == wanted), None)


def _close(session: TrajectoryTools | None) -> None:
    """What a session does not let go of is not its trajectory's concern: that is whole."""
    try:
        if session:
            session.close()
    except Exception as error:
        log.warning("a tool's session did not close: %s", error_in_words(error))
