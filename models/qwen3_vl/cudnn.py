"""Attention of many tokens on a GPU: cuDNN's fused kernel, as `jax.nn.dot_product_attention` calls it.

Scores never lie in memory. The kernel knows causal rows and where rows end; who sees whom beside that is a mask in
memory, the same for all heads of a row. Where every token sees all before it (one conversation a row, or a prompt and a
response) there is none, and it takes half the time: whether that is so is found in the program. JAX 0.10 computes the
mask's gradient along, which nobody wants; 0.11 does not.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.qwen3_vl.cache import KVCache, flat_pages, flat_table, on_each_lane
from models.qwen3_vl.fallback import say_once
from models.qwen3_vl.visibility import Visibility
from models.qwen3_vl.whole_rows import of_whole_rows
from sharding import shards

SIZE = 8
"""Head sizes that the kernel takes are multiples of it."""
LARGEST = 128
"""And not larger, on every GPU that it runs on."""

Implementation = Literal["cudnn", "xla"]
"""Who computes it. "xla" is for tests on machines without a GPU."""


def takes(queries: int, keys: int, size: int, dtype: DTypeLike) -> bool:
    """Whether the kernel takes rows of these lengths and heads of this size; if not, one log line says so."""
    # Rows are even: with a mask, the gradient asks for it.
    fits = queries % (2 * shards("tokens")) == 0 and keys % 2 == 0
    fits = fits and size % SIZE == 0 and size <= LARGEST and dtype in (jnp.bfloat16, jnp.float16)
    if not fits:
        what = f"rows of {queries} queries and {keys} keys, heads of {size} in {jnp.dtype(dtype).name}"
        limits = f"even rows, heads of a multiple of {SIZE} up to {LARGEST}, in bfloat16"
        say_once(f"{what}: expected {limits}; computed without cuDNN")
    return fits


def takes_pages(cache: KVCache) -> bool:
    """Whether the kernel takes a cache's heads on the mesh that is set; if not, one log line says so."""
    heads, size = cache.keys.shape[3:5]
    if heads % shards("kv_heads"):
        say_once(f"{heads} key-value heads in {shards('kv_heads')} parts: expected whole heads; computed without cuDNN")
        return False
    return takes(2 * shards("tokens"), cache.page, size, cache.keys.dtype)


def cudnn_attention(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    heads_axis: str,
    implementation: Implementation = "cudnn",
) -> Float[Array, "batch queries heads size"]:
    """What `attention` computes, by `of_whole_rows`. Of padding (segment 0) the result is finite, and nothing else."""
    kernel = partial(_on_a_device, implementation=implementation)
    return of_whole_rows(kernel, queries, keys, values, visibility, heads_axis=heads_axis)


def _on_a_device(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch kv_heads keys size"],
    values: Float[Array, "batch kv_heads keys size"],
    visibility: Visibility,
    *,
    implementation: Implementation,
) -> Float[Array, "batch queries heads size"]:
    tokens = keys.shape[2]
    # Of whole rows alone: elsewhere the kernel would take the first query for the first token.
    causal = visibility.query_index is not None and queries.shape[1] == tokens
    attend = partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    arrays = queries, keys.swapaxes(1, 2), values.swapaxes(1, 2)
    beside = visibility._replace(query_index=None) if causal else visibility

    def masked(queries: Array, keys: Array, values: Array) -> Array:
        return attend(queries, keys, values, mask=beside.mask(tokens)[:, None])

    if not causal:
        return masked(*arrays)
    if visibility.key_ids is None:
        return attend(*arrays)
    return jax.lax.cond(_see_all_before(visibility.key_ids, visibility.prefix_ids), attend, masked, *arrays)


def _see_all_before(ids: Int[Array, "batch tokens"], prefix_ids: Int[Array, "batch tokens"] | None) -> Bool[Array, ""]:
    """Whether each row is one segment, or one and another that sees it, and padding after that."""
    held, first = ids > 0, ids[:, :1]
    prefix_ids = ids if prefix_ids is None else prefix_ids
    second = (ids == ids.max(axis=1, keepdims=True)) & (prefix_ids == first)
    return jnp.all((ids == first) | second | ~held) & jnp.all(held[:, :-1] | ~held[:, 1:])


def cached_attention(
    queries: Float[Array, "batch queries heads size"],
    cache: KVCache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch queries"],
    *,
    implementation: Implementation = "cudnn",
) -> Float[Array, "batch queries heads size"]:
    """What `paged_attention` computes, of tokens that follow each other; each device for its own lanes and heads.

    Where nothing stands before any of them (prompts), they see each other alone. Else the pages of all rows are copied
    together, as far as the longest row reaches (or a little further: the lengths are a few static ones), and a mask
    says where each begins.
    """
    return on_each_lane(partial(_of_pages, implementation=implementation), queries, cache, layer, table, index)


def _of_pages(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "lanes layers pages kv_heads size page"],
    values: Float[Array, "lanes layers pages kv_heads page size"],
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    start: Int[Array, " batch"],
    *,
    implementation: Implementation,
) -> Float[Array, "batch queries heads size"]:
    (batch, length), page = queries.shape[:2], keys.shape[5]
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    # Padding may reach past the last page: it looks at page 0.
    of_queries = -(-length // page)
    table = jnp.pad(table, ((0, 0), (0, max(0, of_queries - table.shape[1]))))

    table = flat_table(table, keys, layer)

    def read(width: int) -> tuple[Array, Array]:
        at = table[:, :width]
        by_page = (flat_pages(keys)[at].transpose(0, 1, 4, 2, 3), flat_pages(values)[at].swapaxes(2, 3))
        found_keys, found_values = (each.reshape(batch, -1, *each.shape[3:]).astype(queries.dtype) for each in by_page)
        return found_keys, found_values

    def first() -> Array:
        keys, values = read(of_queries)
        return attend(queries, keys[:, :length], values[:, :length], is_causal=True)

    def later(width: int) -> Array:
        keys, values = read(width)
        seen = jnp.arange(keys.shape[1]) <= (start[:, None] + jnp.arange(length))[:, :, None]
        reached = jnp.clip(start + length, 1, keys.shape[1])
        return attend(queries, keys, values, mask=seen[:, None], key_value_seq_lengths=reached)

    widths = sorted({max(of_queries, -(-table.shape[1] // part)) for part in (8, 4, 2, 1)})
    reach = -(-jnp.max(start + length) // page)
    # Padding may reach past the last page: the last width is wide enough for what is there.
    wide = jnp.sum(reach > jnp.asarray(widths[:-1], jnp.int32))
    return jax.lax.switch(jnp.where(jnp.all(start <= 0), 0, 1 + wide), [first, *(partial(later, w) for w in widths)])
