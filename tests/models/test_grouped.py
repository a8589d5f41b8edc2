"""Grouped products against a product for each group, and the TPU's kernel, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl import grouped
from models.qwen3_vl.grouped import grouped_matmul, matrix_gradients, on_tpu

# Groups without rows, that share tiles of 128, and rows that are of no group.
SIZES = np.array([100, 0, 130, 1, 60], np.int32)
ROWS, INPUTS, OUTPUTS = 300, 256, 192


def inputs() -> list[jax.Array]:
    random = np.random.default_rng(0)
    shapes = ((ROWS, INPUTS), (len(SIZES), INPUTS, OUTPUTS), (ROWS, OUTPUTS))
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def group_by_group(rows, matrices):
    ends = np.cumsum(SIZES)
    parts = [rows[end - size : end] @ matrix for end, size, matrix in zip(ends, SIZES, matrices, strict=True)]
    return jnp.concatenate([*parts, jnp.zeros((ROWS - ends[-1], OUTPUTS))])


def test_each_group_has_its_own_matrix_forward_and_backward():
    rows, matrices, slopes = inputs()
    found, back = jax.vjp(lambda *arrays: grouped_matmul(*arrays, jnp.asarray(SIZES)), rows, matrices)
    expected, expected_back = jax.vjp(group_by_group, rows, matrices)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for ours, theirs in zip(back(slopes), expected_back(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_rows_of_no_group_count_for_nothing_whatever_a_kernel_leaves_there(monkeypatch):
    def leaving_nan(rows, matrices, sizes, product=jax.lax.ragged_dot):
        return jnp.where(jnp.arange(len(rows))[:, None] < sizes.sum(), product(rows, matrices, sizes), jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", leaving_nan)
    rows, matrices, slopes = inputs()
    found, back = jax.vjp(lambda rows: grouped_matmul(rows, matrices, jnp.asarray(SIZES)), rows)
    for each in (found, *back(slopes)):
        assert np.isfinite(each).all() and not each[SIZES.sum() :].any() and each[0].any()


@pytest.mark.parametrize("sizes", [SIZES, np.array([0, 0, 300, 0, 0], np.int32), np.zeros(5, np.int32)])
def test_the_tpu_s_kernel_gives_the_same_gradients(sizes, monkeypatch):
    """Also where a matrix is several tiles, the last of them cut."""
    monkeypatch.setattr(grouped, "WIDTH", 128)
    rows, _, slopes = inputs()
    found = on_tpu(rows, slopes, jnp.asarray(sizes), interpret=True)
    np.testing.assert_allclose(found, matrix_gradients(rows, slopes, jnp.asarray(sizes)), atol=1e-4)
