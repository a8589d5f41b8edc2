"""One HDPO step (arXiv:2604.08545) as one program: raw rewards in, new state and metrics out."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from hdpo_jax.algorithm.accumulation import Tally, accumulate, take
from hdpo_jax.algorithm.advantages import Advantages, channel_advantages
from hdpo_jax.algorithm.forward import row_states
from hdpo_jax.algorithm.losses import TokenCounts, hdpo_token_loss, importance_weights
from hdpo_jax.algorithm.state import TrainState, apply_gradients
from hdpo_jax.config import AlgorithmConfig
from hdpo_jax.types import PackedRows
from models.logprobs import TokenLogprobs, token_logprobs_and_entropy

Metrics = Mapping[str, Float[Array, ""]]


class UpdateBatch(NamedTuple):
    """All rollouts of a step: P prompts in mini-batch order, G rollouts each."""

    rows: PackedRows
    """Leaves are [mini, micro, rows, ...]: a mini-batch is one optimizer step on an equal share of the prompts.

    `rows.rollout` indexes the flat [P * G] of the whole batch."""
    micro_batches: Int[Array, " mini"]
    """How many of each mini-batch's micro-batches hold rows; they come first, and the others are never computed."""
    accuracy_rewards: Float[Array, "prompts rollouts"]
    tool_rewards: Float[Array, "prompts rollouts"]
    calls: Float[Array, "prompts rollouts"]
    correct: Bool[Array, "prompts rollouts"]
    usable: Bool[Array, "prompts rollouts"]
    """False: dropped, masked out of advantages and losses."""


class TokenBatch(NamedTuple):
    """Packed rows with what the loss needs at every token; micro-batches stacked along the leading axis."""

    rows: PackedRows
    logp_old: Float[Array, "micro rows tokens"]
    acc_advantages: Float[Array, "micro rows tokens"]
    tool_advantages: Float[Array, "micro rows tokens"]
    acc_mask: Bool[Array, "micro rows tokens"]
    tool_mask: Bool[Array, "micro rows tokens"]


