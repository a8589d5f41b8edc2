"""Attention of a decode step to pages on a GPU: a kernel in Pallas, which Triton compiles.

After FlashDecoding: a row's pages are shared out among several blocks of threads, each of which sums over its own, and
the sums are joined. A page is read once for all heads that share it, and no page past the row's end is read.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from models.qwen3_vl.cache import KVCache, flat_pages, flat_table, on_each_lane
from models.qwen3_vl.fallback import say_once
from models.qwen3_vl.visibility import UNSEEN
from sharding import shards

LEAST = 16
"""Rows, columns and sums of a product that Triton takes, at least; powers of two."""
PAGES = 8
"""Of a row that one block of threads reads, at least: enough blocks to fill the chip, and few sums to join."""
MOST_PARTS = 16
WARPS, STAGES = 4, 3
"""Of a block of threads; pages on their way at a time, at most."""
SHARED_BYTES = 96 * 2**10
"""Of memory that a block of threads has for them, on any GPU that the kernel runs on."""


def takes(cache: KVCache) -> bool:
    """Whether the kernel takes a cache's pages and heads on the mesh that is set; if not, one log line says so."""
    heads, size, page = cache.keys.shape[3:]
    fits = all(number >= LEAST and number.bit_count() == 1 for number in (size, page))
    fits = fits and cache.keys.dtype in (jnp.bfloat16, jnp.float16) and heads % shards("kv_heads") == 0
    fits = fits and stages(size, page) > 0
    if not fits:
        what = f"{heads} key-value heads of {size} in pages of {page} in {cache.keys.dtype.name}"
        limits = f"powers of two from {LEAST} in bfloat16, {SHARED_BYTES >> 10} KiB a page"
        say_once(f"{what}: expected {limits}; decoding without the kernel for a GPU")
    return fits


def stages(size: int, page: int) -> int:
    """How many pages of a head are on their way at a time; 0: not even one has room."""
    return min(STAGES, SHARED_BYTES // (2 * 2 * size * page))


def decode_attention(
    queries: Float[Array, "batch 1 heads size"],
    cache: KVCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch 1"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch 1 heads size"]:
    """What `paged_attention` computes of one query a row; each device for its own lanes and heads.

    `interpret` runs the kernel where there is no GPU, slowly.
    """
    return on_each_lane(functools.partial(_on_a_device, interpret=interpret), queries, cache, layer, table, index)


def _on_a_device(
    queries: Float[Array, "batch 1 heads size"],
    keys: Float[Array, "lanes layers pages kv_heads size page"],
    values: Float[Array, "lanes layers pages kv_heads page size"],
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, " batch"],
    *,
    interpret: bool,
) -> Float[Array, "batch 1 heads size"]:
    (batch, _, heads, size), (lanes, layers, pages, kv_heads) = queries.shape, keys.shape[:4]
    page, width, group = keys.shape[5], table.shape[1], heads // keys.shape[3]
    share = max(PAGES, pl.cdiv(width, MOST_PARTS))
    parts, rows = pl.cdiv(width, share), max(LEAST, pl.next_power_of_2(group))
    # In base 2, which a GPU computes: exp(x) = exp2(x log2(e)).
    scaled = (queries * (size**-0.5 * math.log2(math.e))).astype(keys.dtype).reshape(batch, kv_heads, group, size)
    scaled = jnp.pad(scaled, ((0, 0), (0, 0), (0, rows - group), (0, 0)))

    def at_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((lanes * layers * pages, None, *block), lambda row, head, part: (0, head, 0, 0))

    def of_part(*block: int) -> pl.BlockSpec:
        zeros = (0,) * len(block)
        return pl.BlockSpec((None, None, None, *block), lambda row, head, part: (row, head, part, *zeros))

    def sums(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, kv_heads, parts, *shape), jnp.float32)

    most, total, mixed = pl.pallas_call(
        functools.partial(_kernel, share=share),
        grid=(batch, kv_heads, parts),
        in_specs=[
            pl.BlockSpec((None, width), lambda row, head, part: (row, 0)),
            pl.BlockSpec((1,), lambda row, head, part: (row,)),
            pl.BlockSpec((None, None, rows, size), lambda row, head, part: (row, head, 0, 0)),
            at_head(size, page),
            at_head(page, size),
        ],
        out_specs=[of_part(rows), of_part(rows), of_part(rows, size)],
        out_shape=[sums(rows), sums(rows), sums(rows, size)],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=stages(size, page)),
        interpret=interpret,
        name="decode_attention",
    )(
        flat_table(table, keys, layer),
        jnp.minimum(index, page * width - 1) + 1,
        scaled,
        flat_pages(keys),
        flat_pages(values),
    )
    weights = jnp.exp2(most - most.max(axis=2, keepdims=True))
    mixed = jnp.einsum("bkpr,bkprd->bkrd", weights, mixed) / (weights * total).sum(axis=2)[..., None]
    return mixed[:, :, :group].reshape(queries.shape).astype(queries.dtype)


def _kernel(
    table_ref: Any,  # [width]: the pages of a row
    tokens_ref: Any,  # [1]: how many tokens they hold
    queries_ref: Any,  # [rows, size]: the heads that share keys and values
    keys_ref: Any,  # [pages, size, page]
    values_ref: Any,  # [pages, page, size]
    most_ref: Any,  # [rows]
    total_ref: Any,  # [rows]
    mixed_ref: Any,  # [rows, size]
    *,
    share: int,
) -> None:
    """A softmax, in base 2, over `share` of a row's pages: the largest score, the sum, and the values so weighted."""
    tokens, queries, page = tokens_ref[0], queries_ref[...], keys_ref.shape[2]
    first = pl.program_id(2) * share
    stop = jnp.minimum(first + share, pl.cdiv(tokens, page))

    def step(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most_before, total, mixed = sums
        at = table_ref[number]
        scores = triton.dot(queries, keys_ref[at])
        seen = number * page + jnp.arange(page) < tokens
        scores = jnp.where(seen[None], scores, UNSEEN)
        most = jnp.maximum(most_before, scores.max(axis=1))
        shares, kept = jnp.exp2(scores - most[:, None]), jnp.exp2(most_before - most)
        values = values_ref[at]
        mixed = mixed * kept[:, None] + triton.dot(shares.astype(values.dtype), values)
        return most, total * kept + shares.sum(axis=1), mixed

    nothing = jnp.full(queries.shape[:1], UNSEEN), jnp.zeros(queries.shape[:1]), jnp.zeros(queries.shape)
    most_ref[...], total_ref[...], mixed_ref[...] = jax.lax.fori_loop(first, stop, step, nothing)
