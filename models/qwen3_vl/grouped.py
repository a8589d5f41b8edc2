"""Grouped matrix products: rows sorted by group, each group with a matrix of its own, none padded and none dropped."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int

ROWS = 128
"""Rows of a tile: what a group's last tile has too many is computed for nothing."""
WIDTH = 1024
"""Columns of a tile, at most: as many fit in a TPU core's 16 MiB with their sums and results."""


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "rows inputs"], matrices: Float[Array, "groups inputs outputs"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows outputs"]:
    """Each row times the matrix of its group; `sizes` are the groups' rows, in order. Rows past the last group: 0.

    As `jax.lax.ragged_dot`, whose gradient by the matrices a TPU computes with every row for every group.
    """
    return _product(rows, matrices, sizes)


def _product(rows: Array, matrices: Array, sizes: Array) -> Array:
    is_of_a_group = jnp.arange(len(rows)) < sizes.sum()
    # A kernel may leave the other rows as its memory was, not even finite.
    return jnp.where(is_of_a_group[:, None], jax.lax.ragged_dot(rows, matrices, sizes), 0)


def matrix_gradients(
    rows: Float[Array, "rows inputs"], slopes: Float[Array, "rows outputs"], sizes: Int[Array, " groups"]
) -> Float[Array, "groups inputs outputs"]:
    """rows^T slopes of each group."""
    return jax.lax.platform_dependent(rows, slopes, sizes, tpu=on_tpu, default=_elsewhere)


def on_tpu(
    rows: Float[Array, "rows inputs"],
    slopes: Float[Array, "rows outputs"],
    sizes: Int[Array, " groups"],
    *,
    interpret: bool = False,
) -> Float[Array, "groups inputs outputs"]:
    """`matrix_gradients` by the kernel for a TPU; `interpret` runs it where there is none, slowly."""
    rows, slopes = (jnp.pad(each, ((0, -len(each) % ROWS), (0, 0))) for each in (rows, slopes))
    tiling = (ROWS, min(WIDTH, rows.shape[1]), min(WIDTH, slopes.shape[1]))
    return tgmm(rows.T, slopes, sizes, preferred_element_type=rows.dtype, tiling=tiling, interpret=interpret)


def _elsewhere(rows: Array, slopes: Array, sizes: Array) -> Array:
    nothing = jnp.zeros((len(sizes), rows.shape[1], slopes.shape[1]), rows.dtype)
    (gradients,) = jax.vjp(lambda matrices: jax.lax.ragged_dot(rows, matrices, sizes), nothing)[1](slopes)
    return gradients


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: tuple[Array, ...], slopes: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = kept
    return _product(slopes, matrices.swapaxes(1, 2), sizes), matrix_gradients(rows, slopes, sizes), None


grouped_matmul.defvjp(_forward, _backward)
