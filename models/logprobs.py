"""Log-probabilities of given tokens, from hidden states, never holding logits of all tokens at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from sharding import RULES, constrain, shards, spec


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
    block: int = 256,
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
    block: int = 256,
) -> TokenLogprobs:
    """Log-probabilities of the targets and the entropy (nats) of the distributions they come from.

    forbidden: ids that the sampler never draws; they have no share in the normalisation.
    wanted: the tokens to look at, by default all; the others get 0 and are not computed.
    block: tokens whose logits a device holds at a time, also in the backward pass, which computes them again.
    """
    shape = targets.shape
    length, embed = hidden.shape[-2:]
    hidden, targets = hidden.reshape(-1, length, embed), targets.reshape(-1, length)
    wanted = jnp.broadcast_to(True, targets.shape) if wanted is None else wanted.reshape(-1, length)
    forbidden = jnp.zeros(head.shape[-1], bool) if forbidden is None else forbidden
    # A block takes some tokens of every row, so that rows stay on the devices that hold them.
    devices = _parts("batch", len(targets)) * shards("tokens")
    span = min(length, max(1, block * devices // len(targets)))
    found = _of_rows(temperature, span, hidden, head, targets, wanted, forbidden)
    return jax.tree.map(lambda values: values.reshape(shape), found)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_rows(
    temperature: float,
    span: int,
    hidden: Float[Array, "rows tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "rows tokens"],
    wanted: Bool[Array, "rows tokens"],
    forbidden: Bool[Array, " vocab"],
) -> TokenLogprobs:
    """With a derivative of its own: a loop that ends with the last wanted token has none that JAX could find."""
    return _forward(temperature, span, hidden, head, targets, wanted, forbidden)[0]


def _forward(
    temperature: float, span: int, hidden: Array, head: Array, targets: Array, wanted: Array, forbidden: Array
) -> tuple[TokenLogprobs, tuple[Array, ...]]:
    blocks = _Blocks(wanted, span)
    hidden, targets = blocks.gather(hidden), blocks.gather(targets)

    def look(at: Array, found: TokenLogprobs) -> TokenLogprobs:
        of_all = _log_softmax(blocks.read(hidden, at), head, forbidden, temperature)
        chosen = jnp.take_along_axis(of_all, blocks.read(targets, at)[..., None], axis=-1)[..., 0]
        # Forbidden ids: 0 * -inf is to count as 0.
        entropy = -jnp.sum(jnp.exp(of_all) * jnp.where(forbidden, 0, of_all), axis=-1)
        return blocks.write(found, TokenLogprobs(chosen, entropy), at)

    nothing = jnp.zeros(targets.shape, jnp.float32)
    found = blocks.loop(look, TokenLogprobs(nothing, nothing))
    return jax.tree.map(blocks.scatter, found), (hidden, head, targets, wanted, forbidden, found.entropy)


def _backward(
    temperature: float, span: int, kept: tuple[Array, ...], slopes: TokenLogprobs
) -> tuple[Array | None, ...]:
    """Of logit i with probability p_i: d logprob = [i is the target] - p_i, d entropy = -p_i (log p_i + entropy).

    Devices add up the head's gradient of their own rows, and add up among each other once, after the loop.
    """
    hidden, head, targets, wanted, forbidden, entropy = kept
    blocks = _Blocks(wanted, span)
    of_token = (hidden, targets, entropy, *(blocks.gather(jnp.where(wanted, slope, 0)) for slope in slopes))
    parts, stretches = _parts("batch", len(targets)), _parts("tokens", span)

    def by_device(array: Float[Array, "rows span width"]) -> Float[Array, "parts stretches tokens width"]:
        split = array.reshape(parts, -1, stretches, span // stretches, array.shape[-1])
        return split.swapaxes(1, 2).reshape(parts, stretches, -1, array.shape[-1])

    def look(at: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets, *values = (blocks.read(each, at) for each in of_token)
        entropy, by_logprob, by_entropy = (value[..., None] for value in values)
        of_all = _log_softmax(hidden, head, forbidden, temperature)
        spread = by_logprob + by_entropy * (jnp.where(forbidden, 0, of_all) + entropy)
        is_target = jnp.arange(head.shape[-1]) == targets[..., None]
        slope = (jnp.where(is_target, by_logprob, 0) - jnp.exp(of_all) * spread) / temperature
        slope = slope.astype(hidden.dtype)
        of_hidden = jnp.einsum("rtv,ev->rte", slope, head.astype(hidden.dtype))
        of_head = jnp.einsum("pste,pstv->psev", by_device(hidden), by_device(slope), preferred_element_type=jnp.float32)
        return blocks.write(gradients[0], of_hidden, at), constrain(gradients[1] + of_head, *apart)

    apart = ("batch", "tokens", None, "vocab")
    nothing = constrain(jnp.zeros((parts, stretches, *head.shape), jnp.float32), *apart)
    of_hidden, of_head = blocks.loop(look, (jnp.zeros_like(hidden), nothing))
    of_head = constrain(of_head.sum(axis=(0, 1)), "embed", "vocab")
    return blocks.scatter(of_hidden), of_head.astype(head.dtype), None, None, None


_of_rows.defvjp(_forward, _backward)


def _log_softmax(hidden: Array, head: Array, forbidden: Array, temperature: float) -> Float[Array, "rows span vocab"]:
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    return jax.nn.log_softmax(jnp.where(forbidden, -jnp.inf, logits))


class _Blocks:
    """The wanted tokens of rows, gathered at the rows' beginnings, `span` of every row at a time."""

    def __init__(self, wanted: Bool[Array, "rows tokens"], span: int):
        self._wanted, self._span = wanted, span
        self._order = jnp.argsort(~wanted, axis=-1)
        self._place = jnp.argsort(self._order, axis=-1)
        self._count = -(-wanted.sum(axis=-1).max() // span)

    def gather(self, values: Shaped[Array, "rows tokens ..."]) -> Shaped[Array, "rows padded ..."]:
        values = _pick(values, self._order)
        return jnp.pad(values, ((0, 0), (0, -values.shape[1] % self._span), *[(0, 0)] * (values.ndim - 2)))

    def scatter(self, values: Shaped[Array, "rows padded ..."]) -> Shaped[Array, "rows tokens ..."]:
        """Back to where they were; 0 where no token is wanted."""
        values = _pick(values, self._place)
        return jnp.where(self._wanted.reshape(*self._wanted.shape, *[1] * (values.ndim - 2)), values, 0)

    def loop(self, look: Callable[[Array, Any], Any], found: Any) -> Any:
        with jax.named_scope("vocabulary"):
            return jax.lax.fori_loop(0, self._count, look, found)

    def read(self, values: Array, at: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(values, at * self._span, self._span, axis=1)
        return constrain(block, "batch", "tokens", *[None] * (values.ndim - 2))

    def write(self, values: Any, block: Any, at: Array) -> Any:
        def of_leaf(values: Array, block: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(values, block, at * self._span, axis=1)

        return jax.tree.map(of_leaf, values, block)


def _pick(values: Shaped[Array, "rows tokens ..."], at: Int[Array, "rows picked"]) -> Shaped[Array, "rows picked ..."]:
    return jax.vmap(lambda row, at: row[at])(values, at)


def _parts(logical_axis: str, size: int) -> int:
    """Over how many devices a dimension of this size is split on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return size // NamedSharding(mesh, spec(RULES, (logical_axis,), mesh, (size,))).shard_shape((size,))[0]
