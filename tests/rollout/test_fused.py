"""The whole iteration in one program gives what the host-driven one gives: trajectories, rewards, parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from hdpo_jax.algorithm.state import abstract_state, init_state, state_shardings
from hdpo_jax.algorithm.update import make_update
from hdpo_jax.config import AlgorithmConfig, RLTrainConfig
from hdpo_jax.rewards import Verdict
from hdpo_jax.rollout.fused import IterationFailed, make_iterate
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.iteration import assemble, empty_batch
from hdpo_jax.train.policy import Policy
from hdpo_jax.types import Trajectory
from sharding.rules import shard_batch
from tests.rollout.chatty import AGENT, ROLLOUT, chatty_policy
from tests.rollout.test_agent import Camera, assert_same

PROMPTS, SAMPLES = 4, 4
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
    """A policy on its mesh, with everything that either way of running an iteration takes."""

    def __init__(self, policy: Policy, toolbox: Any, **rollout: Any):
        self.policy = policy
        self.sampler = Sampler(
            policy.model,
            policy.processor,
            toolbox,
            mesh=policy.mesh,
            agent=AGENT,
            rollout=replace(ROLLOUT, **rollout),
            seed=3,
        )
        optimizer = optax.adamw(1e-3)
        self.shardings = state_shardings(abstract_state(policy.params, optimizer))
        self.update = make_update(
            policy.graphdef,
            optimizer,
            AlgorithmConfig(),
            temperature=1.0,
            forbidden=policy.processor.forbidden,
            shardings=self.shardings,
        )
        self.pack = RowBatcher(TRAIN, policy.model.config)
        with jax.set_mesh(policy.mesh):
            self.state = init_state(jax.tree.map(lambda leaf: leaf.copy(), policy.params), optimizer)

    def assemble(self, trajectories: Sequence[Trajectory]):
        return assemble(trajectories, [judge(one) for one in trajectories], self.pack, 2)

    def rollout(self, prompts, step):
        return self.sampler.rollout(prompts, samples=SAMPLES, step=step)

    def fused(self):
        return make_iterate(
            self.sampler.programs,
            self.update,
            self.assemble,
            mesh=self.policy.mesh,
            nothing=self.sampler.empty_round,
            no_batch=empty_batch(self.pack, 2, PROMPTS, SAMPLES),
            shardings=self.shardings,
        )


def host_driven(setting: Setting, prompts, steps: int):
    state, found = setting.state, []
    for step in range(steps):
        found += setting.sampler.sample(state.params, prompts, samples=SAMPLES, step=step)
        batch = setting.assemble(found[-PROMPTS * SAMPLES :])
        with jax.set_mesh(setting.policy.mesh):
            batch = batch._replace(rows=shard_batch(batch.rows, setting.policy.mesh, axis=2))
            state, metrics = setting.update(state, batch)
    return state, found, jax.device_get(metrics)


def fused(setting: Setting, prompts, steps: int):
    iterate, state, found = setting.fused(), setting.state, []
    for step in range(steps):
        rollout = setting.rollout(prompts, step)
        try:
            state, metrics = iterate(state, rollout)
        finally:
            rollout.close()
        found += rollout.trajectories
    return state, found, jax.device_get(metrics)


@pytest.fixture(scope="module")
def reference(task, policy):
    return host_driven(Setting(policy, Camera()), task.prompts[:PROMPTS], steps=2)


def assert_same_states(ours, theirs):
    assert int(ours.step) == int(theirs.step)
    for found, expected in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_program_is_the_host_driven_iteration(task, reference, devices):
    """Two steps with tools, images and two mini-batches: the second starts from what the first has learned."""
    policy = chatty_policy(task, devices=devices)
    state, found, metrics = fused(Setting(policy, Camera(), slots=8), task.prompts[:PROMPTS], steps=2)
    expected_state, expected, expected_metrics = reference
    assert sum(one.calls for one in expected) > 10 and any(len(one.images) > 1 for one in expected)
    assert_same(found, expected, tolerance=1e-4)  # eight devices add up gradients in another order
    assert_same_states(state, expected_state)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-4, err_msg=name)
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(policy.params), strict=True)
    learned = [np.abs(new - old).max() for new, old in leaves]
    assert max(learned) > 1e-3


def test_what_fails_on_the_host_comes_out_and_no_step_is_taken(task, policy):
    setting = Setting(policy, Camera())
    iterate = setting.fused()
    before = jax.device_get(setting.state)

    def interrupt(trajectory):
        raise KeyboardInterrupt

    rollout = setting.sampler.rollout(task.prompts[:PROMPTS], samples=SAMPLES, step=0, on_finished=interrupt)
    with pytest.raises(IterationFailed) as failed:
        iterate(setting.state, rollout)
    rollout.close()
    assert isinstance(failed.value.__cause__, KeyboardInterrupt)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(failed.value.state), before)


def test_the_cache_is_written_in_place(policy):
    """Conditions and loops around the programs do not copy it."""
    setting = Setting(policy, Camera(), pages=20_000)
    iterate = setting.fused()
    with jax.set_mesh(policy.mesh):
        memory = iterate.lower(setting.state).compile().memory_analysis()
        size = sum(array.nbytes for array in setting.sampler.programs.empty_cache())
    # What the update takes besides it is there when the cache no longer is.
    assert memory is not None and size <= memory.temp_size_in_bytes < 1.1 * size
