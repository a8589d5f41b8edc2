"""Attention: one function for whole rows, with several kernels, and one for rows whose keys lie in pages."""

import re
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig
from models.qwen3_vl import cudnn, flash_decoding, ragged, splash
from models.qwen3_vl.cache import Cache, KVCache, RaggedCache, SharedPages, by_lane
from models.qwen3_vl.layers import ATTENTION
from models.qwen3_vl.visibility import UNSEEN, Visibility
from sharding import constrain, shards

CAUSAL_BLOCK = 128
"""Queries of whole rows that are computed at a time, at least."""
BLOCK_TOKENS = 256
"""Cached tokens that many queries look at at a time; a single query looks at a page."""


Kernel = Literal["xla", "splash", "cudnn"]
"""What computes attention: XLA's products everywhere, a kernel on a TPU, another on a GPU."""


def kernel_for(device: Any) -> Kernel:
    """What suits a device: of GPUs, those of NVIDIA from Ampere on have a kernel."""
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))
        return "cudnn" if re.fullmatch(r"([89]|\d\d)\.\d", capability) else "xla"
    return "splash" if device.platform == "tpu" else "xla"


def cache_for(platform: str, config: PolicyConfig) -> type[KVCache] | type[RaggedCache]:
    """The layout of keys and values that suits the devices of a platform; its kernel comes along."""
    return RaggedCache if platform == "tpu" and ragged.takes(config) else KVCache


def attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    kernel: Kernel = "xla",
    heads_axis: str = "heads",
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k / sqrt(size)) v over the visible keys, in fp32; heads share keys in groups (GQA).

    Where `visibility` is causal, index i of a row stands at place i. `heads_axis` is the logical axis of the heads.
    Rows that a kernel does not take are computed by XLA, and a log line says so.
    """
    if kernel == "splash" and splash.takes(queries.shape[1], keys.shape[2]):
        return splash.splash_attention(queries, keys, values, visibility, heads_axis=heads_axis)
    if kernel == "cudnn" and cudnn.takes(queries.shape[1], keys.shape[2], queries.shape[3], queries.dtype):
        attended = cudnn.cudnn_attention(queries, keys, values, visibility, heads_axis=heads_axis)
        return checkpoint_name(attended, ATTENTION)
    attend = dense_attention if visibility.query_index is None else causal_attention
    if shards("tokens") > 1:
        # Each device looks from its own tokens at all of the row.
        queries = constrain(queries, "batch", "tokens", heads_axis, None)
        keys, values = (constrain(each, "batch", heads_axis, None, None) for each in (keys, values))
        attend = dense_attention
    return checkpoint_name(attend(queries, keys, values, visibility), ATTENTION)


def dense_attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
) -> Float[Array, "batch queries heads size"]:
    """`attention`, all scores at once. Keys are never repeated for the heads that share them."""
    batch, length, heads, size = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    mask = visibility.mask(tokens)[:, None, None]
    # Scaling the queries is cheaper than scaling the scores.
    grouped = (queries * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
    # The queries of a group under each other: plain batched matrix products, twice as fast on a CPU, with their
    # gradients, as products over five named dimensions.
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkqd,bksd->bkqs", rows, keys.astype(rows.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, length, tokens) + jnp.where(mask, 0, UNSEEN)
    scores = scores.reshape(batch, kv_heads, -1, tokens)
    # The sum is divided by at the end: then the gradient needs no sum over keys, only one over `size`.
    shares = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = shares.sum(axis=-1, keepdims=True)
    shares, values = shares.astype(rows.dtype), values.astype(rows.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", shares, values, preferred_element_type=jnp.float32)
    attended = (mixed / total).astype(rows.dtype)
    return attended.reshape(batch, heads, length, size).swapaxes(1, 2)


def causal_attention(
    queries: Float[Array, "batch tokens heads size"],
    keys: Float[Array, "batch kv_heads tokens size"],
    values: Float[Array, "batch kv_heads tokens size"],
    visibility: Visibility,
) -> Float[Array, "batch tokens heads size"]:
    """`attention`, causal: a block of queries leaves out the keys that come after it.

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
        return dense_attention(queries[:, span], keys[:, :, :stop], values[:, :, :stop], seen)

    return jnp.concatenate([attend(start) for start in range(0, tokens, block)], axis=1)


