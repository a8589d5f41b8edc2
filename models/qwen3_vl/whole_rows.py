"""Kernels that know one device, on a mesh that splits rows, tokens and heads."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.qwen3_vl.visibility import Visibility
from sharding import on_each_device, shards

RowsKernel = Callable[[Array, Array, Array, Visibility], Array]
"""Queries [batch, queries, heads, size], keys and values [batch, kv_heads, keys, size], who sees whom -> as queries."""


def of_whole_rows(
    kernel: RowsKernel,
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    heads_axis: str,
) -> Float[Array, "batch queries heads size"]:
    """Each device computes its own queries (rows, tokens and heads as the mesh splits them) against all keys of a row.

    `heads_axis` is the logical axis of the heads.
    """
    keys, values = (_enough_heads(each, shards(heads_axis)) for each in (keys, values))
    of_queries, of_keys = ("batch", "tokens", heads_axis, None), ("batch", heads_axis, None, None)
    rows, row_ids = ("batch", "tokens"), ("batch", None)
    return on_each_device(
        partial(_own, kernel),
        (queries, keys, values, *visibility),
        (of_queries, of_keys, of_keys, rows, rows, row_ids, rows),
    )


def _own(
    kernel: RowsKernel, queries: Array, keys: Array, values: Array, *visibility: Int[Array, "batch some"] | None
) -> Array:
    keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    return kernel(queries, keys, values, Visibility(*visibility))


def _enough_heads(
    keys: Float[Array, "batch kv_heads keys size"], devices: int
) -> Float[Array, "batch heads keys size"]:
    """Keys such that each device holds those of its own queries; repeated where there are more devices than heads."""
    kv_heads = keys.shape[1]
    if kv_heads % devices == 0:
        return keys
    if devices % kv_heads:
        raise ValueError(f"{kv_heads} key-value heads on mesh axis tensor {devices}: expected one to divide the other")
    return jnp.repeat(keys, devices // kv_heads, axis=1)
