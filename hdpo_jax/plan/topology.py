"""TPU slices that are not there: their chips' limits, and devices to compile for."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hdpo_jax.config import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip's limits, as its maker publishes them."""

    hbm_bytes: int
    flops: float
    """Dense bf16 operations a second."""
    hbm_bandwidth: float
    """Bytes a second."""
    links: float
    """Bytes a second that a chip sends to its neighbours, over all links of one direction."""
    devices: int = 1
    """JAX devices a chip."""


# docs.cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x.
CHIPS = {
    "v5e": Chip(hbm_bytes=16 * GIB, flops=197e12, hbm_bandwidth=819e9, links=200e9),
    "v5p": Chip(hbm_bytes=95 * GIB, flops=459e12, hbm_bandwidth=2_765e9, links=600e9),
    "v6e": Chip(hbm_bytes=32 * GIB, flops=918e12, hbm_bandwidth=1_640e9, links=448e9),
    "tpu7x": Chip(hbm_bytes=192 * GIB, flops=2_307e12, hbm_bandwidth=7_380e9, links=600e9, devices=2),
}


@dataclass(frozen=True)
class Topology:
    """A slice by name, as in v5p:4x4x4."""

    name: str

    def __post_init__(self) -> None:
        kind, _, shape = self.name.partition(":")
        sizes = shape.split("x")
        if kind not in CHIPS or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            known = ", ".join(CHIPS)
            raise ConfigError(f"topology is {self.name!r}; expected a chip of {known} and its shape, as in v5p:4x4x4")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def chips(self) -> int:
        count = 1
        for size in self.name.partition(":")[2].split("x"):
            count *= int(size)
        return count

    def devices(self) -> Sequence[Any]:
        """Devices that programs can be compiled for, and not be run on. Raises ConfigError without the compiler."""
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError("the TPU compiler is not installed; expected libtpu: pip install 'hdpo-jax[tpu]'")
        from jax.experimental import topologies

        with _no_tpu_here():
            try:
                return topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices
            except Exception as error:
                gist = str(error).splitlines()[0]
                raise ConfigError(f"topology {self.name!r} is not one that the compiler knows: {gist}") from error


@contextlib.contextmanager
def _no_tpu_here() -> Iterator[None]:
    """The compiler is not to ask a metadata server what machine this is, nor to say that none answers."""
    answers = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    before = {name: os.environ.get(name) for name in answers}
    os.environ.update(answers)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
