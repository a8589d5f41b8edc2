"""Several processes, one program: start-up, agreement, host-local data. Everything works with one process too."""

import contextlib
import glob
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")


class OtherProcessFailed(RuntimeError):
    """Another process of the job gave up; the message is what it said."""


def start() -> None:
    """Joins the other processes of the job, before anything else asks JAX for devices; does nothing when alone.

    Told by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by JAX itself on a TPU
    pod (TPU VM or GKE), under SLURM and under Open MPI. Raises ValueError when the variables are incomplete.
    """
    if jax.distributed.is_initialized():
        return
    # It would take SIGTERM from a process for good; a run has a way of its own to stop and save (`StopSignal`).
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=_integer("JAX_NUM_PROCESSES"),
            process_id=_integer("JAX_PROCESS_ID"),
        )
    elif _several_processes(os.environ):
        jax.distributed.initialize()


def _integer(name: str) -> int | None:
    """A variable that a scheduler may know better: None leaves it to JAX where one is there."""
    text = os.environ.get(name)
    if text is None and _several_processes(os.environ):
        return None
    if text is None or not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; expected a number beside JAX_COORDINATOR_ADDRESS")
    return int(text)


def _several_processes(environment: Mapping[str, str]) -> bool:
    """Whether the surroundings look like a job of several processes that JAX can find by itself."""
    if environment.get("JAX_PLATFORMS") != "cpu":
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
        if "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
            return True
        # A TPU VM names its peers in the metadata server only; one host alone starts as a job of one process.
        on_tpu_vm = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
        if on_tpu_vm and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environment:
            return True
    slurm = "SLURM_LOCALID" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    return slurm or environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"


def is_lead() -> bool:
    """Whether this process writes what is written once: logs, reports, metrics."""
    return jax.process_index() == 0


def agree(value: np.ndarray) -> np.ndarray:
    """Every process's `value`, stacked: [processes, *value.shape]. Same shape and dtype everywhere, and small.

    A host never decides alone what runs next: it acts on what all of them said.
    """
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    # As bytes: JAX would narrow 64-bit values on the way.
    gathered = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(gathered).tobytes(), value.dtype).reshape(-1, *value.shape)


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in the order of the processes. JSON, of any size; all of it goes to every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = agree(np.array(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row[:length].tobytes()) for row, length in zip(agree(padded), lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails inside in one process fails in all of them. Inside, no process may wait for another."""
    error = None
    try:
        yield
    except BaseException as caught:
        error = caught
    if agree(np.array(error is not None)).any():
        give_up(error)


def give_up(error: BaseException | None) -> NoReturn:
    """Called by every process once all know that one failed: raises its own `error`, or OtherProcessFailed."""
    messages = gather("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    number = next(number for number, message in enumerate(messages) if message)
    raise OtherProcessFailed(f"process {number} gave up: {messages[number]}")


def barrier(name: str) -> None:
    """Waits until every process is here; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def host_local_to_global(tree: Tree, mesh: Mesh, layout: P) -> Tree:
    """Each process's part -> global arrays laid out as `layout`; every split dimension grows by the processes' parts.

    Processes whose devices hold the same part (split over no host) must pass the same values.
    """
    sharding = NamedSharding(mesh, layout)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of `array` (first dimension) that this process's devices hold, in order; all of them when alone.

    The inverse of `shard_batch`. Raises ValueError when another dimension is split.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {}
    for shard in array.addressable_shards:
        if shard.data.shape[1:] != array.shape[1:]:
            raise ValueError(f"array of shape {array.shape} is laid out as {array.sharding}; expected rows split only")
        parts[shard.index[0].start or 0] = shard.data
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
