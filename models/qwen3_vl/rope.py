"""Rotary embeddings: interleaved M-RoPE for the decoder, rows and columns for the vision tower."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.qwen3_vl.config import TextConfig, VisionConfig


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each pair of dimensions is turned; fp32."""

    cos: Float[Array, "batch tokens half"]
    sin: Float[Array, "batch tokens half"]


def text_rotation(config: TextConfig, positions: Int[Array, "batch tokens 3"]) -> Rotation:
    """Interleaved M-RoPE: frequencies take the time, row and column position in turn (T H W T H W ... T T).

    Row and column hold as many frequencies as `mrope_section` says; time has all the others.
    """
    half = config.head_dim // 2
    axis = np.zeros(half, np.int32)
    for dimension in (1, 2):
        axis[dimension : 3 * config.mrope_section[dimension] : 3] = dimension
    angles = positions[..., axis].astype(jnp.float32) * _inverse_frequencies(config.rope_theta, config.head_dim)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def vision_rotation(config: VisionConfig, coordinates: Int[Array, "rows patches 2"]) -> Rotation:
    """The first half of the frequencies turns with a patch's row, the second with its column."""
    axis = np.repeat((0, 1), config.head_dim // 4)
    frequencies = np.tile(_inverse_frequencies(config.rope_theta, config.head_dim // 2), 2)
    angles = coordinates[..., axis].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "batch tokens heads size"], rotation: Rotation) -> Float[Array, "batch tokens heads size"]:
    """Dimension i and dimension i + size / 2 turn as a pair, in fp32."""
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _inverse_frequencies(theta: float, size: int) -> Float[np.ndarray, " half"]:
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1.0) / np.power(np.float32(theta), exponents)
