"""Both ways of running iterations, on the chatty policy: what tests compare."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import optax

from hdpo_jax.algorithm.state import TrainState, abstract_state, init_state, state_shardings
from hdpo_jax.algorithm.update import make_update
from hdpo_jax.config import AgentConfig, AlgorithmConfig, RLTrainConfig
from hdpo_jax.rewards import Verdict
from hdpo_jax.rollout.fused import make_iterate
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.iteration import assemble, empty_batch, joined
from hdpo_jax.train.policy import Policy
from hdpo_jax.types import Trajectory
from sharding.rules import shard_batch
from tests.rollout.chatty import AGENT, ROLLOUT

PROMPTS, SAMPLES, MINI_BATCHES = 4, 4, 2
TRAIN = RLTrainConfig(
    prompts_per_step=PROMPTS, group_size=SAMPLES, row_tokens=352, row_patches=320, micro_batch_rows=8, max_rows=16
)


def judge(trajectory: Trajectory) -> Verdict:
    """Something that differs within every group."""
    letters = int(trajectory.sampled.sum())
    accuracy = (letters % 7) / 7
    correct = letters % 3 > 0
    tool = correct / (1 + trajectory.calls)
    return Verdict(accuracy=accuracy, tool=tool, answer=accuracy, format=1.0, correct=correct)


class Setting:
    """A policy on its mesh, with everything that either way of running an iteration takes.

    `numbers`: which of the prompts are this process's.
    """

    def __init__(
        self,
        policy: Policy,
        toolbox: Any,
        *,
        numbers: Sequence[int] = range(PROMPTS),
        agent: AgentConfig = AGENT,
        train: RLTrainConfig = TRAIN,
        **rollout: Any,
    ):
        self.policy = policy
        self.numbers = numbers
        self.train = train
        self.replays = {"experts": rollout.get("replay_experts", False)}
        self.sampler = Sampler(
            policy.model,
            policy.processor,
            toolbox,
            mesh=policy.mesh,
            agent=agent,
            rollout=replace(ROLLOUT, **rollout),
            seed=3,
        )
        optimizer = optax.adamw(1e-4)
        self.shardings = state_shardings(abstract_state(policy.params, optimizer))
        self.update = make_update(
            policy.graphdef,
            optimizer,
            AlgorithmConfig(),
            temperature=1.0,
            forbidden=policy.processor.forbidden,
            shardings=self.shardings,
        )
        self.optimizer = optimizer

    def state(self) -> TrainState:
        with jax.set_mesh(self.policy.mesh):
            return init_state(jax.tree.map(lambda leaf: leaf.copy(), self.policy.params), self.optimizer)

    def batch(self, trajectories: Sequence[Trajectory], pack: RowBatcher):
        return assemble(trajectories, [judge(one) for one in trajectories], pack, MINI_BATCHES)

    def rollout(self, prompts, step, **more: Any):
        mine = [prompts[number] for number in self.numbers]
        return self.sampler.rollout(mine, samples=SAMPLES, step=step, numbers=self.numbers, **more)

    def sample(self, params, prompts, step, **more: Any):
        mine = [prompts[number] for number in self.numbers]
        return self.sampler.sample(params, mine, samples=SAMPLES, step=step, numbers=self.numbers, **more)

    def fused(self):
        pack = RowBatcher(self.train, self.policy.model.config, fixed=True, **self.replays)
        return make_iterate(
            self.sampler.programs,
            self.update,
            lambda trajectories: self.batch(trajectories, pack),
            mesh=self.policy.mesh,
            nothing=self.sampler.empty_round,
            no_batch=empty_batch(pack, MINI_BATCHES, len(self.numbers), SAMPLES),
            shardings=self.shardings,
        )


def host_driven(setting: Setting, prompts, steps: int):
    state, found = setting.state(), []
    pack = RowBatcher(setting.train, setting.policy.model.config, **setting.replays)
    for step in range(steps):
        trajectories = setting.sample(state.params, prompts, step)
        found += trajectories
        batch = joined(setting.batch(trajectories, pack))
        with jax.set_mesh(setting.policy.mesh):
            batch = batch._replace(rows=shard_batch(batch.rows, setting.policy.mesh, axis=2))
            state, metrics = setting.update(state, batch)
    return state, found, jax.device_get(metrics)


def fused(setting: Setting, prompts, steps: int):
    iterate, state, found = setting.fused(), setting.state(), []
    for step in range(steps):
        rollout = setting.rollout(prompts, step)
        try:
            state, metrics = iterate(state, rollout)
        finally:
            rollout.close()
        found += rollout.trajectories
    return state, found, jax.device_get(metrics)
