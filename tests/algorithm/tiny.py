"""A one-layer language model and random rollouts, small enough that whole steps are computed twice in a test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hdpo_jax.types import PackedRows

VOCAB, WIDTH = 16, 8


class TinyLM(nnx.Module):
    """Embedding, one attention layer that sees what the real model sees, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(rngs.params(), shape) * 0.5

        self.embedding = nnx.Param(normal(VOCAB, WIDTH), axes=("vocab", "embed"))
        self.mix = nnx.Param(normal(3, WIDTH, WIDTH), axes=("embed", "mlp"))
        self.output = nnx.Param(normal(WIDTH, VOCAB), axes=("embed", "vocab"))

    @property
    def head(self) -> jax.Array:
        return self.output[...]

    def hidden_states(self, input_ids, *, positions, segment_ids, prefix_ids, images=None, experts=None):
        x = self.embedding[...][input_ids] + jnp.sin(positions[..., :1] * jnp.arange(1, WIDTH + 1) / 3)
        query, key, value = (x @ matrix for matrix in self.mix[...])
        own = segment_ids[:, :, None] == segment_ids[:, None, :]
        shared = prefix_ids[:, :, None] == segment_ids[:, None, :]
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        visible = (own | shared) & causal & (segment_ids[:, None, :] > 0)
        scores = jnp.where(visible, jnp.einsum("rqd,rkd->rqk", query, key), -1e9)
        return x + jax.nn.softmax(scores) @ value


@dataclass(frozen=True, kw_only=True)
class Rollout:
    index: int
    prompt: np.ndarray
    response: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray


def random_rollouts(seed: int, prompts: int, group: int) -> list[Rollout]:
    """Prompts of 2 to 4 tokens, responses of 2 to 6 in which an observation of 1 or 2 tokens may stand.

    The last id of the vocabulary stands in prompts and observations only: tests forbid it to the sampler.
    """
    rng = np.random.default_rng(seed)
    rollouts = []
    for prompt in range(prompts):
        question = rng.integers(0, VOCAB, rng.integers(2, 5))
        for sample in range(group):
            length = int(rng.integers(2, 7))
            sampled = np.ones(length, bool)
            if length > 3:
                sampled[1 : 1 + rng.integers(1, 3)] = False
            response = np.where(sampled, rng.integers(0, VOCAB - 1, length), VOCAB - 1)
            rollouts.append(
                Rollout(
                    index=prompt * group + sample,
                    prompt=question,
                    response=response,
                    sampled=sampled,
                    logprobs=np.where(sampled, rng.normal(-2.0, 0.3, length), 0).astype(np.float32),
                )
            )
    return rollouts


def pack_row(rollouts: Sequence[Rollout], tokens: int, *, share_prompts: bool) -> PackedRows:
    """One row: every rollout behind its own copy of the prompt, or all rollouts of a prompt behind one."""
    fields: dict[str, list[int]] = {
        name: [] for name in PackedRows._fields if name not in ("images", "positions", "experts")
    }
    at: list[int] = []
    numbers: dict[bytes, int] = {}
    count = 0

    def extend(ids, targets, first, segment, prefix, mask, rollout, logprobs) -> None:
        fields["token_ids"].extend(ids)
        fields["targets"].extend(targets)
        fields["segment_ids"].extend([segment] * len(ids))
        fields["prefix_ids"].extend([prefix] * len(ids))
        fields["loss_mask"].extend(mask)
        fields["rollout"].extend(np.where(mask, rollout, 0))
        fields["logprobs"].extend(logprobs)
        fields["sampled_logprobs"].extend(logprobs)
        at.extend(range(first, first + len(ids)))

    for rollout in rollouts:
        last = len(rollout.prompt) - 1
        name = rollout.prompt.tobytes() if share_prompts else bytes([rollout.index])
        if name not in numbers:
            count += 1
            numbers[name] = count
            nothing = np.zeros(last)
            extend(rollout.prompt[:last], rollout.prompt[1:], 0, count, count, nothing.astype(bool), 0, nothing)
        count += 1
        extend(
            [rollout.prompt[-1], *rollout.response[:-1]],
            rollout.response,
            last,
            count,
            numbers[name],
            rollout.sampled,
            rollout.index,
            rollout.logprobs,
        )
    room = tokens - len(at)
    assert room >= 0, f"{len(at)} tokens in a row of {tokens}"
    dtypes = {"loss_mask": bool, "logprobs": np.float32, "sampled_logprobs": np.float32}
    arrays: dict[str, Any] = {
        name: np.pad(np.array(values, dtypes.get(name, np.int32)), (0, room)) for name, values in fields.items()
    }
    arrays["positions"] = np.repeat(np.pad(np.array(at, np.int32), (0, room))[:, None], 3, axis=1)
    return PackedRows(**arrays, images=None)


def stack_rows(rows: Sequence[PackedRows], micro_batches: int, rows_each: int) -> PackedRows:
    """[micro, rows, ...]: the rows in order, empty ones behind them."""
    empty = jax.tree.map(np.zeros_like, rows[0])
    padded = [*rows, *[empty] * (micro_batches * rows_each - len(rows))]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(micro_batches, rows_each, *leaves[0].shape), *padded)
