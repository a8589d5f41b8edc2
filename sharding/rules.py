"""Logical axis -> mesh axis. Changing the strategy is changing this mapping."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")
MeshAxis = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axis, or axes, that each logical axis is split over; None: every device holds all of it."""

    # Parameters: one dimension is split over fsdp and context and gathered on use, the other stays split over tensor.
    vocab: MeshAxis = "tensor"
    embed: MeshAxis = ("fsdp", "context")
    mlp: MeshAxis = "tensor"
    heads: MeshAxis = "tensor"
    kv_heads: MeshAxis = "tensor"
    head_dim: MeshAxis = None
    experts: MeshAxis = "fsdp"
    """Whole experts, before `embed` takes its turn: they can then be used where they lie."""
    layers: MeshAxis = None
    """The axis that layers are stacked on; scanned over, so a split would gather a layer at every step."""
    vision_embed: MeshAxis = ("fsdp", "context")
    vision_mlp: MeshAxis = "tensor"
    vision_heads: MeshAxis = "tensor"
    patch: MeshAxis = None
    merged: MeshAxis = "tensor"

    # Activations and batches.
    batch: MeshAxis = ("data", "fsdp")
    slots: MeshAxis = ("data", "fsdp", "context")
    """Rollouts stand on devices row by row, for a decode step has no stretches to split."""
    tokens: MeshAxis = "context"
    """Of whole rows: each device holds a stretch of them."""

    def mesh_axes(self, logical_axis: str | None) -> tuple[str, ...]:
        """Mesh axes of a logical axis; ValueError for a name that has no rule."""
        if logical_axis is None:
            return ()
        if logical_axis not in LOGICAL_AXES:
            raise ValueError(f"logical axis {logical_axis!r} has no rule; expected one of {', '.join(LOGICAL_AXES)}")
        found = getattr(self, logical_axis)
        if found is None:
            return ()
        return (found,) if isinstance(found, str) else found


LOGICAL_AXES = tuple(field.name for field in dataclasses.fields(ShardingRules))
RULES = ShardingRules()


def spec(
    rules: ShardingRules,
    logical_axes: tuple[str | None, ...],
    mesh: Mesh | AbstractMesh,
    shape: tuple[int, ...] | None = None,
) -> P:
    """PartitionSpec of an array whose dimensions carry these logical names.

    A mesh axis splits one dimension only, the first that asks for it. Where `shape` is given, mesh axes that do not
    divide a dimension are dropped from the right until the rest do: what is left over is replicated.
    """
    if shape is not None and len(shape) != len(logical_axes):
        raise ValueError(f"logical axes {logical_axes} for an array of shape {shape}; expected one name a dimension")
    # What shard_map maps over is already split by hand and can not be named again.
    taken = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}
    entries = []
    for dimension, logical_axis in enumerate(logical_axes):
        # Axes of size 1 split nothing; without them equal layouts get equal specs, and jit compiles once.
        axes = [axis for axis in rules.mesh_axes(logical_axis) if mesh.shape.get(axis, 1) > 1 and axis not in taken]
        while shape is not None and axes and shape[dimension] % math.prod(mesh.shape[axis] for axis in axes) != 0:
            axes.pop()
        taken.update(axes)
        entries.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def shards(logical_axis: str, rules: ShardingRules = RULES) -> int:
    """How many parts a logical axis is split in on the mesh of `jax.set_mesh`, where all of them divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in rules.mesh_axes(logical_axis))


def owners(mesh: Mesh, logical_axis: str, rules: ShardingRules = RULES) -> list[list[int]]:
    """The processes whose devices hold each part that the mesh splits a logical axis in, in the order of the parts."""
    split = [mesh.axis_names.index(axis) for axis in rules.mesh_axes(logical_axis)]
    others = [axis for axis in range(mesh.devices.ndim) if axis not in split]
    count = math.prod(mesh.devices.shape[axis] for axis in split)
    parts = mesh.devices.transpose(*split, *others).reshape(count, -1)
    return [sorted({device.process_index for device in part}) for part in parts]


def named_sharding(
    mesh: Mesh, *logical_axes: str | None, rules: ShardingRules = RULES, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """Sharding of an array whose dimensions carry these logical names; no names: replicated."""
    return NamedSharding(mesh, spec(rules, logical_axes, mesh, shape))


def constrain(array: jax.Array, *logical_axes: str | None, rules: ShardingRules = RULES) -> jax.Array:
    """`array` laid out by its logical axes on the mesh of `jax.set_mesh`; as it is where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec(rules, logical_axes, mesh, array.shape))


