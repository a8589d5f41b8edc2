"""Slots of the key-value cache: prompts copied in, single rows taken out and put back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.qwen3_vl import KVCache
from sharding.rules import constrain


def copy_prompts(cache: KVCache, prompts: KVCache, source: Int[Array, " slots"]) -> KVCache:
    """`cache` with prompt `source[i]` at the beginning of slot i; slots whose source is -1 stay as they are."""

    def copy(
        slots: Float[Array, "layers slots kv_heads tokens size"],
        rows: Float[Array, "layers rows kv_heads prompt size"],
    ) -> Float[Array, "layers slots kv_heads tokens size"]:
        length = min(rows.shape[3], slots.shape[3])
        taken = (source >= 0)[None, :, None, None, None]
        copied = jnp.where(taken, rows[:, jnp.maximum(source, 0), :, :length], slots[..., :length, :])
        return slots.at[..., :length, :].set(copied)

    return sharded(jax.tree.map(copy, cache, prompts))


def take_rows(cache: KVCache, slots: Int[Array, " rows"]) -> KVCache:
    """The cache of these slots alone; a slot past the last gives some other slot's."""
    return jax.tree.map(lambda array: array.at[:, slots].get(mode="clip"), cache)


def put_rows(cache: KVCache, rows: KVCache, slots: Int[Array, " rows"]) -> KVCache:
    """`cache` with these slots replaced; rows for a slot past the last are dropped."""
    return sharded(jax.tree.map(lambda array, new: array.at[:, slots].set(new, mode="drop"), cache, rows))


def sharded(cache: KVCache) -> KVCache:
    """The cache spread over the mesh by slots and heads."""
    return KVCache(*(constrain(array, "layers", "slots", "kv_heads", None, None) for array in cache))
