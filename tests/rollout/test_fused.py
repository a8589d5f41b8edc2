"""The whole iteration in one program gives what the host-driven one gives: trajectories, rewards, parameters."""

import itertools
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from hdpo_jax.rollout.fused import IterationFailed
from tests.rollout.chatty import AGENT, chatty_policy
from tests.rollout.iterations import PROMPTS, TRAIN, Setting, fused, host_driven
from tests.rollout.test_agent import Camera, assert_same, fail, hang, nonsense
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


class Unreliable(Camera):
    """Raises, answers nonsense, answers and hangs, in turn."""

    def session(self, images, keys=()):
        session: Any = super().session(images)
        answer, turn = session.call, itertools.count()

        def call(asked):
            return (fail, nonsense, answer, hang)[next(turn) % 4](asked)

        session.call = call
        return session


def test_tools_that_raise_hang_and_answer_nonsense_neither_kill_nor_hang_the_program(task, policy):
    agent = replace(AGENT, call_seconds=0.3, max_calls=5, max_response_tokens=400, max_observation_tokens=100)
    train = replace(TRAIN, row_tokens=2_000)
    settings = {"agent": agent, "train": train, "slots": 8, "capacity": 480, "page": 32, "shapes": ((8, 64, 64),)}
    trajectories = []
    for way in (host_driven, fused):
        _, found, _ = way(Setting(policy, Unreliable(), **settings), task.prompts[:PROMPTS], steps=1)
        trajectories.append(found)
    expected, found = trajectories
    said = [turn.text for one in expected for turn in one.turns if turn.role == "tool"]
    for words in ("RuntimeError: out of order", "did not answer within 0.3 s", "AttributeError"):
        assert any(words in text for text in said)
    assert all(one.usable for one in expected)
    assert_same(found, expected, tolerance=1e-4)


@pytest.fixture
def interruptible():
    """As in a terminal: a shell has what it runs in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_program_and_its_sessions(task):
    """Ctrl-C while it runs on two devices and waits for its tools: nothing asks a closed rollout for more."""
    interrupted, main_thread = threading.Event(), threading.get_ident()

    class Interrupting(Camera):
        def session(self, images, keys=()):
            session: Any = super().session(images)
            answer = session.call

            def call(asked):
                if not interrupted.is_set():
                    interrupted.set()
                    signal.pthread_kill(main_thread, signal.SIGINT)  # as the terminal does
                time.sleep(0.1)
                return answer(asked)

            session.call = call
            return session

    toolbox = Interrupting()
    setting = Setting(chatty_policy(task, devices=2), toolbox, slots=8)
    rollout = setting.rollout(task.prompts[:PROMPTS], step=0)
    with pytest.raises((KeyboardInterrupt, IterationFailed)) as failed:
        setting.fused()(setting.state(), rollout)
    rollout.close()
    assert isinstance(failed.value, KeyboardInterrupt) or isinstance(failed.value.__cause__, KeyboardInterrupt)
    assert interrupted.is_set() and toolbox.open == 0


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
