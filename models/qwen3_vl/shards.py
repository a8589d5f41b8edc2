"""Tensors to safetensors files of bounded size, shared out among the processes of a job."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from models.qwen3_vl.stored import INDEX
from sharding.multihost import is_lead, together

MakeTensor = Callable[[str, bool], np.ndarray | None]
"""(name, whether it is written here) -> the tensor where it is; entered by all processes in the same order."""


def write_files(directory: Path, sizes: Mapping[str, int], tensor: MakeTensor, max_bytes: int) -> None:
    """model.safetensors, or numbered files and their index where one file would be larger than `max_bytes`.

    `sizes`: bytes of every tensor by name, in the order of the files. Processes write a file each, at a time, into the
    one `directory` that all see; none holds tensors of more than its file.
    """
    shards = list(_shards(sizes, max_bytes))
    count = len(shards)
    numbered = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = numbered if count > 1 else ["model.safetensors"]
    processes, me = jax.process_count(), jax.process_index()
    for first in range(0, count, processes):
        mine = {}
        for writer, names in enumerate(shards[first : first + processes]):
            for name in names:
                value = tensor(name, writer == me)
                if value is not None:
                    mine[name] = value
        with together():
            if mine:
                save_file(mine, directory / files[first + me], metadata={"format": "pt"})
    with together():
        if is_lead() and count > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[Sequence[str]]:
    """The names of each file's tensors; a tensor larger than `max_bytes` has a file of its own."""
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def on_host(array: jax.Array, index: tuple[int, ...], dtype: np.dtype, wanted: bool) -> np.ndarray | None:
    """`array[index]` as `dtype` in host memory; None where it is not `wanted`, though all processes must ask for it.

    Parts that several processes hold meet on the devices: what is not wanted never comes to the host.
    """
    if array.is_fully_addressable:
        return np.asarray(array[index]).astype(dtype) if wanted else None
    assert isinstance(array.sharding, NamedSharding)
    # All wait, also those that want nothing: else they run ahead, a device holds many tensors that are whole, and on
    # a CPU the gathers of several tensors lock each other out.
    whole = jax.block_until_ready(_gather(array.sharding.mesh, dtype)(array, index))
    return np.asarray(whole.addressable_data(0)) if wanted else None


@cache
def _gather(mesh: Mesh, dtype: np.dtype) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    everywhere = NamedSharding(mesh, P())
    return jax.jit(lambda array, index: array[index].astype(dtype), out_shardings=everywhere)
