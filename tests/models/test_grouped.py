"""Grouped products against a product for each group, and the TPU's kernel, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl.grouped import grouped_matmul, matrix_gradients, on_tpu

# Groups without rows, that share tiles of 128, and rows that are of no group.
SIZES = np.array([100, 0, 130, 1, 60], np.int32)
ROWS, INPUTS, OUTPUTS = 300, 128, 256


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


@pytest.mark.parametrize("sizes", [SIZES, np.array([0, 0, 300, 0, 0], np.int32), np.zeros(5, np.int32)])
def test_the_tpu_s_kernel_gives_the_same_gradients(sizes):
    rows, _, slopes = inputs()
    found = on_tpu(rows, slopes, jnp.asarray(sizes), interpret=True)
    np.testing.assert_allclose(found, matrix_gradients(rows, slopes, jnp.asarray(sizes)), atol=1e-4)