def on_each_device(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array | None], axes: Sequence[tuple[str | None, ...]]
) -> jax.Array:
    """`function` of each device's own parts of `arrays` on the mesh of `jax.set_mesh`; a kernel can not be split else.

    `axes` are the logical axes of each array; what comes out lies as the first. None stays None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    layouts = tuple(
        None if array is None else spec(RULES, names, mesh, array.shape)
        for array, names in zip(arrays, axes, strict=True)
    )
    return jax.shard_map(function, mesh=mesh, in_specs=layouts, out_specs=layouts[0], check_vma=False)(*arrays)


def param_shardings(params: Tree, mesh: Mesh, rules: ShardingRules = RULES) -> Tree:
    """The tree of `params` with a NamedSharding in the place of every array (or ShapeDtypeStruct).

    Reads the logical axis names off `nnx.Param(value, axes=("embed", "mlp"))`. An array with one dimension more than
    names is a stack of layers. Optimizer state mirrors its parameters' names; a leaf without names is replicated.
    """

    def shardings(leaf: Any) -> Any:
        names = tuple(leaf.get_metadata().get("axes", ())) if _is_variable(leaf) else ()
        return jax.tree.map(lambda array: NamedSharding(mesh, _param_spec(names, array.shape, mesh, rules)), leaf)

    return jax.tree.map(shardings, params, is_leaf=_is_variable)


def _param_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules) -> P:
    if not names:
        return P()
    if len(shape) == len(names) + 1:
        names = ("layers", *names)
    return spec(rules, names, mesh, shape)


def _is_variable(leaf: object) -> bool:
    # By its method, not its class: this package knows JAX only, and an NNX variable is the only leaf that has it.
    return hasattr(leaf, "get_metadata")


def shard_batch(tree: Tree, mesh: Mesh, *, axis: int = 0, rules: ShardingRules = RULES) -> Tree:
    """Host arrays -> device arrays with dimension `axis` (rows) split like "batch", and the one behind like "tokens".

    Each process passes its own rows, all processes equally many; the result is the global array. Leaves that have no
    dimension `axis`, and rows that the devices do not divide, are replicated (one process) or refused (several).
    Rows that devices of two processes hold would be two processes' rows: refused, too.
    """
    processes = _processes(mesh)
    if processes > 1 and max(map(len, owners(mesh, "batch", rules))) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} has rows on devices of two of the {processes} processes: expected "
            "mesh.tensor x mesh.context to divide a process's devices"
        )

    def place(leaf: Any) -> jax.Array:
        split = ("batch", "tokens")[: max(leaf.ndim - axis, 0)]
        names = (None,) * axis + split + (None,) * (leaf.ndim - axis - len(split)) if split else ()
        if processes == 1:
            return jax.device_put(leaf, named_sharding(mesh, *names, rules=rules, shape=leaf.shape if names else None))
        sharding = named_sharding(mesh, *names, rules=rules)
        try:
            return jax.make_array_from_process_local_data(sharding, leaf)
        except ValueError as error:
            found = f"{leaf.shape[axis]} rows a process on mesh {dict(mesh.shape)}"
            raise ValueError(f"{found}: expected rows that the devices of a process divide") from error

    return jax.tree.map(place, tree)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Host arrays -> device arrays that every device holds whole; every process must pass the same values."""
    sharding = NamedSharding(mesh, P())
    if _processes(mesh) == 1:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_process_local_data(sharding, values, values.shape)

    return jax.tree.map(place, tree)


def _processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})