def make_update(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    forbidden: Bool[np.ndarray, " vocab"] | None = None,
    shardings: TrainState | None = None,
) -> jax.stages.Wrapped:
    """A jitted `update(state, batch) -> (TrainState, metrics)`; the old state's buffers are donated to the new one.

    `temperature` and `forbidden` (ids that can not be sampled) are the sampler's. `shardings` (`state_shardings`) is
    needed on a mesh: it keeps the new state, and the gradients on their way to it, where the old state was.
    """
    if temperature <= 0:
        raise ValueError(
            f"the sampling temperature is {temperature}; learning needs one above 0, as in rollout.temperature 1"
        )

    def log_probs(params: PyTree, rows: PackedRows) -> TokenLogprobs:
        """Log-probability of each target to learn, and the entropy there, under the distribution sampled from."""
        mask = None if forbidden is None else jnp.asarray(forbidden)
        hidden, head = row_states(graphdef, params, rows)
        return token_logprobs_and_entropy(
            hidden, head, rows.targets, temperature=temperature, forbidden=mask, wanted=rows.loss_mask
        )

    def loss(
        params: PyTree, tokens: TokenBatch, counts: TokenCounts, on_policy: Bool[Array, ""]
    ) -> tuple[Float[Array, ""], Tally]:
        """A micro-batch's part of its mini-batch's loss."""
        logp, entropy = log_probs(params, tokens.rows)
        logp_old = jnp.where(on_policy, jax.lax.stop_gradient(logp), tokens.logp_old)
        cap = algorithm.importance_cap
        weights = importance_weights(logp_old, tokens.rows.sampled_logprobs, cap) if cap else None
        part, metrics = hdpo_token_loss(
            logp,
            logp_old,
            tokens.acc_advantages,
            tokens.tool_advantages,
            tokens.acc_mask,
            tokens.tool_mask,
            counts,
            w_acc=algorithm.w_acc,
            w_tool=algorithm.w_tool,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            importance=weights,
        )
        gap = jnp.where(tokens.acc_mask, jnp.abs(logp_old - tokens.rows.logprobs), 0)
        sampled = jnp.maximum(counts.acc, 1)
        sums = {
            **metrics,
            "policy/entropy": jnp.where(tokens.acc_mask, entropy, 0).sum() / sampled,
            "policy/logprob_gap_mean": gap.sum() / sampled,
        }
        if weights is not None:
            sums["policy/importance_mean"] = jnp.where(tokens.acc_mask, weights, 0).sum() / sampled
            sums["policy/importance_cap_share"] = (tokens.acc_mask & (weights >= cap)).sum() / sampled
        return part, Tally(sums=sums, maxima={"policy/logprob_gap_max": gap.max()})

    def old_log_probs(params: PyTree, rows: PackedRows, starts: Array, stops: Array) -> Array:
        """Log-probs before the step, of all mini-batches but the first: that one starts from these very parameters."""

        def write(index: Int[Array, ""], buffer: Array) -> Array:
            logp = log_probs(params, take(rows, index)).logprobs
            return jax.lax.dynamic_update_index_in_dim(buffer, logp, index, axis=0)

        def write_mini(mini: Int[Array, ""], buffer: Array) -> Array:
            with jax.named_scope("micro_batches"):
                return jax.lax.fori_loop(starts[mini], stops[mini], write, buffer)

        return jax.lax.fori_loop(1, len(starts), write_mini, jnp.zeros(rows.token_ids.shape, jnp.float32))

    out_shardings = None if shardings is None else (shardings, None)

    @partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def update(state: TrainState, batch: UpdateBatch) -> tuple[TrainState, Metrics]:
        minis, micros = batch.rows.token_ids.shape[:2]
        advantages = channel_advantages(
            algorithm,
            accuracy_rewards=batch.accuracy_rewards,
            tool_rewards=batch.tool_rewards,
            calls=batch.calls,
            correct=batch.correct,
            usable=batch.usable,
        )
        # Mini- and micro-batches become one axis, so that the loops index the rows where they lie and copy none.
        rows = jax.tree.map(lambda leaf: leaf.reshape(minis * micros, *leaf.shape[2:]), batch.rows)
        starts = jnp.arange(minis) * micros
        stops = starts + batch.micro_batches
        acc_mask = rows.loss_mask & batch.usable.ravel()[rows.rollout]
        tool_mask = acc_mask & advantages.tool_rollouts.ravel()[rows.rollout]
        tokens = TokenBatch(
            rows=rows,
            logp_old=old_log_probs(state.params, rows, starts, stops),
            acc_advantages=advantages.acc.ravel()[rows.rollout],
            tool_advantages=advantages.tool.ravel()[rows.rollout],
            acc_mask=acc_mask,
            tool_mask=tool_mask,
        )
        counts = TokenCounts(*(mask.reshape(minis, -1).sum(-1).astype(jnp.float32) for mask in (acc_mask, tool_mask)))

        def mini_batch(carry: tuple, mini: tuple) -> tuple[tuple, tuple]:
            params, opt_state = carry
            start, stop, mini_counts = mini
            tally, grads = accumulate(
                partial(loss, counts=mini_counts, on_policy=start == 0),
                params,
                tokens,
                start=start,
                stop=stop,
                shardings=None if shardings is None else shardings.params,
            )
            params, opt_state, step_metrics = apply_gradients(optimizer, params, opt_state, grads)
            return (params, opt_state), (tally, step_metrics)

        (params, opt_state), (tally, step_metrics) = jax.lax.scan(
            mini_batch, (state.params, state.opt_state), (starts, stops, counts)
        )
        metrics = {
            **jax.tree.map(jnp.mean, {**tally.sums, "optimizer/grad_norm": step_metrics["optimizer/grad_norm"]}),
            **jax.tree.map(jnp.max, tally.maxima),
            "optimizer/skipped": step_metrics["optimizer/skipped"].sum(),
            **advantage_metrics(advantages, batch.usable),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return update


def advantage_metrics(advantages: Advantages, usable: Bool[Array, "prompts rollouts"]) -> Metrics:
    """Shares of the usable rollouts that carry a signal in each channel, and how strong it is among those."""

    def share(mask: Bool[Array, "prompts rollouts"]) -> Float[Array, ""]:
        return mask.sum() / jnp.maximum(usable.sum(), 1)

    def strength(values: Float[Array, "prompts rollouts"]) -> Float[Array, ""]:
        return jnp.abs(values).sum() / jnp.maximum((values != 0).sum(), 1)

    return {
        "advantage/acc_nonzero_share": share(advantages.acc != 0),
        "advantage/acc_strength": strength(advantages.acc),
        "advantage/tool_strength": strength(advantages.tool),
        "tool/qualifying_share": share(advantages.qualifying),
        "tool/nonzero_share": share(advantages.tool != 0),
        "tool/mean_over_share": share(advantages.tool_rollouts),
    }
