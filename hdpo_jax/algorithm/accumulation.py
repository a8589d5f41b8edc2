"""Gradients of a batch whose activations do not fit at once: a loop over micro-batches that adds up."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class Tally(NamedTuple):
    """Metrics of a part of a batch, by how parts join. Maxima are of values that are never negative."""

    sums: Mapping[str, Float[Array, ""]]
    maxima: Mapping[str, Float[Array, ""]]

    def join(self, other: "Tally") -> "Tally":
        return Tally(jax.tree.map(jnp.add, self.sums, other.sums), jax.tree.map(jnp.maximum, self.maxima, other.maxima))


def take(stack: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """One element of the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def accumulate(
    loss_fn: Callable[[PyTree, PyTree], tuple[Float[Array, ""], Tally]],
    params: PyTree,
    micro_batches: PyTree,
    *,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    shardings: PyTree | None = None,
) -> tuple[Tally, PyTree]:
    """Tally and fp32 gradients of sum_i loss_fn(params, micro_batches[i]), start <= i < stop.

    `micro_batches` has the micro-batch as the leading axis of every leaf. `start` and `stop` are values of the running
    program: micro-batches outside cost nothing, and other numbers of them compile nothing. `shardings` (params' own)
    keeps the sums scattered as the parameters are; without it the compiler chooses.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def scattered(grads: PyTree) -> PyTree:
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    def add(index: Int[Array, ""], total: tuple[Tally, PyTree]) -> tuple[Tally, PyTree]:
        tally, sums = total
        (_, part), grads = gradient(params, take(micro_batches, index))
        return tally.join(part), scattered(jax.tree.map(jnp.add, sums, grads))

    _, tally = jax.eval_shape(lambda: loss_fn(params, take(micro_batches, 0)))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (tally, params))
    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(start, stop, add, (nothing[0], scattered(nothing[1])))
