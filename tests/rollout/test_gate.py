"""The confidence gate: which calls are sent, what becomes of the others, and how it is calibrated."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hdpo_jax.config import ConfigError, RLConfig
from hdpo_jax.rollout.gate import Gate, Paired
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.types import StopReason
from tests.rollout.chatty import AGENT, ROLLOUT, chatty_policy
from tests.rollout.test_agent import Camera, assert_same


@pytest.fixture(scope="module")
def caller(task):
    """A policy that begins calls, ends them, and answers."""
    policy = chatty_policy(task)
    processor = policy.processor
    forbidden = np.ones_like(processor.forbidden)
    forbidden[[*processor.encode_text("<tool_call>AB"), *processor.tool_call_end, processor.stop_ids[0]]] = False
    processor.forbidden = forbidden
    return policy


def sample(policy, task, gate=None, **rollout):
    toolbox: Any = Camera()
    sampler = Sampler(
        policy.model,
        policy.processor,
        toolbox,
        mesh=policy.mesh,
        agent=AGENT,
        rollout=replace(ROLLOUT, **rollout),
        seed=3,
        gate=gate,
    )
    return sampler.sample(policy.params, task.prompts[:5], samples=3, step=5)


@pytest.fixture(scope="module")
def ungated(caller, task):
    return sample(caller, task)


def starts(policy, trajectory) -> list[int]:
    (start,) = policy.processor.encode_text("<tool_call>").tolist()
    sampled = np.flatnonzero(trajectory.sampled & (trajectory.token_ids == start))
    return sampled.tolist()


def test_the_probability_of_each_call_is_that_of_its_beginning(caller, ungated):
    for one in ungated:
        known = [math.exp(one.logprobs[place]) for place in starts(caller, one)]
        assert all(any(p == pytest.approx(other, abs=1e-5) for other in known) for p in one.call_probabilities)
    assert sum(len(one.call_probabilities) for one in ungated) > 2


def test_an_open_gate_changes_nothing(caller, task, ungated):
    everything = Gate(probabilities=(0.0,), worths=(1.0,), threshold=0.5)
    assert_same(sample(caller, task, everything), ungated, tolerance=0)


def test_a_closed_gate_sends_no_call_that_was_begun_and_writes_an_answer_where_it_began(caller, task, ungated):
    """What came before the first call is the same, token for token: the two can be compared pair by pair."""
    gated = sample(caller, task, Gate.closed())
    answer = caller.processor.encode_text("<answer>").tolist()
    compared = 0
    for before, after in zip(ungated, gated, strict=True):
        assert after.calls <= before.calls
        if not (before.call_probabilities and starts(caller, before)):
            continue
        assert after.call_probabilities[0] == pytest.approx(before.call_probabilities[0])
        differs = np.flatnonzero(before.token_ids[: len(after.token_ids)] != after.token_ids[: len(before.token_ids)])
        place = int(differs[0])
        if place not in starts(caller, before):
            continue  # a call that was never begun was sent first: no gate knows of it
        compared += 1
        assert after.token_ids[place : place + len(answer)].tolist() == answer
        assert not after.sampled[place : place + len(answer)].any()
        assert (after.logprobs[~after.sampled] == 0).all()
    assert compared > 1


def test_scheduling_does_not_change_what_a_gate_does(caller, task):
    expected = sample(caller, task, Gate.closed())
    assert_same(sample(caller, task, Gate.closed(), slots=2, in_flight=2, chunk=3), expected)
    assert_same(sample(caller, task, Gate.closed(), pages=ROLLOUT.pages_a_row + 1), expected)


def test_who_goes_on_calling_in_an_answer_is_ended(caller, task):
    ends = [one for one in sample(caller, task, Gate.closed()) if len(one.call_probabilities) > 1]
    assert ends and all(one.stop is StopReason.CALL_LIMIT for one in ends if one.calls == 0)


def test_the_fit_is_isotonic_regression():
    """By hand: 0, 1 | 0, 1 pools the middle two to a half; a mere sort by p would give 0, 1, 0, 1."""
    gate = Gate.fit([0.4, 0.1, 0.3, 0.2], [True, False, False, True])
    assert [gate.worth(p) for p in (0.1, 0.2, 0.3, 0.4)] == [0.0, 0.5, 0.5, 1.0]
    assert gate.worth(0.35) == pytest.approx(0.75) and gate.worth(0.0) == 0.0 and gate.worth(1.0) == 1.0
    assert Gate.fit([0.5, 0.5, 0.5], [True, False, False]).worth(0.5) == pytest.approx(1 / 3)
    assert Gate.fit([0.1, 0.9], [True, False]).worth(0.1) == 0.5  # falling: one level


def test_the_curve_of_the_dial():
    paired = Paired(
        probability=np.array([0.9, 0.8, 0.2, np.nan]),
        called=np.array([True, True, True, False]),
        right=np.array([True, True, True, True]),
        right_without=np.array([False, False, True, False]),
    )
    gate = paired.gate()
    assert [gate.worth(p) for p in (0.2, 0.8, 0.9)] == [0.0, 1.0, 1.0]
    # All calls; those that are worth it; none. The last rollout called nothing: its answer stands.
    assert paired.curve(gate) == [(0.0, 0.75, 1.0), (1.0, 0.5, 1.0), (pytest.approx(1.0), 0.0, 0.5)]


def test_files(tmp_path, caller):
    gate = Gate.fit([0.2, 0.4], [False, True], threshold=0.3)
    gate.save(tmp_path / "gate.json")
    assert Gate.of(replace(AGENT, gate=str(tmp_path / "gate.json"), gate_threshold=0.3)) == gate
    assert Gate.of(AGENT) is None
    for content in ("", "{}", json.dumps({"p": [1], "worth": []}), json.dumps({"p": [], "worth": []})):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(ConfigError, match="calibrate-gate"):
            Gate.of(replace(AGENT, gate=str(tmp_path / "broken.json")))
    with pytest.raises(ConfigError, match="No such file"):
        Gate.of(replace(AGENT, gate=str(tmp_path / "absent.json")))


def test_training_knows_no_gate(tmp_path):
    from hdpo_jax.config_files import load_config

    config = load_config("metis_8b", RLConfig)
    with pytest.raises(ConfigError, match=r"agent.gate is 'x'; expected none while training"):
        replace(config, agent=replace(AGENT, gate="x"))
