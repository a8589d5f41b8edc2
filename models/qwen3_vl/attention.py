"""Attention: one function; who sees whom is told by ids and indices, not by a mask in memory."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a query that sees nothing (padding) gives an average and not NaN, forward and backward.
HIDDEN = -1e30
# Of a decode step's keys and values, how much is in hand at a time on a CPU: about what its second-level cache holds.
CPU_BLOCK_BYTES = 2 << 20


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
    if length == 1:
        attended = _one_query(grouped[:, 0], keys, values, mask[:, :, :, 0])
        return attended.astype(queries.dtype).reshape(queries.shape)
    # The queries of a group under each other: plain batched matrix products, twice as fast on a CPU, with their
    # gradients, as products over five named dimensions.
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkqd,bksd->bkqs", rows, keys.astype(rows.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores.reshape(batch, kv_heads, -1, length, tokens), HIDDEN)
    shares = jax.nn.softmax(scores, axis=-1).astype(rows.dtype).reshape(batch, kv_heads, -1, tokens)
    attended = jnp.einsum("bkqs,bksd->bkqd", shares, values.astype(rows.dtype))
    return attended.reshape(batch, heads, length, size).swapaxes(1, 2)


def cached_attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "layers batch kv_heads tokens size"],
    values: Float[Array, "layers batch kv_heads tokens size"],
    layer: Int[Array, ""],
    index: Int[Array, "batch queries"],
) -> Float[Array, "batch queries heads size"]:
    """Attention of tokens at cache position `index` to what the cache of a layer holds up to there."""

    def whole(queries: Array, keys: Array, values: Array, layer: Array, index: Array) -> Array:
        return attention(queries, keys[layer], values[layer], Visibility(query_index=index))

    def by_blocks(queries: Array, keys: Array, values: Array, layer: Array, index: Array) -> Array:
        room = max(1, CPU_BLOCK_BYTES // (2 * math.prod(keys.shape[2:]) * keys.dtype.itemsize))
        rows = max(rows for rows in range(1, room + 1) if len(queries) % rows == 0)

        def block(first: Array) -> Array:
            at = (layer, first, 0, 0, 0)
            sizes = (1, rows, *keys.shape[2:])
            return attention(
                jax.lax.dynamic_slice_in_dim(queries, first, rows),
                jax.lax.dynamic_slice(keys, at, sizes)[0],
                jax.lax.dynamic_slice(values, at, sizes)[0],
                Visibility(query_index=jax.lax.dynamic_slice_in_dim(index, first, rows)),
            )

        return jax.lax.map(block, jnp.arange(0, len(queries), rows)).reshape(queries.shape)

    if queries.shape[1] > 1 or jax.sharding.get_abstract_mesh().size > 1:
        return whole(queries, keys, values, layer, index)
    # XLA:CPU copies the layer's slice of the cache. A few rows at a time, the copy stays in the processor's cache.
    # (Reading only what a block's rows have reached would save a third, but a row's last bits would then depend on its
    # neighbours, and a run on the timing of its tools.)
    return jax.lax.platform_dependent(queries, keys, values, layer, index, cpu=by_blocks, default=whole)


def _one_query(
    queries: Float[Array, "batch kv_heads group size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    mask: Bool[Array, "batch 1 1 keys"],
) -> Float[Array, "batch kv_heads group size"]:
    """A decode step. It is bound by reading the cache: as multiply-and-add, XLA fuses it into one pass over it.

    As matrix products, with `group` rows each, it takes twice as long on a CPU (256 slots, 2 kv heads).
    """
    scores = jnp.sum(queries[:, :, :, None] * keys[:, :, None].astype(jnp.float32), axis=-1)
    shares = jax.nn.softmax(jnp.where(mask, scores, HIDDEN), axis=-1)
    return jnp.sum(shares[..., None] * values[:, :, None].astype(jnp.float32), axis=-2)
