"""The device mesh: four named axes over every chip of every host."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    context: int = 1
    """The tokens of a row are split here while it is learned; parameters, and slots of rollouts, as over fsdp."""


AXES = tuple(field.name for field in dataclasses.fields(MeshAxes))


def make_mesh(axes: MeshAxes | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes ("data", "fsdp", "tensor", "context") over `devices`, all of them when None.

    The axis types are Auto: the compiler propagates shardings from the arguments and from `constrain`.
    Raises ValueError, one line, when the sizes do not multiply to the number of devices.
    """
    sizes = _sizes(axes)
    devices = jax.devices() if devices is None else devices
    shape = _fill(sizes, len(devices))
    return Mesh(_placed(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours on an axis linked where the chips' torus allows.

    What shares rows (tensor, context) lies within a process where its devices suffice: a process then has rows, and
    slots of rollouts, of its own. Laid out along the torus, four chips in a line would be of two processes.
    """
    data, fsdp, tensor, context = shape
    processes = len({device.process_index for device in devices})
    cells, left = divmod(len(devices) // processes, tensor * context)
    if processes == 1 or left or tensor * context == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    in_data = math.gcd(data, cells) if fsdp % cells else 1
    in_fsdp = cells // in_data
    if data % in_data or fsdp % in_fsdp:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = (in_data, in_fsdp, tensor, context)
    between = (data // in_data, fsdp // in_fsdp, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=True, allow_split_physical_axes=True
    )


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
