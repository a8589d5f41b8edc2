"""The device mesh: three named axes over every chip of every host."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """Sizes of the mesh axes; one of them may be -1: all the devices that are left."""

    data: int = 1
    """Copies of the parameters, each with its own rows."""
    fsdp: int = -1
    """Parameters are split here and gathered when used; rows are split too."""
    tensor: int = 1
    """Heads, hidden units and vocabulary are split here; rows are not."""


AXES = tuple(field.name for field in dataclasses.fields(MeshAxes))


def make_mesh(axes: MeshAxes | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes ("data", "fsdp", "tensor") over `devices`, all of them when None.

    The axis types are Auto: the compiler propagates shardings from the arguments and from `constrain`.
    Raises ValueError, one line, when the sizes do not multiply to the number of devices.
    """
    sizes = _sizes(axes)
    devices = jax.devices() if devices is None else devices
    shape = _fill(sizes, len(devices))
    # jax.make_mesh, not a reshape: on a TPU it follows the torus, so that neighbours on an axis are linked chips.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _sizes(axes: MeshAxes | Mapping[str, int]) -> Mapping[str, int]:
    if isinstance(axes, MeshAxes):
        return dataclasses.asdict(axes)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; expected some of {', '.join(AXES)}")
    return {name: axes.get(name, 1) for name in AXES}


def _fill(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    found = " x ".join(f"{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {found}: expected sizes of at least 1, and at most one -1 (what is left)")
    if devices % given != 0 or (not free and given != devices):
        divides = "a divisor of" if free else "exactly"
        raise ValueError(f"mesh {found} needs {given} devices; expected {divides} the {devices} that are there")
    return tuple(devices // given if size == -1 else size for size in sizes.values())
