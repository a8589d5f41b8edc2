"""Two processes with two devices each, in lock-step, against one process with four."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.processes import run_job
from tests.rollout.chatty import chatty_policy
from tests.rollout.iterations import PROMPTS, SAMPLES, Setting, host_driven
from tests.rollout.process_worker import CALL_SECONDS
from tests.rollout.test_agent import Camera, assert_same
from tests.updates import assert_learned_the_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("process_worker.py")


@pytest.fixture(scope="module")
def alone(task) -> tuple[Any, ...]:
    return host_driven(Setting(chatty_policy(task, devices=4), Camera(), slots=8), task.prompts[:PROMPTS], steps=1)


@pytest.fixture(scope="module")
def seen(task, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two saw."""
    directory = tmp_path_factory.mktemp("job")
    shutil.copytree(task.checkpoint, directory / "model")
    (directory / "prompts").write_bytes(pickle.dumps(task.prompts))
    for status, _, errors in run_job([str(WORKER), str(directory)], seconds=800):
        assert status == 0, errors[-4000:]
    return [pickle.loads((directory / f"seen_{process}").read_bytes()) for process in range(2)]


@pytest.mark.parametrize("way", ["host_driven", "fused"])
def test_two_processes_learn_what_one_does(policy, alone, seen, way):
    """Each mini-batch is shared: had each process a half of the batch, one would idle in every mini-batch."""
    assert [one["numbers"] for one in seen] == [[0, 2], [1, 3]]
    state, expected, metrics = alone
    assert sum(one.calls for one in expected) > 10
    found = [trajectory for one in seen for trajectory in one[way][1]]
    assert_same(sorted(found, key=lambda one: (one.group, one.sample)), expected)
    for params, _, measured in (one[way] for one in seen):
        assert_learned_the_same(params, jax.tree.leaves(state.params), jax.tree.leaves(policy.params))
        assert measured.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(measured[name], value, atol=1e-4, err_msg=name)


def test_the_engine_is_measured_over_all(seen):
    (first, total), (second, again) = (one["stats"] for one in seen)
    assert total == again
    assert total.sampled_tokens == first.sampled_tokens + second.sampled_tokens
    # A process that has nothing to decode stands idle while the other does: its slots count.
    assert total.decode_steps == first.decode_steps == second.decode_steps
    assert total.slot_steps == 8 * total.decode_steps


def test_a_tool_in_trouble_stops_neither_process(alone, seen):
    healthy, troubled = (one["troubled"] for one in seen)
    _, expected, _ = alone
    assert_same(healthy, [one for one in expected if one.group in (0, 2)])
    assert len(troubled) == PROMPTS // 2 * SAMPLES
    said = " ".join(turn.text for one in troubled for turn in one.turns if turn.role == "tool")
    assert said.count(f"did not answer within {CALL_SECONDS:g} s") == 1
    assert said.count("RuntimeError: the disk is full") == 1
    assert "call 1" in said


def test_what_fails_in_one_process_ends_both_and_says_why(seen):
    other, itself = seen
    for name in ("failed", "fused failed"):
        assert itself[name] == "KeyboardInterrupt('enough')"
        assert other[name] == "OtherProcessFailed('process 1 gave up: KeyboardInterrupt: enough')"


def test_rows_in_two_processes_are_refused(seen):
    for one in seen:
        assert one["refused"] == [
            said
            for sizes in ("'tensor': 4, 'context': 1", "'tensor': 1, 'context': 4")
            for said in (
                f"mesh {{'data': 1, 'fsdp': 1, {sizes}}} over 2 processes: expected as many parts of data x fsdp "
                "in each process, none in two; mesh.tensor x mesh.context has to divide a process's devices",
                f"mesh {{'data': 1, 'fsdp': 1, {sizes}}} has rows on devices of two of the 2 processes: expected "
                "mesh.tensor x mesh.context to divide a process's devices",
            )
        ]
