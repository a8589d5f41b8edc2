"""Attention of whole rows on a TPU: the splash kernel (after FlashAttention, arXiv:2307.08691), with our visibility.

Blocks of queries and keys that do not see each other are skipped; which those are depends on the batch, so it is found
in the program. Segments alone are compared inside the kernel. A prefix that several segments share is beyond it: then
blocks that are seen in part have masks in memory, of four bytes for each query and key; others need none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from models.qwen3_vl.fallback import say_once
from models.qwen3_vl.layers import ATTENTION
from models.qwen3_vl.visibility import Visibility
from models.qwen3_vl.whole_rows import of_whole_rows
from sharding import shards

BLOCKS = (1024, 512, 256, 128)
"""Queries or keys of a block: the largest of these that divides the rows."""
LANES = 128

RowKernel = Callable[..., Any]
"""Queries, keys and values of a row, heads first -> what the queries get."""


def takes(queries: int, keys: int) -> bool:
    """Whether the kernel takes rows of these lengths on the mesh that is set; if not, one log line says so."""
    fits = queries % (shards("tokens") * LANES) == 0 and keys % LANES == 0
    if not fits:
        say_once(f"rows of {queries} queries and {keys} keys are no multiples of {LANES}: computed without splash")
    return fits


def splash_attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    heads_axis: str,
    interpret: bool = False,
) -> Float[Array, "batch queries heads size"]:
    """What `attention` computes, by `of_whole_rows`. Of padding (segment 0) the result is finite, and nothing else.

    `interpret` runs the kernel where there is no TPU, slowly.
    """
    kernel = partial(_on_a_device, interpret=interpret)
    return of_whole_rows(kernel, queries, keys, values, visibility, heads_axis=heads_axis)


def _on_a_device(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    interpret: bool,
) -> Float[Array, "batch queries heads size"]:
    """Row by row: the kernel knows no batch."""

    def of_row(queries: Array, keys: Array, values: Array, visibility: Visibility) -> Array:
        query_ids, prefix_ids, key_ids, index = visibility
        if query_ids is not None and key_ids is not None and prefix_ids is None and index is None:
            return _by_segments(query_ids, key_ids, interpret)(queries, keys, values)
        return _by_stretches(visibility, keys.shape[1], interpret)(queries, keys, values)

    by_head = queries.swapaxes(1, 2) * queries.shape[-1] ** -0.5
    return jax.vmap(of_row)(by_head, keys, values, visibility).swapaxes(1, 2)


def _by_stretches(visibility: Visibility, keys: int, interpret: bool) -> RowKernel:
    """The kernel of one causal row: each query sees its segment's prefix, and its segment up to itself."""
    starts, stops = _stretches(visibility, keys)
    sizes = _block_sizes(len(starts), keys)
    of_blocks = (-1, sizes.block_q, 2)
    starts, stops = starts.reshape(of_blocks), stops.reshape(of_blocks)
    first = jnp.arange(0, keys, sizes.block_kv)
    seen = jnp.minimum(stops[..., None], first + sizes.block_kv) - jnp.maximum(starts[..., None], first)
    seen = jnp.maximum(seen, 0).sum(axis=2)  # keys, for each query and block of keys
    sees = (seen > 0).any(axis=1).astype(jnp.int32) + (seen == sizes.block_kv).all(axis=1)

    # No more blocks are seen in part than four in a row of blocks (where the prefix starts and ends, where a segment
    # starts, the diagonal), and as many as the row has (what one segment sees and the next, in the same block, does
    # not: each segment and prefix ends once).
    rows, columns = sees.shape
    most = min(sees.size, 4 * rows + columns)
    partly = jnp.flatnonzero(sees == 1, size=most, fill_value=0)
    row, column = jnp.divmod(partly, columns)
    at = first[column][:, None, None] + jnp.arange(sizes.block_kv)
    masks = [(starts[row, :, part, None] <= at) & (at < stops[row, :, part, None]) for part in range(2)]
    place = jnp.cumsum(sees.reshape(-1) == 1).reshape(sees.shape) - 1
    return _kernel(sizes, sees, (jnp.where(sees == 1, place, 0), masks[0] | masks[1]), interpret)


