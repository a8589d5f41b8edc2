"""The TPU's attention kernel, interpreted, against XLA's products."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl import splash
from models.qwen3_vl.attention import attention, dense_attention
from models.qwen3_vl.splash import splash_attention, takes
from models.qwen3_vl.visibility import Visibility
from sharding import make_mesh

ROWS, TOKENS, HEADS, KV_HEADS, SIZE = 2, 384, 4, 2, 40
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
@pytest.mark.parametrize(
    ("visibility", "axes"),
    [
        (shared_prompts, {}),
        (shared_prompts, {"context": 3}),
        (images, {"context": 3}),
        # More devices than keys have heads: those are repeated.
        (images, {"tensor": 4}),
    ],
)
def test_the_kernel_computes_what_the_products_do(visibility, axes):
    """Also on devices that split heads, or the row's tokens."""
    expected = results(dense_attention, visibility())
    attend = functools.partial(splash_attention, heads_axis="heads", interpret=True)
    mesh = make_mesh(axes or {"data": 1}, jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh):
        found = results(attend, visibility())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def packed_row(random: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and the prefixes that they see: prompts, each with some responses after it, and padding, by chance.

    Now and then a prompt has no tokens, though its responses name it.
    """
    ids, prefixes = np.zeros((2, tokens), np.int32)
    at = number = 0
    while at < tokens and random.random() < 0.95:
        prompt = number + 1
        for _ in range(random.integers(1, 7)):
            number += 1
            if number == prompt and random.random() < 0.2:
                continue
            end = min(tokens, at + random.integers(1, random.choice([10, 100, 700])))
            ids[at:end], prefixes[at:end] = number, prompt
            at = end
    return ids, prefixes


@pytest.mark.parametrize("seed", range(30))
def test_a_row_s_stretches_are_its_mask_and_few_blocks_are_seen_in_part(seed, monkeypatch):
    """Also where a device holds the queries of the second half of a row."""
    block, tokens = 128, 2_048
    ids, prefixes = packed_row(np.random.default_rng(seed), tokens)
    stored = []
    monkeypatch.setattr(splash, "BLOCKS", (block,))
    monkeypatch.setattr(splash, "_kernel", lambda sizes, sees, masks, interpret: stored.append((sees, *masks)))
    for first in (0, tokens // 2):
        rows = slice(first, tokens)
        seen_by = (ids[rows], prefixes[rows], ids, np.arange(first, tokens))
        row = Visibility._make(jnp.asarray(each) for each in seen_by)
        expected = np.array(jax.tree.map(lambda each: each[None], row).mask(tokens)[0])
        expected[ids[rows] == 0, np.flatnonzero(ids[rows] == 0) + first] = True  # padding sees itself

        splash._by_stretches(row, tokens, interpret=True)
        sees, place, masks = map(np.asarray, stored.pop())
        assert (sees == 1).sum() <= len(masks) < sees.size
        for (i, j), seen in np.ndenumerate(sees):
            found = masks[place[i, j]] if seen == 1 else np.full((block, block), seen == 2)
            part = expected[i * block : (i + 1) * block, j * block : (j + 1) * block]
            np.testing.assert_array_equal(found, part)
            assert seen == 2 or not found.all()


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
