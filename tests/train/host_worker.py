"""One of the four processes that test_host_files.py starts: reads and writes a model's files on the mesh of all."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hdpo_jax.algorithm.state import TrainState, abstract_state
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.train.checkpoint import Checkpointer
from models.qwen3_vl import huggingface, load_hf, save_hf, shards
from sharding import make_mesh
from sharding.watch import job

OPTIMIZER = optax.adamw(1e-3)


class Meter:
    """What comes through the functions that read tensors, gather them, and write a file of them; in bytes."""

    def __init__(self):
        self.read, self.gathered, self.files = 0, 0, []
        read, gather, save = huggingface._read_shard, huggingface.on_host, shards.save_file

        def reading(*arguments: Any) -> Any:
            found = read(*arguments)
            self.read += found.nbytes
            return found

        def gathering(*arguments: Any) -> Any:
            found = gather(*arguments)
            self.gathered += 0 if found is None else found.nbytes
            return found

        def saving(tensors: Any, *arguments: Any, **more: Any) -> None:
            self.files.append((self.gathered, sum(tensor.nbytes for tensor in tensors.values())))
            self.gathered = 0
            save(tensors, *arguments, **more)

        huggingface._read_shard, huggingface.on_host, shards.save_file = reading, gathering, saving


def restored(directory: Path, mesh: jax.sharding.Mesh, model: Path) -> TrainState:
    """The newest state in `directory`, laid out on `mesh` as the parameters of `model` are."""
    params = nnx.split(load_hf(model, mesh, param_dtype=jnp.float32))[1]
    checkpoints = Checkpointer(directory, keep=1, every=1)
    found = checkpoints.restore_latest(abstract_state(params, OPTIMIZER))
    checkpoints.close()
    assert found is not None
    return found[1]


def save(state: TrainState, directory: Path, model: Path, place: int) -> None:
    """A checkpoint of a run that started from `model`, by a process that found the row `place` torn."""
    checkpoints = Checkpointer(directory, keep=1, every=1)
    checkpoints.keep_base(model)
    metadata = {"config": {"model": {"param_dtype": "float32"}}}
    checkpoints.save(1, state, {"batches": 3, "bad": [["a", place, "torn"]]}, metadata)
    checkpoints.close()


def main(directory: Path, max_shard_bytes: int) -> None:
    with job():
        mesh, me, meter = make_mesh({"fsdp": 8}), jax.process_index(), Meter()
        base = directory / "model"
        model = load_hf(base, mesh, param_dtype=jnp.float32)
        seen: dict[str, Any] = {"read": meter.read}
        save_hf(model, directory / "four", base=base, max_shard_bytes=max_shard_bytes)
        seen |= {"files": list(meter.files), "left": meter.gathered}
        state = restored(directory / "by_one" / "checkpoints", mesh, base)
        seen["held"] = sum(part.data.nbytes for leaf in jax.tree.leaves(state) for part in leaf.addressable_shards)
        save(state, directory / "by_four" / "checkpoints", base, me)
        export_hf(directory / "by_four", directory / "by_four" / "hf")
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
