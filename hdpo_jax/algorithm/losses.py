"""HDPO's policy loss (arXiv:2604.08545): a clipped surrogate for each channel, joined only here."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def importance_ratio(logp: Float[Array, "*tokens"], logp_old: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """How much likelier a token is now than when it was sampled: exp(clip(logp - logp_old, -20, 20))."""
    return jnp.exp(jnp.clip(logp - logp_old, -20.0, 20.0))


def importance_weights(
    logp_old: Float[Array, "*tokens"], sampled_logp: Float[Array, "*tokens"], cap: float
) -> Float[Array, "*tokens"]:
    """How much likelier the learning policy was to sample a token than the one that did, `cap` at most.

        w = min(exp(clip(logp_old - sampled_logp, -20, 20)), cap)        (truncated importance sampling)

    `sampled_logp` is under the distribution that the token was drawn from.
    """
    return jnp.minimum(importance_ratio(logp_old, sampled_logp), cap)


def clipped_surrogate(
    ratio: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Float[Array, "*tokens"]:
    """Loss of each token (PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729).

    L(A) = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));    for A < 0: min(L, -dual_clip A)
    """
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


class TokenCounts(NamedTuple):
    """How many tokens of the mini-batch each term's mean runs over."""

    acc: Float[Array, ""]
    tool: Float[Array, ""]


def hdpo_token_loss(
    logp: Float[Array, "*tokens"],
    logp_old: Float[Array, "*tokens"],
    acc_advantages: Float[Array, "*tokens"],
    tool_advantages: Float[Array, "*tokens"],
    acc_mask: Bool[Array, "*tokens"],
    tool_mask: Bool[Array, "*tokens"],
    counts: TokenCounts,
    *,
    w_acc: float = 1.0,
    w_tool: float = 0.15,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    importance: Float[Array, "*tokens"] | None = None,
) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
    """The part of a mini-batch's loss that falls on these tokens; the parts add up, however it is cut.

        w_acc sum_m w L(A_acc) / |m|  +  w_tool sum_m_tool w L(A_tool) / |m_tool|

    `counts` holds |m| and |m_tool| of the *whole* mini-batch. `importance` is w, constant whatever it was made from;
    None: 1. The metrics add up over the parts as the loss does.
    """
    # Masked tokens may hold anything: they leave before exp, where a NaN would still reach the gradient.
    ratio = importance_ratio(jnp.where(acc_mask, logp, 0), jnp.where(acc_mask, logp_old, 0))
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    acc_tokens, tool_tokens = jnp.maximum(counts.acc, 1), jnp.maximum(counts.tool, 1)

    acc_losses = clipped_surrogate(ratio, acc_advantages, **clips)
    tool_losses = clipped_surrogate(ratio, tool_advantages, **clips)
    if importance is not None:
        weights = jax.lax.stop_gradient(jnp.where(acc_mask, importance, 0))
        acc_losses, tool_losses = weights * acc_losses, weights * tool_losses
    acc = jnp.where(acc_mask, acc_losses, 0).sum() / acc_tokens
    tool = jnp.where(tool_mask, tool_losses, 0).sum() / tool_tokens
    loss = w_acc * acc + w_tool * tool

    flat = jnp.where(
        acc_advantages < 0, (ratio < 1 - clip_low) | (ratio > dual_clip), (acc_advantages > 0) & (ratio > 1 + clip_high)
    )
    metrics = {
        "loss/total": loss,
        "loss/acc": acc,
        "loss/tool": tool,
        "policy/ratio_mean": jnp.where(acc_mask, ratio, 0).sum() / acc_tokens,
        "policy/clip_share": (acc_mask & flat).sum() / acc_tokens,
    }
    return loss, metrics


def hdpo_loss(
    logp: Float[Array, "rollouts tokens"],
    logp_old: Float[Array, "rollouts tokens"],
    acc_advantages: Float[Array, " rollouts"],
    tool_advantages: Float[Array, " rollouts"],
    token_mask: Bool[Array, "rollouts tokens"],
    *,
    w_acc: float = 1.0,
    w_tool: float = 0.15,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    tool_rollouts: Bool[Array, " rollouts"] | None = None,
    importance: Float[Array, "rollouts tokens"] | None = None,
) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
    """HDPO's loss of one mini-batch, a rollout a row.

        loss = w_acc mean_m(L(A_acc)) + w_tool mean_m_tool(L(A_tool))

    m: tokens of `token_mask`, those that the policy sampled. m_tool: the same, in `tool_rollouts` only (None: where the
    tool advantage is not zero). Both are means over tokens, not over rollouts; an empty one is 0. `importance` weighs
    each token's L, a constant (`importance_weights`); the means are over as many tokens as without it.
    """
    if tool_rollouts is None:
        tool_rollouts = tool_advantages != 0
    token_mask = jnp.asarray(token_mask, bool)
    tool_mask = token_mask & tool_rollouts[:, None]
    return hdpo_token_loss(
        logp,
        logp_old,
        acc_advantages[:, None],
        tool_advantages[:, None],
        token_mask,
        tool_mask,
        TokenCounts(acc=token_mask.sum(dtype=jnp.float32), tool=tool_mask.sum(dtype=jnp.float32)),
        w_acc=w_acc,
        w_tool=w_tool,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance=importance,
    )
