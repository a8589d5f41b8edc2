"""Group advantages of HDPO's two channels (arXiv:2604.08545) and of the baselines it is compared with.

Arrays are [prompts, rollouts]: a row is one prompt's group. A dropped rollout (mask False) counts nowhere, whatever its
reward says, NaN included.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hdpo_jax.config import AlgorithmConfig


def group_advantages(
    rewards: Float[Array, "prompts rollouts"],
    mask: Bool[Array, "prompts rollouts"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "prompts rollouts"]:
    """Rewards standardised within each group (GRPO, arXiv:2402.03300).

        A_i = (r_i - mean(r)) / (std(r) + eps)        mean, std (ddof = 1) over the group's rollouts in `mask`

    0 outside `mask`, and exactly 0 where a group has nothing to compare: fewer than two rollouts, or equal rewards.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    mask = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)
    count = mask.sum(-1, keepdims=True)
    mean = jnp.where(mask, rewards, 0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(mask, rewards - mean, 0)
    std = jnp.sqrt(jnp.square(deviation).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1))
    # The mean of equal rewards may be off by a rounding error, which eps would magnify a million times.
    highest = jnp.where(mask, rewards, -jnp.inf).max(-1, keepdims=True)
    lowest = jnp.where(mask, rewards, jnp.inf).min(-1, keepdims=True)
    return jnp.where(mask & (highest > lowest), deviation / (std + eps), 0)


def conditional_group_advantages(
    rewards: Float[Array, "prompts rollouts"],
    qualifying: Bool[Array, "prompts rollouts"],
    mask: Bool[Array, "prompts rollouts"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "prompts rollouts"]:
    """Rewards standardised among each group's qualifying rollouts: conditional GRPO, HDPO's efficiency channel.

    Q = qualifying and in mask;    A_i = (r_i - mean_Q(r)) / (std_Q(r) + eps) if i in Q and |Q| >= 2, else 0
    """
    qualifying = jnp.asarray(qualifying, bool)
    return group_advantages(rewards, qualifying if mask is None else qualifying & mask, eps=eps)


class Advantages(NamedTuple):
    """What the loss needs to know of every rollout."""

    acc: Float[Array, "prompts rollouts"]
    tool: Float[Array, "prompts rollouts"]
    tool_rollouts: Bool[Array, "prompts rollouts"]
    """Whose tokens the tool term's mean runs over."""
    qualifying: Bool[Array, "prompts rollouts"]
    """Compared with another rollout in the tool channel, whether or not their rewards differ."""


def channel_advantages(
    algorithm: AlgorithmConfig,
    *,
    accuracy_rewards: Float[Array, "prompts rollouts"],
    tool_rewards: Float[Array, "prompts rollouts"],
    calls: Float[Array, "prompts rollouts"] | Int[Array, "prompts rollouts"],
    correct: Bool[Array, "prompts rollouts"],
    usable: Bool[Array, "prompts rollouts"],
) -> Advantages:
    """Advantages of both channels from raw rewards, by `algorithm.advantages`.

    hdpo             A_acc = group(r_acc)                A_tool = group(r_tool) among the correct
    unconditional    A_acc = group(r_acc)                A_tool = group(r_tool)      (GDPO, arXiv:2601.05242)
    coupled_calls    A_acc = group(r_acc - alpha T)      A_tool = 0
    coupled_reward   A_acc = group(r_acc + alpha r_tool) A_tool = 0
    """
    match algorithm.advantages:
        case "hdpo":
            objective, compared = accuracy_rewards, correct & usable
        case "unconditional":
            objective, compared = accuracy_rewards, usable
        case "coupled_calls":
            objective, compared = accuracy_rewards - algorithm.coupling * calls, jnp.zeros_like(usable)
        case "coupled_reward":
            objective, compared = accuracy_rewards + algorithm.coupling * tool_rewards, jnp.zeros_like(usable)
    tool = conditional_group_advantages(tool_rewards, compared)
    qualifying = compared & (compared.sum(-1, keepdims=True) >= 2)
    tool_rollouts = {"nonzero": tool != 0, "qualifying": qualifying, "all": usable}[algorithm.tool_mean_over]
    return Advantages(group_advantages(objective, usable), tool, tool_rollouts, qualifying)
