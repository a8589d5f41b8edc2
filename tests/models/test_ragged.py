"""The TPU's cache and its kernel, interpreted, against the cache that XLA reads."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental.pallas import tpu as pltpu

from models.qwen3_vl import Cache, KVCache, Qwen3VLConfig, RaggedCache, cache_for, ragged
from models.qwen3_vl.attention import paged_attention
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.sizes import published_config
from sharding import make_mesh

ROWS, PAGE, WIDTH, HEADS, KV_HEADS, SIZE, LAYERS = 4, 16, 4, 4, 2, 128, 2
BEGUN = 30
STARTS = (30, 7, 16, 29)
"""Where the rows go on; one may write anew what it holds, as a slot that has stopped does."""


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[None]:
    # JAX 0.10's interpreter asks a plain integer index for its shape.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    as_xla: Any = True
    with pltpu.force_tpu_interpret_mode(as_xla):
        yield


def config(size: int = SIZE) -> Qwen3VLConfig:
    base = published_config("2B")
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": size}
    return replace(base, text=replace(base.text, num_hidden_layers=LAYERS, **heads))


def attended(layout: type[KVCache] | type[RaggedCache], tokens: int, lanes: int) -> list[np.ndarray]:
    """What a first stretch of tokens gets in the last layer, and what those that go on from it get."""
    cache: Cache = layout.zeros(config(), pages=1 + ROWS * WIDTH // lanes, page=PAGE, lanes=lanes, dtype=jnp.float32)
    table = jnp.asarray(unshared_table(ROWS, WIDTH, lanes))
    layer = jnp.int32(LAYERS - 1)
    random = np.random.default_rng(0)

    @jax.jit
    def extend(cache: Cache, index: jax.Array, queries: jax.Array, keys: jax.Array, values: jax.Array):
        cache = cache.write(layer, table, index, keys, values)
        return paged_attention(queries, cache, layer, table, index), cache

    found = []
    for length, starts in ((BEGUN, [0] * ROWS), (tokens, STARTS)):
        shapes = ((ROWS, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        index = np.asarray(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)
        out, cache = extend(cache, index, *(random.standard_normal(shape).astype(np.float32) for shape in shapes))
        found.append(np.asarray(out))
    return found


@pytest.mark.parametrize("tokens", [1, 20], ids=["a decode step", "an observation"])
@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=["one device", "lanes and heads split"])
def test_the_kernel_computes_what_the_loop_over_pages_does(interpreted, tokens, axes, monkeypatch):
    """Also where the queries of a row, and the rows of a decode step, are several blocks."""
    monkeypatch.setattr(ragged, "BLOCK_QUERIES", 32)  # 16 tokens, for two heads share keys
    monkeypatch.setattr(ragged, "BLOCK_ROWS", 2)
    expected = attended(KVCache, tokens, lanes=2)
    with jax.set_mesh(make_mesh(axes or {"data": 1}, jax.devices()[: 4 if axes else 1])):
        found = attended(RaggedCache, tokens, lanes=2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_tpu_gets_it_where_the_kernel_takes_the_heads(caplog):
    assert cache_for("tpu", config()) is RaggedCache
    assert cache_for("cpu", config()) is KVCache
    with caplog.at_level(logging.WARNING):
        assert cache_for("tpu", config(size=40)) is KVCache
        assert cache_for("tpu", config(size=40)) is KVCache
    (record,) = caplog.records  # one line, however often
    assert record.message.endswith("decoding without the ragged kernel")


def test_pages_are_copied_in_every_layer():
    cache = RaggedCache(jnp.arange(2 * LAYERS * 3 * 2 * 2, dtype=jnp.float32).reshape(2, LAYERS, 3, 2, 2, 1))
    copied = cache.copy_pages(jnp.array([[1], [2]]), jnp.array([[2], [1]])).pages
    np.testing.assert_array_equal(copied[0, :, 2], cache.pages[0, :, 1])
    np.testing.assert_array_equal(copied[1, :, 1], cache.pages[1, :, 2])
