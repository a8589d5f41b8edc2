"""Attention: one function; who sees whom is told by ids and indices, not by a mask in memory."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.qwen3_vl.cache import KVCache, by_lane

# Finite, so that a query that sees nothing (padding) gives an average and not NaN, forward and backward.
HIDDEN = -1e30
CAUSAL_BLOCK = 128
"""Queries of whole rows that are computed at a time, at least."""
BLOCK_TOKENS = 256
"""Cached tokens that many queries look at at a time; a decode step looks at a page."""


class Visibility(NamedTuple):
    """Which keys a query sees; each rule that is given narrows it."""

    query_ids: Int[Array, "batch queries"] | None = None
    """A query sees keys of its own segment, and of the segment named in `prefix_ids`. Keys of segment 0: never."""
    prefix_ids: Int[Array, "batch queries"] | None = None
    key_ids: Int[Array, "batch keys"] | None = None
    query_index: Int[Array, "batch queries"] | None = None
    """Causal: a query sees keys up to and with this index."""

    def mask(self, keys: int) -> Bool[Array, "batch queries keys"]:
        rules = []
        if self.query_index is not None:
            rules.append(jnp.arange(keys) <= self.query_index[:, :, None])
        if self.query_ids is not None and self.key_ids is not None:
            key_ids = self.key_ids[:, None, :]
            same = key_ids == self.query_ids[:, :, None]
            if self.prefix_ids is not None:
                same |= key_ids == self.prefix_ids[:, :, None]
            rules.append(same & (key_ids > 0))
        if not rules:
            raise ValueError("Visibility needs query and key ids, or query_index, or both")
        return rules[0] if len(rules) == 1 else rules[0] & rules[1]


def attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k / sqrt(size)) v over the visible keys, in fp32; heads share keys in groups (GQA).

    Keys are never repeated for the heads that share them.
    """
    batch, length, heads, size = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    mask = visibility.mask(tokens)[:, None, None]
    # Scaling the queries is cheaper than scaling the scores.
    grouped = (queries * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
    # The queries of a group under each other: plain batched matrix products, twice as fast on a CPU, with their
    # gradients, as products over five named dimensions.
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkqd,bksd->bkqs", rows, keys.astype(rows.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores.reshape(batch, kv_heads, -1, length, tokens), HIDDEN)
    shares = jax.nn.softmax(scores, axis=-1).astype(rows.dtype).reshape(batch, kv_heads, -1, tokens)
    attended = jnp.einsum("bkqs,bksd->bkqd", shares, values.astype(rows.dtype))
    return attended.reshape(batch, heads, length, size).swapaxes(1, 2)


def causal_attention(
    queries: Float[Array, "batch tokens heads size"],
    keys: Float[Array, "batch kv_heads tokens size"],
    values: Float[Array, "batch kv_heads tokens size"],
    visibility: Visibility,
) -> Float[Array, "batch tokens heads size"]:
    """`attention` of whole rows whose index counts up: a block of queries leaves out the keys that come after it.

    With eight blocks, 9 scores of 16 are computed.
    """
    tokens = queries.shape[1]
    block = max(CAUSAL_BLOCK, -(-tokens // 8))

    def attend(start: int) -> Array:
        span, stop = slice(start, start + block), start + block
        query_ids, prefix_ids, key_ids, index = visibility
        seen = Visibility(
            query_ids=None if query_ids is None else query_ids[:, span],
            prefix_ids=None if prefix_ids is None else prefix_ids[:, span],
            key_ids=None if key_ids is None else key_ids[:, :stop],
            query_index=None if index is None else index[:, span],
        )
        return attention(queries[:, span], keys[:, :, :stop], values[:, :, :stop], seen)

    return jnp.concatenate([attend(start) for start in range(0, tokens, block)], axis=1)


def paged_attention(
    queries: Float[Array, "batch queries heads size"],
    cache: KVCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch queries"],
) -> Float[Array, "batch queries heads size"]:
    """Attention of tokens at `index` of their rows to what the pages of the rows hold up to there.

    Block by block as far as the longest row reaches, with a running softmax; nothing as long as a row is in memory.
    What lies past a row's own end adds exactly nothing, so its result does not depend on its neighbours' lengths.
    """
    batch, length, heads, size = queries.shape
    kv_heads = cache.values.shape[3]
    block = max(1, min(table.shape[1], BLOCK_TOKENS // cache.page)) if length > 1 else 1
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block)))
    blocks = jnp.max(index) // (block * cache.page) + 1
    # Scaling the queries is cheaper than scaling the scores.
    grouped = (queries * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)

    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    # One query a row: a sum, which is fused with what reads the pages; a product of so few rows would copy them first.
    score = product if length > 1 else lambda rows, keys: jnp.sum(rows[..., None] * keys[:, :, None], axis=-2)
    compute = queries.dtype if length > 1 else jnp.float32

    def attend(lane: KVCache, queries: Array, table: Array, index: Array) -> Array:
        rows, group = queries.shape[0], queries.shape[3]
        by_head = queries.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * length, size).astype(compute)

        def read(number: Array) -> tuple[Array, Array]:
            at = jax.lax.dynamic_slice_in_dim(table, number * block, block, axis=1)
            keys = lane.keys.at[layer, at].get(mode="promise_in_bounds")
            values = lane.values.at[layer, at].get(mode="promise_in_bounds")
            keys = keys.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, size, -1)
            values = values.swapaxes(1, 2).reshape(rows, kv_heads, -1, size)
            return keys.astype(compute), values.astype(compute)

        def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, mixed = carry
            keys, values = read(number)
            scores = score(by_head, keys)
            reached = number * block * cache.page + jnp.arange(keys.shape[-1]) <= index[:, :, None]
            reached = jnp.broadcast_to(reached[:, None, None], (rows, 1, group, *reached.shape[1:]))
            scores = jnp.where(reached.reshape(rows, 1, group * length, -1), scores, HIDDEN)
            new_most = jnp.maximum(most, scores.max(axis=-1))
            shares = jnp.exp(scores - new_most[..., None])
            kept = jnp.exp(most - new_most)
            return (
                new_most,
                total * kept + shares.sum(axis=-1),
                mixed * kept[..., None] + product(shares.astype(compute), values),
            )

        shape = by_head.shape[:3]
        nothing = (jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros((*shape, size)))
        _, total, mixed = jax.lax.fori_loop(0, blocks, step, nothing)
        attended = (mixed / total[..., None]).reshape(rows, kv_heads, group, length, size)
        return attended.transpose(0, 3, 1, 2, 4)

    parts = (by_lane(part, cache.lanes) for part in (grouped, table, index))
    return jax.vmap(attend)(cache, *parts).reshape(queries.shape).astype(queries.dtype)
