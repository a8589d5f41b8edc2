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
    wanted: Bool[Array, "... tokens"] | None = None,
    block: int = 512,
) -> Float[Array, "... tokens"]:
    """log softmax(hidden head / temperature)[target] in fp32; arguments as for `token_logprobs_and_entropy`."""
    return token_logprobs_and_entropy(
        hidden, head, targets, temperature=temperature, forbidden=forbidden, wanted=wanted, block=block
    ).logprobs


def token_logprobs_and_entropy(
    hidden: Float[Array, "... tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "... tokens"],
    *,
    temperature: float = 1.0,
    forbidden: Bool[Array, " vocab"] | None = None,
    wanted: Bool[Array, "... tokens"] | None = None,
    block: int = 512,
) -> TokenLogprobs:
    """Log-probabilities of the targets and the entropy (nats) of the distributions they come from.

    forbidden: ids that the sampler never draws; they have no share in the normalisation.
    wanted: the tokens to look at, by default all; the others get 0. A block in which none is is left out.
    block: tokens whose logits a device holds at a time, also in the backward pass, which computes them again.
    """
    shape = targets.shape
    length, embed = hidden.shape[-2:]
    hidden, targets = hidden.reshape(-1, length, embed), targets.reshape(-1, length)
    wanted = jnp.broadcast_to(True, targets.shape) if wanted is None else wanted.reshape(-1, length)
    # A block takes some tokens of every row, so that rows stay on the devices that hold them; those wanted come first.
    span = min(length, max(1, block * _batch_shards() // len(targets)))
    order = jnp.argsort(~wanted, axis=-1)

    def in_blocks(values: Float[Array, "rows tokens ..."]) -> Float[Array, "blocks rows span ..."]:
        values = jax.vmap(lambda row, at: row[at])(values, order)
        values = jnp.pad(values, ((0, 0), (0, -length % span), *[(0, 0)] * (values.ndim - 2)))
        return values.reshape(len(values), -1, span, *values.shape[2:]).swapaxes(0, 1)

    def in_place(blocks: Float[Array, "blocks rows span"]) -> Float[Array, "... tokens"]:
        values = blocks.swapaxes(0, 1).reshape(len(targets), -1)
        values = jax.vmap(lambda row, at: row[at])(values, jnp.argsort(order, axis=-1))
        return jnp.where(wanted, values, 0).reshape(shape)

    head = head.astype(hidden.dtype)

    def look(hidden: Array, targets: Array) -> TokenLogprobs:
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / temperature
        if forbidden is not None:
            logits = jnp.where(forbidden, -jnp.inf, logits)
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        # Forbidden ids: 0 * -inf is to count as 0, in the gradient too.
        finite = jnp.where(jnp.isneginf(logprobs), 0, logprobs)
        return TokenLogprobs(chosen, -jnp.sum(jnp.exp(logprobs) * finite, axis=-1))

    def skip(_: Array, targets: Array) -> TokenLogprobs:
        return TokenLogprobs(*jnp.zeros((2, *targets.shape), jnp.float32))

    @jax.checkpoint
    def of_block(inputs: tuple[Array, Array, Array]) -> TokenLogprobs:
        hidden, targets, wanted = inputs
        return jax.lax.cond(wanted.any(), look, skip, hidden, targets)

    return jax.tree.map(in_place, jax.lax.map(of_block, tuple(map(in_blocks, (hidden, targets, wanted)))))


def _batch_shards() -> int:
    """How many devices the rows of a batch are split over on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES.mesh_axes("batch"))
