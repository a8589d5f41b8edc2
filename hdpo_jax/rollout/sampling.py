"""The next token from its logits, with a key that knows only the trajectory and the position."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_MASKED = -jnp.inf


def truncate(logits: Float[Array, "rows vocab"], *, top_k: int, top_p: float) -> Float[Array, "rows vocab"]:
    """Logits with all but the `top_k` most likely tokens, and all beyond the `top_p` nucleus, set to -inf.

    The most likely token always stays. `top_k` 0 and `top_p` 1 leave everything as it is.
    Source: nucleus sampling, arXiv:1904.09751.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, _MASKED, logits)
    if top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        mass_before = jnp.cumsum(jax.nn.softmax(descending), axis=-1) - jax.nn.softmax(descending)
        least = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, _MASKED, logits)
    return logits


def _invert(probabilities: Float[Array, "rows vocab"], keys: Key[Array, " rows"]) -> Int[Array, " rows"]:
    """The first token at which the cumulative probability reaches a uniform number in (0, 1].

    One random number a row; Gumbel noise takes one a vocabulary entry, and six times as long on a CPU. A parallel sum
    is not quite monotone, so without the mask one draw in millions would fall on a token of probability zero.
    """
    uniform = 1.0 - jax.vmap(jax.random.uniform)(keys)
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), -jnp.inf)
    total = jnp.max(cumulative, axis=-1)
    return jnp.argmax(cumulative >= (uniform * total)[:, None], axis=-1)


def sample(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    forbidden: Bool[Array | np.ndarray, " vocab"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """A token a row, and its log-probability at the sampling temperature before truncation.

    `logits` fp32. Temperature 0 takes the most likely token and reports log-probabilities at temperature 1.
    That distribution is the one the trainer recomputes, forbidden tokens excluded from both.
    """
    logits = jnp.where(forbidden, _MASKED, logits)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        logits = logits / temperature
        candidates = truncate(logits, top_k=top_k, top_p=top_p)
        tokens = _invert(jax.nn.softmax(candidates), keys)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
