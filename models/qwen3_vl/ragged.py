"""Attention to pages on a TPU: JAX's ragged paged attention kernel, with our lanes, layers and mesh."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig
from models.qwen3_vl.cache import RaggedCache, flat_pages, flat_table, on_each_lane
from models.qwen3_vl.fallback import say_once
from sharding import shards

SIZE = 128
"""Head sizes that the kernel takes are multiples of it."""
BLOCK_TOKENS = 1024
"""Cached tokens that are looked at at a time: with 8 key-value heads, 4 MiB in bf16, and twice that in flight."""
BLOCK_QUERIES = 256
"""Queries of a key-value head for which it is read once, all heads that share it counted: as many operations a byte let
a v5p or v5e compute all the time. For twice as many a v5p has no room."""
BLOCK_ROWS = 8
"""Of rows with a query each, those that are computed together: all of them at each row's keys, one of them for use."""
VMEM_BYTES = 32 * 2**20
"""Of a core's 64 MiB or more."""


def takes(config: PolicyConfig) -> bool:
    """Whether the kernel takes a model's heads on the mesh that is set; if not, one log line says so."""
    text, parts = config.text, shards("kv_heads")
    fits = text.head_dim % SIZE == 0 and text.num_key_value_heads % parts == 0
    if not fits:
        heads = f"{text.num_key_value_heads} key-value heads of {text.head_dim} in {parts} parts"
        say_once(f"{heads}: expected whole heads of a multiple of {SIZE}; decoding without the ragged kernel")
    return fits


def queries_per_block(tokens: int, rows: int, group: int) -> int:
    """Tokens that the kernel looks at at a time, of `tokens` in `rows`; `group` heads share a key-value head."""
    return min(tokens, BLOCK_ROWS if tokens == rows else max(BLOCK_QUERIES // group, 1))


def ragged_attention(
    queries: Float[Array, "batch queries heads size"],
    cache: RaggedCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch queries"],
) -> Float[Array, "batch queries heads size"]:
    """What `paged_attention` computes, of tokens that follow each other; each device for its own lanes and heads."""
    return on_each_lane(_on_a_device, queries, cache, layer, table, index)


def _on_a_device(
    queries: Float[Array, "batch queries heads size"],
    pages: Float[Array, "lanes layers pages page keys_and_values size"],
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch queries heads size"]:
    batch, length, heads, size = queries.shape
    page = pages.shape[3]
    # Padding may reach past the last page: it looks at page 0.
    table = jnp.pad(table, ((0, 0), (0, -(-length // page))))
    table = flat_table(table, pages, layer)
    # The kernel would never wait for the pages of a row without tokens.
    tokens = jnp.maximum(start, 0) + length
    flat = ragged_paged_attention(
        queries.reshape(-1, heads, size),
        flat_pages(pages),
        tokens,
        table,
        jnp.arange(batch + 1, dtype=jnp.int32) * length,
        jnp.array([batch], jnp.int32),
        sm_scale=size**-0.5,
        num_kv_pages_per_block=min(table.shape[1], max(1, BLOCK_TOKENS // page)),
        num_queries_per_block=queries_per_block(batch * length, batch, heads // (pages.shape[4] // 2)),
        vmem_limit_bytes=VMEM_BYTES,
    )
    return flat.reshape(queries.shape)