def _stretches(visibility: Visibility, keys: int) -> tuple[Int[Array, "queries 2"], Int[Array, "queries 2"]]:
    """Where the two stretches of keys that each query sees begin and end: its prefix (may be empty), and its own.

    Padding sees itself: the kernel divides by what is seen.
    """
    query_ids, prefix_ids, key_ids, index = visibility
    if index is None:
        raise ValueError("splash attention with a shared prefix needs query_index: expected a causal row")
    if query_ids is None or key_ids is None:
        own_start = prefix_start = prefix_stop = jnp.zeros_like(index)
    else:
        prefix_ids = query_ids if prefix_ids is None else prefix_ids
        at = jnp.arange(keys)
        # A prefix may have no tokens (of a prompt of one, which begins its responses): an empty stretch, not the
        # smallest and the largest number that there are.
        start = jnp.minimum(jax.ops.segment_min(at, key_ids, keys + 1), keys)
        stop = jnp.maximum(jax.ops.segment_max(at, key_ids, keys + 1), -1) + 1
        apart = (query_ids != prefix_ids) & (prefix_ids > 0)
        own_start = jnp.where(query_ids > 0, start[query_ids], index)
        prefix_start = jnp.where(apart, start[prefix_ids], 0)
        prefix_stop = jnp.where(apart, jnp.maximum(stop[prefix_ids], prefix_start), 0)
    return jnp.stack([prefix_start, own_start], axis=-1), jnp.stack([prefix_stop, index + 1], axis=-1)


def _by_segments(query_ids: Int[Array, " queries"], key_ids: Int[Array, " keys"], interpret: bool) -> RowKernel:
    """The kernel of one row of packed segments whose ids count up, padding last; no mask is in memory."""
    sizes = _block_sizes(len(query_ids), len(key_ids))
    (first_query, last_query), (first_key, last_key) = (
        _id_ranges(query_ids, sizes.block_q),
        _id_ranges(key_ids, sizes.block_kv),
    )
    meet = (first_query[:, None] <= last_key) & (first_key <= last_query[:, None])
    # Padding is a segment to the kernel, and may not be blind: it sees that in the row's last block.
    padded = (query_ids.reshape(-1, sizes.block_q) == 0).any(axis=-1)
    meet |= padded[:, None] & (jnp.arange(len(first_key)) == len(first_key) - 1)
    kernel = _kernel(sizes, meet.astype(jnp.int32), None, interpret)
    return partial(kernel, segment_ids=SegmentIds(q=query_ids, kv=key_ids))


def _kernel(
    sizes: BlockSizes,
    sees: Int[Array, "query_blocks key_blocks"],
    masks: tuple[Int[Array, "query_blocks key_blocks"], Bool[Array, "masks block_q block_kv"]] | None,
    interpret: bool,
) -> SplashAttentionKernel:
    """`sees`: 0 where no query of a block sees a key of the other, 2 where each sees all, 1 between the two.

    `masks`: which one a block has that is seen in part, and the masks.
    """
    queries, keys = sees.shape
    # What a skipped or unmasked block would load is what the first one did: nothing is loaded for it.
    place, masks_by_query = (None, None) if masks is None else (masks[0][None], masks[1])

    def info(block: Int[np.ndarray, "..."], masks: Array | None) -> MaskInfo:
        data_next = jnp.where(sees > 0, block, 0)[None]
        return MaskInfo(data_next, place, sees[None], partial_mask_blocks=masks, q_sequence=None)

    masks_by_key = None if masks_by_query is None else masks_by_query.swapaxes(1, 2)
    by_query = info(np.arange(keys, dtype=np.int32), masks_by_query)
    by_key = info(np.arange(queries, dtype=np.int32)[:, None], masks_by_key)
    return SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENTION,
        mask_function=None,
        interpret=interpret,
    )


def _id_ranges(ids: Int[Array, " tokens"], block: int) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """Smallest and largest segment in each block; an empty range where all is padding."""
    blocks = ids.reshape(-1, block)
    return jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(axis=-1), blocks.max(axis=-1)


def _block_sizes(queries: int, keys: int) -> BlockSizes:
    query, key = (next(block for block in BLOCKS if tokens % block == 0) for tokens in (queries, keys))
    return BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=min(key, 512),
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=min(key, 512),
        block_q_dq=query,
        block_kv_dq=key,
    )
