"""Supervised learning of conversations (the cold start): token-mean cross-entropy, one program a step."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from hdpo_jax.algorithm.accumulation import Tally, accumulate
from hdpo_jax.algorithm.forward import row_states
from hdpo_jax.algorithm.state import TrainState, apply_gradients
from hdpo_jax.types import PackedRows
from models.logprobs import token_logprobs

Metrics = Mapping[str, Float[Array, ""]]


class SupervisedBatch(NamedTuple):
    """The conversations of one optimizer step."""

    rows: PackedRows
    """Leaves are [micro, rows, ...]; `loss_mask` marks the targets to learn."""
    micro_batches: Int[Array, ""]
    """How many micro-batches hold rows; they come first, and the others are never computed."""


def make_sft_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, shardings: TrainState | None = None
) -> jax.stages.Wrapped:
    """A jitted `step(state, batch) -> (TrainState, metrics)`; the old state's buffers are donated to the new one.

        loss = -sum_m log p(target) / |m|        m: the learned tokens of the whole batch

    `shardings` (`state_shardings`) is needed on a mesh, as in `make_update`.
    """

    def loss(params: PyTree, rows: PackedRows, tokens: Float[Array, ""]) -> tuple[Float[Array, ""], Tally]:
        logp = token_logprobs(*row_states(graphdef, params, rows), rows.targets, wanted=rows.loss_mask)
        part = -logp.sum() / jnp.maximum(tokens, 1)
        return part, Tally(sums={"loss/total": part}, maxima={})

    out_shardings = None if shardings is None else (shardings, None)

    @partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def step(state: TrainState, batch: SupervisedBatch) -> tuple[TrainState, Metrics]:
        tokens = batch.rows.loss_mask.sum().astype(jnp.float32)
        tally, grads = accumulate(
            partial(loss, tokens=tokens),
            state.params,
            batch.rows,
            start=0,
            stop=batch.micro_batches,
            shardings=None if shardings is None else shardings.params,
        )
        params, opt_state, metrics = apply_gradients(optimizer, state.params, state.opt_state, grads)
        metrics = {**tally.sums, **metrics, "tokens/learned": tokens}
        return TrainState(params, opt_state, state.step + 1), metrics

    return step
