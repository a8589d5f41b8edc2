"""The next token from its logits, with a key that knows only the trajectory and the position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_MASKED = -jnp.inf
_BLOCK = 128
"""Vocabulary entries that are summed at a time where a token is looked for."""


class OwnSampling(NamedTuple):
    """How each row is sampled, where rows differ; of one row, or of all in a batch."""

    temperature: Float[Array, " rows"]
    """0 takes the most likely token."""
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]


def truncate(
    logits: Float[Array, "rows vocab"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "rows vocab"]:
    """Logits with -inf for all but the `top_k` most likely tokens, for all beyond the `top_p` nucleus, and for all
    less likely than `min_p` times the most likely one.

    The most likely token always stays. `top_k` 0, `top_p` 1 and `min_p` 0 leave everything as it is.
    Source: nucleus sampling, arXiv:1904.09751; min-p, arXiv:2407.01082.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, _MASKED, logits)
    if top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        mass_before = jnp.cumsum(jax.nn.softmax(descending), axis=-1) - jax.nn.softmax(descending)
        least = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, _MASKED, logits)
    if min_p > 0.0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < least, _MASKED, logits)
    return logits


def truncate_own(logits: Float[Array, "rows vocab"], own: OwnSampling) -> Float[Array, "rows vocab"]:
    """`truncate`, each row by its own measure; one sort where any row asks for it, else none."""

    def truncated(logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        descending = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(logits.shape[-1])
        among_top = jnp.where((own.top_k > 0)[:, None], rank < own.top_k[:, None], True)
        likely = jnp.where(among_top, descending, _MASKED)
        share = jax.nn.softmax(likely)
        in_nucleus = (jnp.cumsum(share, axis=-1) - share < own.top_p[:, None]) | (own.top_p >= 1.0)[:, None]
        likely_enough = likely >= descending[:, :1] + jnp.log(own.min_p)[:, None]
        least = jnp.min(jnp.where(among_top & in_nucleus & likely_enough, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, _MASKED, logits)

    asked = ((own.top_k > 0) | (own.top_p < 1.0) | (own.min_p > 0.0)).any()
    return jax.lax.cond(asked, truncated, lambda logits: logits, logits)


def _draw(logits: Float[Array, "rows vocab"], keys: Key[Array, " rows"]) -> Int[Array, " rows"]:
    """The first token at which the cumulative probability reaches a uniform number in (0, 1]: first the block of
    tokens in which it does, then the token in the block.

    One random number a row: Gumbel noise takes one a vocabulary entry. One pass over the vocabulary: a cumulative sum
    over all of it took fourteen times as long on a CPU (32 rows of 32,000). A parallel sum is not quite monotone, so
    what is counted as reached never falls on a token or block of probability zero.
    """
    rows, vocab = logits.shape
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    uniform = 1.0 - jax.vmap(jax.random.uniform)(keys)

    block, left = _reach(blocks.sum(axis=-1), uniform)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token, _ = _reach(inside, left)
    return block * _BLOCK + token


def _reach(
    weights: Float[Array, "rows entries"], share: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The first entry at which the cumulative weight reaches a share of the whole, and the share of that entry's own
    weight at which it does, in (0, 1]."""
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
    target = (share * cumulative.max(axis=-1))[:, None]
    entry = jnp.argmax(cumulative >= target, axis=-1)[:, None]
    weight = jnp.take_along_axis(weights, entry, axis=-1)
    left = 1.0 - (jnp.take_along_axis(cumulative, entry, axis=-1) - target) / weight
    return entry[:, 0], jnp.clip(left[:, 0], jnp.finfo(jnp.float32).tiny, 1.0)


def sample(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    forbidden: Bool[Array | np.ndarray, " vocab"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """A token a row, its log-probability under the policy, and that under the distribution it was drawn from.

    `logits` fp32. The policy's is at the sampling temperature before truncation, forbidden tokens excluded: what the
    trainer recomputes. Temperature 0 takes the most likely token; the policy's is then at temperature 1, the other 0.
    """
    logits = jnp.where(forbidden, _MASKED, logits)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
        policy = _chosen(logits, tokens)
        return tokens.astype(jnp.int32), policy, jnp.zeros_like(policy)
    logits = logits / temperature
    candidates = truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = _draw(candidates, keys)
    policy = _chosen(logits, tokens)
    return tokens.astype(jnp.int32), policy, policy if candidates is logits else _chosen(candidates, tokens)


def sample_own(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    forbidden: Bool[Array | np.ndarray, " vocab"],
    own: OwnSampling,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """`sample`, each row in its own way: the same token and log-probabilities as if all were sampled like it."""
    logits = jnp.where(forbidden, _MASKED, logits)
    greedy = own.temperature == 0
    logits = logits / jnp.where(greedy, 1.0, own.temperature)[:, None]
    candidates = truncate_own(logits, own)
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), _draw(candidates, keys))
    drawn = jnp.where(greedy, 0.0, _chosen(candidates, tokens))
    return tokens.astype(jnp.int32), _chosen(logits, tokens), drawn


def _chosen(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Log-probability of a token a row."""
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
