"""Log-probabilities of given tokens, from hidden states, never holding logits of all tokens at once."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sharding import RULES


class TokenLogprobs(NamedTuple):
    """What a distribution over the vocabulary says of one token, and how spread out it is; fp32."""

    logprobs: Float[Array, "... tokens"]
    entropy: Float[Array, "... tokens"]


def token_logprobs(
    hidden: Float[Array, "... tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "... tokens"],
    *,
    temperature: float = 1.0,
    forbidden: Bool[Array, " vocab"] | None = None,
    block: int = 1024,
) -> Float[Array, "... tokens"]:
    """log softmax(hidden head / temperature)[target] in fp32; arguments as for `token_logprobs_and_entropy`."""
    return token_logprobs_and_entropy(
        hidden, head, targets, temperature=temperature, forbidden=forbidden, block=block
    ).logprobs


def token_logprobs_and_entropy(
    hidden: Float[Array, "... tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "... tokens"],
    *,
    temperature: float = 1.0,
    forbidden: Bool[Array, " vocab"] | None = None,
    block: int = 1024,
) -> TokenLogprobs:
    """Log-probabilities of the targets and the entropy (nats) of the distributions they come from.

    forbidden: ids that the sampler never draws; they have no share in the normalisation.
    block: tokens whose logits a device holds at a time, also in the backward pass, which computes them again.
    """
    shape = targets.shape
    length, embed = hidden.shape[-2:]
    hidden, targets = hidden.reshape(-1, length, embed), targets.reshape(-1, length)
    # A block takes some tokens of every row, so that rows stay on the devices that hold them.
    span = min(length, max(1, block * _batch_shards() // len(targets)))
    padding = -length % span
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(len(hidden), -1, span, embed).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(len(targets), -1, span).swapaxes(0, 1)
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def of_block(inputs: tuple[Array, Array]) -> TokenLogprobs:
        hidden, targets = inputs
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / temperature
        if forbidden is not None:
            logits = jnp.where(forbidden, -jnp.inf, logits)
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        # Forbidden ids: 0 * -inf is to count as 0, in the gradient too.
        finite = jnp.where(jnp.isneginf(logprobs), 0, logprobs)
        return TokenLogprobs(chosen, -jnp.sum(jnp.exp(logprobs) * finite, axis=-1))

    def whole(blocks: Float[Array, "blocks rows span"]) -> Float[Array, "... tokens"]:
        return blocks.swapaxes(0, 1).reshape(len(targets[0]), -1)[:, :length].reshape(shape)

    return jax.tree.map(whole, jax.lax.map(of_block, (hidden, targets)))


def _batch_shards() -> int:
    """How many devices the rows of a batch are split over on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES.mesh_axes("batch"))
