"""The whole iteration in one program gives what the host-driven one gives: trajectories, rewards, parameters."""

import jax
import numpy as np
import pytest

from hdpo_jax.rollout.fused import IterationFailed
from tests.rollout.chatty import chatty_policy
from tests.rollout.iterations import PROMPTS, Setting, fused, host_driven
from tests.rollout.test_agent import Camera, assert_same
from tests.updates import assert_learned_the_same


@pytest.fixture(scope="module")
def reference(task, policy):
    return host_driven(Setting(policy, Camera()), task.prompts[:PROMPTS], steps=2)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_program_is_the_host_driven_iteration(task, reference, devices):
    """Two steps with tools, images and two mini-batches: the second starts from what the first has learned."""
    policy = chatty_policy(task, devices=devices)
    state, found, metrics = fused(Setting(policy, Camera(), slots=8), task.prompts[:PROMPTS], steps=2)
    expected_state, expected, expected_metrics = reference
    assert sum(one.calls for one in expected) > 10 and any(len(one.images) > 1 for one in expected)
    assert_same(found, expected, tolerance=1e-4)  # eight devices add up gradients in another order
    assert int(state.step) == int(expected_state.step)
    assert_learned_the_same(*map(jax.tree.leaves, (state.params, expected_state.params, policy.params)))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-4, err_msg=name)


def test_what_fails_on_the_host_comes_out_and_no_step_is_taken(task, policy):
    setting = Setting(policy, Camera())
    iterate = setting.fused()
    state = setting.state()
    before = jax.device_get(state)

    def interrupt(trajectory):
        raise KeyboardInterrupt

    rollout = setting.rollout(task.prompts[:PROMPTS], step=0, on_finished=interrupt)
    with pytest.raises(IterationFailed) as failed:
        iterate(state, rollout)
    rollout.close()
    assert isinstance(failed.value.__cause__, KeyboardInterrupt)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(failed.value.state), before)


def test_the_cache_is_written_in_place(policy):
    """Conditions and loops around the programs do not copy it."""
    setting = Setting(policy, Camera(), pages=20_000)
    iterate = setting.fused()
    with jax.set_mesh(policy.mesh):
        memory = iterate.lower(setting.state()).compile().memory_analysis()
        size = sum(array.nbytes for array in setting.sampler.programs.empty_cache())
    # What the update takes besides it is there when the cache no longer is.
    assert memory is not None and size <= memory.temp_size_in_bytes < 1.1 * size
