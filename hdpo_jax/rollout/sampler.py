"""Rollouts driven by the host: it runs the programs of each round, and hands what they sampled to the agent."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hdpo_jax.config import AgentConfig, ConfigError, RolloutConfig
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.engine import Chunk, Experts, Programs, make_programs, read_report
from hdpo_jax.rollout.gate import Gate
from hdpo_jax.rollout.lockstep import Lanes, next_round, spread
from hdpo_jax.rollout.packing import require_experts
from hdpo_jax.rollout.prompts import Intake, PromptEncoder
from hdpo_jax.rollout.scheduler import Round, Scheduler
from hdpo_jax.rollout.sources import Batch, Source
from hdpo_jax.rollout.stats import RolloutStats
from hdpo_jax.tools.protocol import Tools
from hdpo_jax.types import Prompt, Trajectory
from models.policy import PolicyModel, PolicyProcessor
from models.qwen3_vl import Cache
from sharding.multihost import local_rows


class Sampler:
    """Samples trajectories from a policy whose parameters are given at each call, on the mesh that they live on.

    Without a toolbox a `</tool_call>` does not stop a turn and nothing is executed. The cache is there while `sample`
    runs, and its memory is free for the update afterwards. Where there are several processes, each gives its own
    prompts, and all of them sample in lock-step.
    """

    def __init__(
        self,
        model: PolicyModel,
        processor: PolicyProcessor,
        toolbox: Tools | None,
        *,
        mesh: Mesh,
        agent: AgentConfig,
        rollout: RolloutConfig,
        seed: int,
        encode: PromptEncoder | None = None,
        own: bool = False,
        gate: Gate | None = None,
    ):
        """`own`: trajectories say how they are sampled, and not `rollout`. `gate`: in place of the one of `agent`."""
        least = len(processor.close_turn) + len(processor.observation_turn("").token_ids)
        if toolbox and agent.max_observation_tokens < least:
            raise ConfigError(
                f"agent.max_observation_tokens is {agent.max_observation_tokens}; expected at least {least}, "
                "which an empty observation takes"
            )
        if rollout.replay_experts:
            require_experts(model.config)
        self._processor = processor
        self._toolbox = toolbox
        self._mesh = mesh
        self._agent = agent
        self.lanes = Lanes.of(mesh)
        self._alone = jax.process_count() == 1
        self._config = rollout if self._alone else rollout.share(len(self.lanes.own), self.lanes.count)
        self._encode = encode or PromptEncoder(processor, rollout)
        self._stops = [*([stop] for stop in processor.stop_ids), *([processor.tool_call_end] if toolbox else [])]
        self.programs: Programs = make_programs(
            model,
            rollout,
            platform=mesh.devices.flat[0].platform,
            lanes=self.lanes.count,
            seed=seed,
            stops=self._stops,
            end_id=processor.stop_ids[0],
            forbidden=processor.forbidden,
        )
        self._own = own
        self._gate = gate or Gate.of(agent)
        self._lengths: dict[str, float] = {}
        self.stats = RolloutStats()

    def sample(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        step: int,
        numbers: Sequence[int] | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """`samples` trajectories a prompt, in the order of prompts and samples.

        `step` and the `numbers` of its prompts (None: 0, 1, …) name a trajectory in the run: the same give the same
        randomness. `on_finished` hears of each trajectory as it ends.
        """
        rollout = self.rollout(prompts, samples=samples, step=step, numbers=numbers, on_finished=on_finished)
        self.run(params, rollout)
        return rollout.trajectories

    def rollout(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        step: int,
        numbers: Sequence[int] | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> Rollout:
        """The host's part of what `sample` does; to be closed, also after an error."""
        ahead = 2 * max(rows for rows, _, _ in self._config.shapes)
        batch = Batch(
            Intake(self._encode, prompts, self._order(prompts), ahead=ahead),
            samples=samples,
            step=step,
            numbers=range(len(prompts)) if numbers is None else numbers,
            most=self._agent.max_response_tokens,
            on_finished=on_finished,
        )
        return self.rollout_of(batch, alone=self._alone)

    def rollout_of(self, source: Source, *, alone: bool) -> Rollout:
        """The same of whatever `source` has; `alone` as for `Rollout`."""
        rollout = Rollout(
            self._scheduler(),
            self._processor,
            self._toolbox,
            agent=self._agent,
            config=self._config,
            source=source,
            gate=self._gate,
            alone=alone,
        )
        self.stats = rollout.stats
        return rollout

    def run(self, params: nnx.State, rollout: Rollout, *, turn: AbstractContextManager | None = None) -> None:
        """Runs a rollout to its end, and closes it.

        `turn` is held while programs are started: where two threads do so, every device gets them in one order.
        """
        try:
            with jax.set_mesh(self._mesh):
                self._run(params, rollout, turn or nullcontext())
        finally:
            rollout.close()
        self.remember(rollout)

    def remember(self, rollout: Rollout) -> None:
        """Keeps what a finished rollout says about the next ones: how long they may be."""
        lengths: dict[str, list[int]] = {}
        for trajectory in rollout.trajectories:
            lengths.setdefault(trajectory.prompt.id, []).append(int(trajectory.sampled.sum()))
        self._lengths |= {id: float(np.mean(counts)) for id, counts in lengths.items()}

    @property
    def empty_round(self) -> Round:
        """Every program with nothing to do: the shapes and types of all this process's rounds."""
        return self._scheduler().empty_round()

    def warm_up(self, params: nnx.State) -> None:
        """Compiles every program for every static shape, so that nothing compiles later."""
        with jax.set_mesh(self._mesh):
            cache, everything = self.programs.empty_cache(), self.empty_round
            laid_out = self.programs.lay_out(params)
            if not self._alone:
                everything = Round.of([spread(program, self._mesh) for program in everything.programs])
            assert everything.running is not None
            # Twice: the cache that a program returns may be laid out in another way than the empty one.
            for _ in range(2):
                cache, _ = self._extend(params, cache, everything)
                cache, _ = self.programs.decode(laid_out, cache, everything.running)

    def _scheduler(self) -> Scheduler:
        recent = max(map(len, self._stops)) - 1
        return Scheduler(self._config, self._processor.config, lanes=len(self.lanes.own), recent=recent, own=self._own)

    def _plan(self, rollout: Rollout) -> Callable[[Chunk | None], Round | None]:
        if self._alone:
            return rollout.next
        return partial(next_round, rollout, nothing=self.empty_round, mesh=self._mesh)

    def _run(self, params: nnx.State, rollout: Rollout, turn: AbstractContextManager) -> None:
        plan = self._plan(rollout)
        started = time.perf_counter()
        with turn:
            laid_out = self.programs.lay_out(params)
        jax.block_until_ready(laid_out)
        rollout.stats.decode_seconds += time.perf_counter() - started
        cache, chunk = self.programs.empty_cache(), None
        while (now := plan(chunk)) is not None:
            started = time.perf_counter()
            with turn:
                (cache, experts), chunk = self._extend(params, cache, now), None
            jax.block_until_ready(cache)
            rollout.record([None if each is None else local_rows(each) for each in experts])
            rollout.stats.extend_seconds += time.perf_counter() - started
            if now.running is not None:
                started = time.perf_counter()
                with turn:
                    cache, report = self.programs.decode(laid_out, cache, now.running)
                chunk = read_report(jax.tree.map(local_rows, report))
                rollout.stats.decode_seconds += time.perf_counter() - started

    def _extend(self, params: nnx.State, cache: Cache, now: Round) -> tuple[Cache, list[Experts | None]]:
        """The cache with what a round adds to it before it decodes, and what its extensions recorded."""
        found: list[Experts | None] = [None for _ in now.extensions]
        for number, extension in enumerate(now.extensions):
            if extension is not None:
                cache, found[number] = self.programs.extend(params, cache, extension)
        return cache if now.copies is None else self.programs.copy(cache, now.copies), found

    def _order(self, prompts: Sequence[Prompt]) -> list[int]:
        """Prompts whose rollouts were long the last time first, so that no long one is left alone at the end."""
        if not self._config.longest_first or not self._lengths:
            return list(range(len(prompts)))
        usual = float(np.mean(list(self._lengths.values())))
        return sorted(range(len(prompts)), key=lambda number: -self._lengths.get(prompts[number].id, usual))
