"""The host's side of a rollout: fills slots, runs tool calls in a pool, appends what they return.

The loop never waits for a tool while a slot can decode, and never decodes and re-encodes what the policy wrote.
A trajectory depends on its prompt, its identity (seed, step, prompt, sample) and its tools alone: not on its
slot, its neighbours, the chunk size or how long a tool took.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from hdpo_jax.config import AgentConfig, ConfigError, RolloutConfig, require_observations_fit
from hdpo_jax.rollout.prompts import PromptEncoder, Question, count_patches, shape_for
from hdpo_jax.rollout.slots import Slots, nobody_admitted, nothing_added
from hdpo_jax.tools.protocol import parse_tool_call
from hdpo_jax.tools.toolbox import Session, ToolBox
from hdpo_jax.types import Observation, Prompt, StopReason, ToolCall, Trajectory, Turn
from models.qwen3_vl import EncodedImage, KVCache, Qwen3VL
from models.qwen3_vl.images import mrope_positions
from models.qwen3_vl.processing import Processor

ENCODERS = 2
"""Threads that encode prompts where there are no tools to run."""


@dataclass(kw_only=True)
class _Live:
    """A trajectory under way."""

    question: Question
    group: int
    sample: int
    slot: int
    limit: int
    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    images: list[EncodedImage]
    offset: int
    turn_start: int
    turns: list[Turn] = field(default_factory=list)
    calls: int = 0
    session: Session | None = None

    @property
    def length(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A tool's observation with its images encoded, ready to append."""

    observation: Observation
    images: Sequence[EncodedImage]


_Pending = tuple[_Live, Int[np.ndarray, " tokens"], Sequence[EncodedImage]]
"""A trajectory, and the observation to append to it: token ids and images."""


@dataclass
class RolloutStats:
    """Where the time of one `sample` call went, in seconds, and what came of it."""

    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    append_seconds: float = 0.0
    wait_seconds: float = 0.0
    sampled_tokens: int = 0
    decode_steps: int = 0
    slot_steps: int = 0
    """Decode steps times slots: what could have been sampled."""


