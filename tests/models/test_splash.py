"""The TPU's attention kernel, interpreted, against XLA's products."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl.attention import attention, dense_attention
from models.qwen3_vl.splash import splash_attention, takes
from models.qwen3_vl.visibility import Visibility
from sharding import make_mesh

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 384, 4, 2, 72
SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], [100, 50, 130, 104]), np.repeat([1, 2, 0], [30, 330, 24])])


def shared_prompts() -> Visibility:
    """Causal; in the first row two responses see a prompt beside themselves."""
    ids = jnp.asarray(SEGMENTS)
    prefixes = jnp.where((ids > 1) & (jnp.arange(ROWS)[:, None] == 0), 1, ids)
    return Visibility(ids, prefixes, ids, jnp.broadcast_to(jnp.arange(TOKENS), ids.shape))


def images() -> Visibility:
    """Patches see those of their own image."""
    return Visibility(query_ids=jnp.asarray(SEGMENTS), key_ids=jnp.asarray(SEGMENTS))


def inputs() -> list[jax.Array]:
    random = np.random.default_rng(0)
    shapes = ((ROWS, TOKENS, HEADS, SIZE), *[(ROWS, KV_HEADS, TOKENS, SIZE)] * 2, (ROWS, TOKENS, HEADS, SIZE))
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def results(attend, visibility: Visibility) -> list[np.ndarray]:
    """What the tokens get, padding left out, and the gradients by queries, keys and values."""
    *arrays, weights = inputs()
    held = (SEGMENTS > 0)[..., None, None]

    def loss(*arrays):
        found = attend(*arrays, visibility)
        return jnp.where(held, found * weights, 0).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert np.isfinite(found).all(), "padding is to stay finite: it would spoil the gradients of all"
    return [np.where(held, found, 0), *gradients]


@pytest.mark.slow
@pytest.mark.parametrize("visibility", [shared_prompts, images])
@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 4}, {"tensor": 2, "context": 3}])
def test_the_kernel_computes_what_the_products_do(visibility, axes):
    """Also on devices that split rows, heads (more of them than keys have heads: those are repeated) and tokens."""
    expected = results(dense_attention, visibility())
    attend = functools.partial(splash_attention, heads_axis="heads", interpret=True)
    if axes is None:
        found = results(attend, visibility())
    else:
        mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
        with jax.set_mesh(mesh):
            found = results(attend, visibility())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_rows_that_the_kernel_does_not_take_are_computed_all_the_same(caplog):
    queries, keys, values, _ = (array[:, :100] if array.shape[1] == TOKENS else array for array in inputs())
    keys, values = keys[:, :, :100], values[:, :, :100]
    seen = Visibility(query_index=jnp.broadcast_to(jnp.arange(100), (ROWS, 100)))
    with caplog.at_level(logging.WARNING):
        found = attention(queries, keys, values, seen, kernel="splash")
    np.testing.assert_allclose(found, dense_attention(queries, keys, values, seen), atol=1e-5)
    assert not takes(100, 100)
    (record,) = caplog.records  # one line, however often
    assert record.message == "rows of 100 queries and 100 keys are no multiples of 128: computed without splash"
