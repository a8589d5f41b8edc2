"""A model's files between one process and four: each reads, holds and writes its share, and every bit is the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hdpo_jax.algorithm.state import TrainState, init_state
from hdpo_jax.data.pipeline import joined
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.train.checkpoint import Checkpointer
from models.qwen3_vl import load_hf, save_hf
from sharding import make_mesh
from tests.processes import run_job
from tests.train.host_worker import OPTIMIZER, restored, save

pytestmark = pytest.mark.slow

FILE_BYTES = 600_000


@pytest.fixture(scope="module")
def original(task, tmp_path_factory) -> tuple[Path, TrainState]:
    """A folder with a model, and a state with moments that differ from it; saved by one process."""
    directory = tmp_path_factory.mktemp("hosts")
    shutil.copytree(task.model, directory / "model")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    state = init_state(nnx.split(load_hf(directory / "model", mesh, param_dtype=jnp.float32))[1], OPTIMIZER)
    moments = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim else leaf + 3, state.opt_state)
    state = state._replace(opt_state=moments)
    save(state, directory / "by_one" / "checkpoints", directory / "model", 0)
    return directory, state


@pytest.fixture(scope="module")
def seen(original) -> list[dict[str, Any]]:
    directory, _ = original
    command = ["-m", "tests.train.host_worker", str(directory), str(FILE_BYTES)]
    outcomes = run_job(command, processes=4, devices=2)
    for status, _, errors in outcomes:
        assert status == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in outcomes]


def test_each_process_reads_what_its_devices_hold(original, seen):
    """Had each read the whole model, it would be eight times as much for each of its two devices."""
    directory, _ = original
    whole = (directory / "model" / "model.safetensors").stat().st_size
    for one in seen:
        assert one["read"] < 0.3 * whole


def test_an_export_holds_a_file_at_a_time_and_is_that_of_one_process(original, seen):
    directory, _ = original
    tensors = load_file(directory / "model" / "model.safetensors")
    largest = max(FILE_BYTES, *(tensor.nbytes for tensor in tensors.values()))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert largest < total / 2
    gathered = [held for one in seen for held, _ in one["files"]]
    assert sum(gathered) == total and max(gathered) <= largest
    assert all(held == written for one in seen for held, written in one["files"])
    assert all(one["files"] and one["left"] == 0 for one in seen)  # all take part, none gathers what it does not write

    mesh = make_mesh({"fsdp": 8})
    save_hf(
        load_hf(directory / "model", mesh, param_dtype=jnp.float32),
        directory / "one",
        base=directory / "model",
        max_shard_bytes=FILE_BYTES,
    )
    files = sorted(file.name for file in (directory / "one").iterdir())
    assert files == sorted(file.name for file in (directory / "four").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 4
    for name in files:
        assert (directory / "one" / name).read_bytes() == (directory / "four" / name).read_bytes(), name


def test_a_state_goes_from_one_process_to_four_and_back_onto_another_mesh(original, seen):
    """Parameters and moments, from data 2 x fsdp 2 x tensor 2 to fsdp 8 and back; each held a quarter on the way."""
    directory, state = original
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    back = restored(directory / "by_four" / "checkpoints", mesh, directory / "model")
    leaves, expected = jax.tree.leaves(back), jax.tree.leaves(state)
    assert len(leaves) == len(expected)
    for found, wanted in zip(leaves, expected, strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    export_hf(directory / "by_one", directory / "by_one" / "hf")
    file = Path("hf") / "model.safetensors"
    assert (directory / "by_one" / file).read_bytes() == (directory / "by_four" / file).read_bytes()
    whole = sum(leaf.nbytes for leaf in expected)
    assert all(one["held"] < 0.3 * whole for one in seen)


def test_the_place_in_the_data_is_one_for_all_that_saved_it(original, seen):
    directory, state = original
    checkpoints = Checkpointer(directory / "by_four" / "checkpoints", keep=1, every=1)
    found = checkpoints.restore_latest(state)
    checkpoints.close()
    assert found is not None
    assert joined(found[2]) == {"batches": 3, "bad": [["a", number, "torn"] for number in range(4)]}
