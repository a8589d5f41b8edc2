"""Heads that share keys and values, on devices that split heads."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def enough_heads(keys: Float[Array, "batch kv_heads keys size"], devices: int) -> Float[Array, "batch heads keys size"]:
    """Keys such that each device holds those of its own queries; repeated where there are more devices than heads."""
    kv_heads = keys.shape[1]
    if kv_heads % devices == 0:
        return keys
    if devices % kv_heads:
        raise ValueError(f"{kv_heads} key-value heads on mesh axis tensor {devices}: expected one to divide the other")
    return jnp.repeat(keys, devices // kv_heads, axis=1)