class Sampler:
    """Samples trajectories from a policy whose parameters are given at each call, on the mesh that they live on.

    Without a toolbox a `</tool_call>` does not stop a turn and nothing is executed.
    """

    def __init__(
        self,
        model: Qwen3VL,
        processor: Processor,
        toolbox: ToolBox | None,
        *,
        mesh: Mesh,
        agent: AgentConfig,
        rollout: RolloutConfig,
        seed: int,
        encode: PromptEncoder | None = None,
    ):
        require_observations_fit(agent, rollout)
        least = len(processor.close_turn) + len(processor.observation_turn("").token_ids)
        if toolbox and agent.max_observation_tokens < least:
            raise ConfigError(
                f"agent.max_observation_tokens is {agent.max_observation_tokens}; expected at least {least}, "
                "which an empty observation takes"
            )
        self._processor = processor
        self._toolbox = toolbox
        self._mesh = mesh
        self._agent = agent
        self._config = rollout
        self._encode = encode or PromptEncoder(processor, rollout)
        stop_ids = list(processor.stop_ids) + ([processor.tool_call_end_id] if toolbox else [])
        # Inside the mesh, or the whole cache would lie on its first device.
        with jax.set_mesh(mesh):
            self._slots = Slots(model, processor, rollout, seed=seed, stop_ids=stop_ids)
        self.stats = RolloutStats()

    def sample(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        step: int,
        first_prompt: int = 0,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """`samples` trajectories a prompt, in the order of prompts and samples.

        `step` and `first_prompt` number this call's trajectories in the run: the same numbers give the same
        randomness. `on_finished` hears of each trajectory as it ends.
        """
        run = _Run(
            self._slots,
            self._processor,
            self._toolbox,
            agent=self._agent,
            config=self._config,
            encode=self._encode,
            params=params,
            prompts=prompts,
            samples=samples,
            identity=(step, first_prompt),
            on_finished=on_finished,
        )
        with jax.set_mesh(self._mesh):
            try:
                return run.to_the_end()
            finally:
                self.stats = run.stats
                run.close()

    def warm_up(self, params: nnx.State) -> None:
        """Compiles every program for every static shape, so that nothing compiles later."""
        with jax.set_mesh(self._mesh):
            self._slots.warm_up(params)


class _Run:
    """One `sample` call: the queue of prompts, the live slots, the tool calls under way."""

    def __init__(
        self,
        slots: Slots,
        processor: Processor,
        toolbox: ToolBox | None,
        *,
        agent: AgentConfig,
        config: RolloutConfig,
        encode: PromptEncoder,
        params: nnx.State,
        prompts: Sequence[Prompt],
        samples: int,
        identity: tuple[int, int],
        on_finished: Callable[[Trajectory], None] | None,
    ):
        self._slots = slots
        self._processor = processor
        self._toolbox = toolbox
        self._agent = agent
        self._config = config
        self._encode = encode
        self._params = params
        self._prompts = prompts
        self._samples = samples
        self._step, self._first_prompt = identity
        self._on_finished = on_finished
        # Two pools: a prompt that is to fill a slot does not wait in line behind tool calls.
        self._tools = ThreadPoolExecutor(toolbox.workers if toolbox else 1, thread_name_prefix="tool")
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._to_encode: deque[int] = deque(range(len(prompts)))
        self._encoding: deque[tuple[int, Future[Question]]] = deque()
        self._encoded: list[tuple[int, Question]] = []
        self._prefilled: KVCache | None = None
        self._to_fork: deque[tuple[int, int, Question, int]] = deque()
        self._free = list(range(self._config.slots))[::-1]
        self._live: dict[int, _Live] = {}
        self._decoding: set[int] = set()
        self._calls: dict[Future[_Answer], _Live] = {}
        self._to_append: defaultdict[tuple[int, int], list[_Pending]] = defaultdict(list)
        self._finished: list[Trajectory] = []
        self.stats = RolloutStats()

    def to_the_end(self) -> list[Trajectory]:
        while self._has_prompts or self._to_fork or self._live:
            self._collect_answers()
            self._admit()
            self._gather_answers()
            self._append()
            if self._decoding:
                self._decode()
        return sorted(self._finished, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def close(self) -> None:
        """Ends both pools, and frees what an interrupted run still holds."""
        self._tools.shutdown(wait=False, cancel_futures=True)
        for live in self._live.values():
            if live.session:
                live.session.close()
        self._tools.shutdown()
        self._encoders.shutdown(cancel_futures=True)
        if self._live:
            self._slots.release()

    # Prompts into slots

    @property
    def _has_prompts(self) -> bool:
        return bool(self._to_encode or self._encoding or self._encoded)

    def _encode_ahead(self) -> None:
        """Keeps prompts for two prefills on their way: the next ones are ready when slots come free."""
        while self._to_encode and len(self._encoding) < 2 * self._config.prefill_rows:
            group = self._to_encode.popleft()
            self._encoding.append((group, self._encoders.submit(self._encode, self._prompts[group])))

    def _admit(self) -> None:
        self._encode_ahead()
        while self._free and (self._to_fork or self._has_prompts):
            if not self._to_fork:
                self._prefill()
            self._fork()

    def _prefill(self) -> None:
        started = time.perf_counter()
        rows = self._config.prefill_rows
        while self._encoding and len(self._encoded) < rows:
            group, question = self._encoding.popleft()
            self._encoded.append((group, question.result()))
        self._encode_ahead()
        tokens, patches = shape = self._encoded[0][1].shape
        # Prompts of the first one's shape; the others wait for their turn.
        chosen = [(group, question) for group, question in self._encoded if question.shape == shape]
        self._encoded = [(group, question) for group, question in self._encoded if question.shape != shape]
        token_ids = np.zeros((rows, tokens), np.int32)
        positions = np.zeros((rows, tokens, 3), np.int32)
        for row, (_, question) in enumerate(chosen):
            held = len(question.token_ids) - 1
            token_ids[row, :held] = question.token_ids[:-1]
            positions[row, :held] = question.positions[:-1]
        images = [question.images for _, question in chosen]
        self._prefilled = self._slots.prefill(self._params, token_ids, positions, images, patches)
        for row, (group, question) in enumerate(chosen):
            self._to_fork.extend((row, group, question, sample) for sample in range(self._samples))
        self.stats.prefill_seconds += time.perf_counter() - started

    def _fork(self) -> None:
        admission = nobody_admitted(self._config.slots)
        for _ in range(min(len(self._free), len(self._to_fork))):
            slot = self._free.pop()
            row, group, question, sample = self._to_fork.popleft()
            length = len(question.token_ids)
            limit = min(self._config.capacity, length + self._agent.max_response_tokens)
            offset = int(question.positions[-1, 0]) - (length - 1)
            admission.source[slot] = row
            admission.pending[slot] = question.token_ids[-1]
            admission.length[slot] = length
            admission.limit[slot] = limit
            admission.offset[slot] = offset
            admission.identity[slot] = (self._step, self._first_prompt + group, sample)
            self._live[slot] = _Live(
                question=question,
                group=group,
                sample=sample,
                slot=slot,
                limit=limit,
                token_ids=question.token_ids.tolist(),
                sampled=[False] * length,
                logprobs=[0.0] * length,
                images=list(question.images),
                offset=offset,
                turn_start=length,
            )
            self._decoding.add(slot)
        assert self._prefilled is not None
        self._slots.fork(self._prefilled, admission)

    # Generation

    def _decode(self) -> None:
        started = time.perf_counter()
        chunk = self._slots.decode(self._params)
        self.stats.decode_seconds += time.perf_counter() - started
        counts = (chunk.tokens >= 0).sum(axis=1)
        self.stats.decode_steps += int(counts.max())
        self.stats.slot_steps += int(counts.max()) * self._config.slots
        self.stats.sampled_tokens += int(counts.sum())
        for slot in sorted(self._decoding):
            live, count = self._live[slot], counts[slot]
            live.token_ids.extend(chunk.tokens[slot, :count].tolist())
            live.logprobs.extend(chunk.logprobs[slot, :count].tolist())
            live.sampled.extend([True] * int(count))
            if not chunk.active[slot]:
                self._decoding.discard(slot)
                self._end_turn(live)

    def _end_turn(self, live: _Live) -> None:
        last = live.token_ids[-1]
        text = self._processor.decode(live.token_ids[live.turn_start :])
        live.turns.append(Turn(role="assistant", text=text))
        if last in self._processor.stop_ids:
            self._finish(live, StopReason.END_OF_TURN)
        elif last != self._processor.tool_call_end_id or live.length >= live.limit:
            self._finish(live, StopReason.TOKEN_BUDGET)
        elif live.calls >= self._agent.max_calls:
            self._finish(live, StopReason.CALL_LIMIT)
        else:
            assert self._toolbox is not None  # without one, nothing ends at a call
            live.calls += 1
            live.session = live.session or self._toolbox.session(live.question.prompt.images)
            call = parse_tool_call(text) or ToolCall(
                name="", arguments={}, error="there is a </tool_call> but no <tool_call> before it"
            )
            self._calls[self._tools.submit(self._run_call, live.session, call)] = live

    # Tools

    def _run_call(self, session: Session, call: ToolCall) -> _Answer:
        return self._answer(session.call(call))

    def _answer(self, observation: Observation) -> _Answer:
        """The observation as the model gets it; an image of a shape that it can not take is named and left out."""
        images, encoded, refused = [], [], []
        for image in observation.images:
            try:
                encoded.append(self._processor.encode_image(image))
                images.append(image)
            except ValueError as error:
                refused.append(f"[image left out: {error}]")
        if refused:
            text = "\n".join(filter(None, [observation.text, *refused]))
            observation = replace(observation, text=text, images=tuple(images))
        return _Answer(observation=observation, images=encoded)

    def _gather_answers(self) -> None:
        """Waits for tools: until one answers where nothing else can go on, or else a moment while few slots can.

        A decode step takes as long for a few slots as for all, so a handful of early answers is worth a pause.
        """
        started = time.perf_counter()
        while self._calls:
            ready = len(self._decoding) + sum(map(len, self._to_append.values()))
            left = started + self._config.gather_seconds - time.perf_counter()
            if ready and (2 * ready >= len(self._live) or left <= 0):
                break
            wait(self._calls, timeout=max(left, 0) if ready else None, return_when=FIRST_COMPLETED)
            self._collect_answers()
        self.stats.wait_seconds += time.perf_counter() - started

    def _collect_answers(self) -> None:
        for future in [future for future in self._calls if future.done()]:
            live = self._calls.pop(future)
            answer = future.result()
            if answer.observation.lost:
                self._finish(live, StopReason.DROPPED)
            else:
                self._observe(live, answer)

    def _observe(self, live: _Live, answer: _Answer) -> None:
        closing = self._processor.close_turn
        room = self._agent.max_observation_tokens - len(closing)
        turn, kept, said = self._processor.observation_turn(answer.observation.text, answer.images, room)
        ids = np.concatenate([closing, turn])
        images = answer.images[:kept]
        shown = tuple(answer.observation.images)[:kept]
        shape = shape_for(self._config.observation_shapes, len(ids), count_patches(images))
        if shape and live.length + len(ids) < live.limit:
            live.turns.append(Turn(role="tool", text=said, images=shown))
            self._to_append[shape].append((live, ids, images))
        else:
            self._finish(live, StopReason.TOKEN_BUDGET)

    def _append(self) -> None:
        started = time.perf_counter()
        for shape, waiting in self._to_append.items():
            for first in range(0, len(waiting), self._config.append_rows):
                self._append_batch(waiting[first : first + self._config.append_rows], *shape)
        self._to_append.clear()
        self.stats.append_seconds += time.perf_counter() - started

    def _append_batch(self, batch: Sequence[_Pending], tokens: int, patches: int) -> None:
        extension = nothing_added(self._config.append_rows, tokens, self._config.slots)
        for row, (live, ids, images) in enumerate(batch):
            count = len(ids)
            start = live.length + live.offset
            grids = [image.grid for image in images]
            positions, _ = mrope_positions(ids, grids, self._processor.config, start=start)
            extension.slots[row] = live.slot
            extension.token_ids[row, :count] = [live.token_ids[-1], *ids[:-1]]
            extension.positions[row, 0] = start - 1
            extension.positions[row, 1:count] = positions[:-1]
            extension.pending[row] = ids[-1]
            extension.added[row] = count
            live.token_ids.extend(ids.tolist())
            live.sampled.extend([False] * count)
            live.logprobs.extend([0.0] * count)
            live.images.extend(images)
            live.offset = int(positions[-1, 0]) - (live.length - 1)
            live.turn_start = live.length
            extension.offset[row] = live.offset
            self._decoding.add(live.slot)
        self._slots.append(self._params, extension, [images for _, _, images in batch], patches)

    def _finish(self, live: _Live, stop: StopReason) -> None:
        if live.session:
            live.session.close()
        del self._live[live.slot]
        self._free.append(live.slot)
        trajectory = Trajectory(
            prompt=live.question.prompt,
            group=live.group,
            sample=live.sample,
            token_ids=np.asarray(live.token_ids, np.int32),
            sampled=np.asarray(live.sampled, bool),
            logprobs=np.asarray(live.logprobs, np.float32),
            prompt_length=len(live.question.token_ids),
            images=live.images,
            prompt_images=len(live.question.images),
            turns=live.turns,
            calls=live.calls,
            stop=stop,
        )
        self._finished.append(trajectory)
        if self._on_finished:
            self._on_finished(trajectory)
