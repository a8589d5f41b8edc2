"""What speculative decoding would bring on real rollouts: tokens that a draft guesses, against what checking it costs.

A draft is exact in distribution: a token is sampled where the draft has one, with the key that it has anyway, and as
far as they are equal they are kept. So how far a draft reaches is counted on trajectories that are there already.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from configs.signs_hdpo import get_config
from hdpo_jax.config import ModelConfig, RolloutConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.rollout.sampling import sample
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.policy import Policy, load_policy
from models.qwen3_vl import KVCache, decoding_layout
from models.qwen3_vl.cache import unshared_table
from sharding.mesh import MeshAxes
from tests.bench.table import Row

LENGTHS = (1, 2, 4, 8)
"""Tokens of a draft."""
NGRAM = 3
"""Tokens that are looked up, at most."""
Sampled = tuple[Sequence[int], Sequence[bool]]
"""Token ids of a rollout, and which of them were sampled."""
Followed = dict[tuple[int, ...], Sequence[int]]
"""What followed an n-gram."""
PASSES = 12
"""Of each width, timed."""


def rows(run: Path) -> Iterator[Row]:
    """For a quickstart's folder: its cold start, which calls tools nearly always, at its sampler's sizes."""
    config = get_config()
    policy = load_policy(ModelConfig(path=str(run / "sft" / "hf"), dtype="float32"), MeshAxes())
    prompts = list(islice(PromptDataset(run / "data" / "test.parquet"), 2 * config.train.prompts_per_step))
    with ToolBox(config.tools) as toolbox:
        sampler = policy.sampler(toolbox, agent=config.agent, rollout=config.rollout, seed=0)
        found = sampler.sample(policy.params, prompts, samples=config.train.group_size, step=0)
    rollouts = [(one.token_ids.tolist(), one.sampled.tolist()) for one in found]
    earlier, later = rollouts[: len(found) // 2], rollouts[len(found) // 2 :]
    cost = pass_costs(policy, config.rollout)
    for where, others in (("its own trajectory", []), ("its own trajectory and those of a step before", earlier)):
        pool = [ids for ids, _ in others]
        for length in LENGTHS:
            tokens = tokens_a_pass(later, length, pool)
            yield Row(
                f"drafts of {length} looked up in {where}: {tokens:.2f} tokens a pass, a pass costs",
                cost[length + 1] / cost[1],
                1.0,
                tokens * cost[1] / cost[length + 1],
                unit="steps",
            )


def tokens_a_pass(rollouts: Sequence[Sampled], length: int, pool: Sequence[Sequence[int]] = ()) -> float:
    """Sampled tokens over the passes that they take with drafts of `length`, of which a pass checks one a rollout.

    Drafts are looked up in the rollout so far, and in the token ids of `pool`.
    """
    known: Followed = {}
    for ids in pool:
        remember(known, ids, 0, len(ids), length)
    tokens = passes = 0
    for ids, sampled in rollouts:
        own, seen, at = dict(known), 0, 0
        while at < len(ids):
            if not sampled[at]:
                at += 1
                continue
            remember(own, ids, seen, at, length)
            turn = next((place for place in range(at, len(ids)) if not sampled[place]), len(ids))
            guess, real = draft(own, ids[:at]), ids[at:turn]
            kept = next((n for n, (one, other) in enumerate(zip(guess, real, strict=False)) if one != other), None)
            kept = min(len(guess), len(real)) if kept is None else kept
            # One more, sampled where the draft is wrong or ends, in the same pass; none after the end of the turn.
            new = min(kept + 1, len(real))
            seen, tokens, passes, at = at, tokens + new, passes + 1, at + new
    return tokens / passes


def remember(known: Followed, ids: Sequence[int], begin: int, end: int, length: int) -> None:
    """Adds what followed the n-grams that end from `begin` on, up to `length` tokens; the latest is kept.

    Ends before `begin` are gone through again as far as what follows them may have grown.
    """
    for at in range(max(begin - length, 1), end):
        for size in range(1, min(NGRAM, at) + 1):
            known[tuple(ids[at - size : at])] = ids[at : min(at + length, end)]


def draft(known: Followed, ids: Sequence[int]) -> Sequence[int]:
    """What followed the longest n-gram that is known of those that `ids` end in."""
    for size in range(NGRAM, 0, -1):
        if (found := known.get(tuple(ids[-size:]))) is not None:
            return found
    return []


def pass_costs(policy: Policy, config: RolloutConfig) -> dict[int, float]:
    """Seconds of a pass over every slot, by tokens a slot: the model, logits, and a token sampled for each of them."""
    width = config.pages_a_row
    table = unshared_table(config.slots, width)

    platform = policy.mesh.devices.flat[0].platform
    structure, lay_out = decoding_layout(policy.model, platform=platform, rows=config.slots)
    laid_out = lay_out(policy.params)

    def one_pass(params: nnx.State, cache: KVCache, token_ids: Array) -> tuple[KVCache, Array]:
        model = nnx.merge(structure, params)
        start = jnp.full(config.slots, config.capacity // 2)
        index = start[:, None] + jnp.arange(token_ids.shape[1])
        positions = jnp.broadcast_to(index[..., None], (*index.shape, 3))
        hidden, cache, _ = model.extend(token_ids, positions=positions, cache=cache, table=table, start=start)
        logits = model.logits(hidden).reshape(token_ids.size, -1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(token_ids.size))
        forbidden = jnp.asarray(policy.processor.forbidden)
        return cache, sample(logits, keys, forbidden, temperature=config.temperature)[0]

    run = jax.jit(one_pass, donate_argnums=1)
    widths = [1, *(length + 1 for length in LENGTHS)]
    seconds: dict[int, list[float]] = {tokens: [] for tokens in widths}
    cache = KVCache.zeros(
        policy.model.config, pages=1 + config.slots * width, page=config.page, dtype=policy.model.dtype
    )
    for _ in range(PASSES):
        for tokens in widths:
            ids = np.zeros((config.slots, tokens), np.int32)
            started = time.perf_counter()
            cache, _ = jax.block_until_ready(run(laid_out, cache, ids))
            seconds[tokens].append(time.perf_counter() - started)
    return {tokens: median(found[2:]) for tokens, found in seconds.items()}