def paged_attention(
    queries: Float[Array, "batch queries heads size"],
    cache: Cache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch queries"],
    shared: SharedPages | None = None,
    *,
    kernel: Kernel = "xla",
) -> Float[Array, "batch queries heads size"]:
    """Attention of tokens at `index` of their rows to what the pages of the rows hold up to there.

    A TPU's kernel has a cache of its own layout, and reads every row's pages for itself; so do a GPU's, one for a query
    a row and one for many. XLA goes block by block as far as the longest row reaches, with a running softmax; nothing
    as long as a row is in memory. What lies past a row's own end adds exactly nothing, so its result does not depend on
    its neighbours' lengths. With `shared`, XLA reads pages that several rows begin with once for all of them (one query
    a row).
    """
    if isinstance(cache, RaggedCache):
        return ragged.ragged_attention(queries, cache, layer, table, index)
    if kernel == "cudnn" and queries.shape[1] == 1 and flash_decoding.takes(cache):
        return flash_decoding.decode_attention(queries, cache, layer, table, index)
    if kernel == "cudnn" and queries.shape[1] > 1 and cudnn.takes_pages(cache):
        return cudnn.cached_attention(queries, cache, layer, table, index)
    batch, length, heads, size = queries.shape
    kv_heads = cache.values.shape[3]
    # Scaling the queries is cheaper than scaling the scores.
    grouped = (queries * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
    own_table, own_tokens = table, index + 1
    if shared is not None:
        own_table = jnp.take_along_axis(
            table, shared.pages[:, None] + jnp.arange(table.shape[1]), axis=1, mode="fill", fill_value=0
        )
        own_tokens -= cache.page * shared.pages[:, None]
    # As far as any lane goes, so that no lane's loop hangs on another's.
    most_own = jnp.max(own_tokens)
    most_shared = None if shared is None else (jnp.max(shared.place), jnp.max(shared.pages) * cache.page)

    def attend(
        lane: KVCache, queries: Array, table: Array, own_table: Array, own_tokens: Array, shared: SharedPages | None
    ) -> _Sums:
        begun = None
        if shared is not None and most_shared is not None:
            begun = _look_together(lane, layer, queries, table, shared, *most_shared)
        return _look(lane, layer, queries, own_table, own_tokens, most_own, begun)

    parts = jax.tree.map(lambda part: by_lane(part, cache.lanes), (grouped, table, own_table, own_tokens, shared))
    sums = jax.vmap(attend)(cache, *parts)
    return (sums.mixed / sums.total[..., None]).reshape(queries.shape).astype(queries.dtype)


class _Sums(NamedTuple):
    """A softmax on its way: over the keys seen so far."""

    most: Float[Array, "rows queries kv_heads group"]
    """The largest score."""
    total: Float[Array, "rows queries kv_heads group"]
    """Sum of exp(score - most)."""
    mixed: Float[Array, "rows queries kv_heads group size"]
    """The values, so weighted."""

    @classmethod
    def nothing(cls, queries: Array) -> "_Sums":
        shape = queries.shape[:-1]
        return cls(jnp.full(shape, UNSEEN), jnp.zeros(shape), jnp.zeros(queries.shape))


def _look(
    lane: KVCache,
    layer: Int[Array, ""],
    queries: Float[Array, "rows queries kv_heads group size"],
    table: Int[Array, "rows width"],
    tokens: Int[Array, "rows queries"],
    most_tokens: Int[Array, ""],
    begun: _Sums | None = None,
) -> _Sums:
    """Sums over the first `tokens` tokens of the rows' pages, of which no row has more than `most_tokens`."""
    rows, length, kv_heads, group, size = queries.shape
    many, page = length > 1, lane.page
    block = max(1, min(table.shape[1], BLOCK_TOKENS // page)) if many else 1
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block)))
    # One query a row: a sum, which is fused with what reads the pages; a product of so few rows would copy them first.
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    score = product if many else lambda rows, keys: jnp.sum(rows[..., None] * keys[:, :, None], axis=-2)
    compute = queries.dtype if many else jnp.float32
    by_head = queries.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * length, size).astype(compute)

    def read(number: Array) -> tuple[Array, Array]:
        at = jax.lax.dynamic_slice_in_dim(table, number * block, block, axis=1)
        keys = lane.keys.at[layer, at].get(mode="promise_in_bounds")
        values = lane.values.at[layer, at].get(mode="promise_in_bounds")
        keys = keys.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, size, -1)
        values = values.swapaxes(1, 2).reshape(rows, kv_heads, -1, size)
        return keys.astype(compute), values.astype(compute)

    def step(number: Array, sums: _Sums) -> _Sums:
        keys, values = read(number)
        scores = score(by_head, keys)
        seen = number * block * page + jnp.arange(keys.shape[-1]) < tokens[:, :, None]
        seen = jnp.broadcast_to(seen[:, None, None], (rows, 1, group, *seen.shape[1:]))
        scores = jnp.where(seen.reshape(rows, 1, group * length, -1), scores, UNSEEN)
        most = jnp.maximum(sums.most, scores.max(axis=-1))
        shares = jnp.exp(scores - most[..., None])
        kept = jnp.exp(sums.most - most)
        total = sums.total * kept + shares.sum(axis=-1)
        return _Sums(most, total, sums.mixed * kept[..., None] + product(shares.astype(compute), values))

    def inside(part: Array) -> Array:
        return jnp.moveaxis(part, 1, 3).reshape(rows, kv_heads, group * length, *part.shape[4:])

    def outside(part: Array) -> Array:
        return jnp.moveaxis(part.reshape(rows, kv_heads, group, length, *part.shape[3:]), 3, 1)

    sums = jax.tree.map(inside, _Sums.nothing(queries) if begun is None else begun)
    blocks = -(-most_tokens // (block * page))
    with jax.named_scope("pages"):
        sums = jax.lax.fori_loop(0, blocks, step, sums)
    return jax.tree.map(outside, sums)


def _look_together(
    lane: KVCache,
    layer: Int[Array, ""],
    queries: Float[Array, "rows 1 kv_heads group size"],
    table: Int[Array, "rows width"],
    shared: SharedPages,
    last_place: Int[Array, ""],
    most_tokens: Int[Array, ""],
) -> _Sums:
    """Sums over the shared pages: the rows of a group are many queries of one row.

    As many groups at a time as there would be if all were full, so the rows are computed about once.
    """
    rows, most = shared.members.shape
    batch = -(-rows // most)
    members = jnp.pad(shared.members, ((0, -rows % batch), (0, 0)))

    def look(number: Array, found: _Sums) -> _Sums:
        at = jax.lax.dynamic_slice_in_dim(members, number * batch, batch)
        tokens = jnp.broadcast_to(lane.page * shared.pages[at[:, :1]], at.shape)
        sums = _look(lane, layer, queries[at, 0], table[at[:, 0]], tokens, most_tokens)
        return jax.tree.map(
            partial(jax.lax.dynamic_update_slice_in_dim, start_index=number * batch, axis=0), found, sums
        )

    nothing = _Sums.nothing(jnp.zeros((*members.shape, *queries.shape[2:])))
    with jax.named_scope("groups"):
        found = jax.lax.fori_loop(0, last_place // (batch * most) + 1, look, nothing)
    return jax.tree.map(lambda part: part.reshape(-1, 1, *part.shape[2:])[shared.place], found)
