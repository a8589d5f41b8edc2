"""Attention of whole rows on a TPU: the splash kernel (after FlashAttention, arXiv:2307.08691), with our visibility.

Blocks of queries and keys that do not see each other are skipped; which those are depends on the batch, so it is found
in the program. Segments alone are compared inside the kernel. A prefix that several segments share is beyond it: then
the rows' masks lie in memory, which the kernel takes as four bytes for each query and key.
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
from sharding import on_each_device, shards

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
    """What `attention` computes. Of padding (segment 0) the result is finite, and nothing else.

    Each device computes its own queries (rows, tokens and heads as the mesh splits them) against all keys of the row.
    `heads_axis` is the logical axis of the heads. `interpret` runs the kernel where there is no TPU, slowly.
    """
    by_head = queries.swapaxes(1, 2) * queries.shape[-1] ** -0.5
    keys, values = (_enough_heads(each, shards(heads_axis)) for each in (keys, values))
    of_queries, of_keys = ("batch", heads_axis, "tokens", None), ("batch", heads_axis, None, None)
    rows, row_ids = ("batch", "tokens"), ("batch", None)
    attended = on_each_device(
        partial(_on_a_device, interpret=interpret),
        (by_head, keys, values, *visibility),
        (of_queries, of_keys, of_keys, rows, rows, row_ids, rows),
    )
    return attended.swapaxes(1, 2)


def _on_a_device(
    queries: Float[Array, "batch heads queries size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    query_ids: Int[Array, "batch queries"] | None,
    prefix_ids: Int[Array, "batch queries"] | None,
    key_ids: Int[Array, "batch keys"] | None,
    index: Int[Array, "batch queries"] | None,
    *,
    interpret: bool,
) -> Float[Array, "batch heads queries size"]:
    """Row by row: the kernel knows no batch."""

    def of_row(queries: Array, keys: Array, values: Array, visibility: Visibility) -> Array:
        query_ids, prefix_ids, key_ids, index = visibility
        if query_ids is not None and key_ids is not None and prefix_ids is None and index is None:
            return _by_segments(query_ids, key_ids, interpret)(queries, keys, values)
        return _by_mask(visibility, keys.shape[1], interpret)(queries, keys, values)

    keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    of_rows = Visibility(query_ids, prefix_ids, key_ids, index)
    return jax.vmap(of_row)(queries, keys, values, of_rows)


def _by_mask(visibility: Visibility, keys: int, interpret: bool) -> RowKernel:
    """The kernel of one row whose mask is in memory."""
    one = jax.tree.map(lambda ids: ids[None], visibility)
    mask = one.mask(keys)[0]
    # The kernel divides by what a query sees: padding sees one key.
    blind = ~mask.any(axis=-1, keepdims=True)
    mask |= blind & (jnp.arange(keys) == (0 if one.query_index is None else one.query_index[0, :, None]))
    sizes = _block_sizes(len(mask), keys)
    blocks = mask.reshape(-1, sizes.block_q, keys // sizes.block_kv, sizes.block_kv).swapaxes(1, 2)
    sees = blocks.any(axis=(2, 3)).astype(jnp.int32) + blocks.all(axis=(2, 3))
    return _kernel(sizes, sees, blocks.reshape(-1, *blocks.shape[2:]), interpret)


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
    masks: Bool[Array, "blocks block_q block_kv"] | None,
    interpret: bool,
) -> SplashAttentionKernel:
    """`sees`: 0 where no query of a block sees a key of the other, 2 where each sees all, 1 between the two."""
    queries, keys = sees.shape
    # What a skipped or unmasked block would load is what the first one did: nothing is loaded for it.
    mask_next = None if masks is None else jnp.where(sees == 1, jnp.arange(sees.size).reshape(sees.shape), 0)[None]

    def info(block: Int[np.ndarray, "..."], masks: Array | None) -> MaskInfo:
        data_next = jnp.where(sees > 0, block, 0)[None]
        return MaskInfo(data_next, mask_next, sees[None], partial_mask_blocks=masks, q_sequence=None)

    by_query = info(np.arange(keys, dtype=np.int32), masks)
    by_key = info(np.arange(queries, dtype=np.int32)[:, None], None if masks is None else masks.swapaxes(1, 2))
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


def _enough_heads(
    keys: Float[Array, "batch kv_heads keys size"], devices: int
) -> Float[Array, "batch heads keys size"]:
    """Keys such that each device holds those of its own queries; repeated where there are more devices than heads."""
    kv_heads = keys.shape[1]
    if kv_heads % devices == 0:
        return keys
    if devices % kv_heads:
        raise ValueError(f"{kv_heads} key-value heads on mesh axis tensor {devices}: expected one to divide the other")
    return jnp.repeat(keys, devices // kv_heads, axis=1)
