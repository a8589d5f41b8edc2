"""HDPO: rollouts with tools, rewards of both channels, one update program a step, resumable at any step."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hdpo_jax.algorithm.state import TrainState, abstract_state, state_shardings
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import RLConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.rewards import Verdict, score_trajectory
from hdpo_jax.rewards.outcomes import outcome, summarise
from hdpo_jax.rollout.packing import group_family, padding_share
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.sampler import RolloutStats
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.dumps import rollouts_path, trajectory_record, write_records
from hdpo_jax.train.loop import RunResult, host_batches, train
from hdpo_jax.train.optimizer import make_optimizer
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt, StopReason, Trajectory
from sharding.rules import shard_batch

FIGURES = {"reward/correct": "right", "tools/rate": "tool use", "loss/total": "loss"}


def train_rl(config: RLConfig, *, title: str = "hdpo") -> RunResult:
    """Runs, or goes on with, the reinforcement-learning run that `config` describes."""
    # First what can refuse at once: a missing sandbox should not be found after the model is loaded.
    with ToolBox(config.tools) as toolbox:
        policy = load_policy(config.model, config.mesh)
        encode = PromptEncoder(policy.processor, config.rollout, cache_mb=config.data.cache_mb)
        sampler = policy.sampler(
            toolbox, agent=config.agent, rollout=config.rollout, seed=config.train.seed, encode=encode
        )
        pack = RowBatcher(config.train, policy.model.config)
        optimizer = make_optimizer(config.optimizer, config.train.steps * config.train.mini_batches, policy.params)
        update = make_update(
            policy.graphdef,
            optimizer,
            config.algorithm,
            temperature=config.rollout.temperature,
            forbidden=policy.processor.forbidden,
            shardings=state_shardings(abstract_state(policy.params, optimizer)),
        )
        dataset = PromptDataset(config.data.path, max_bad_rows=config.data.max_bad_rows, problem=encode.problem)
        data = host_batches(dataset, config.train.prompts_per_step, config)
        warm = False

        def step(state: TrainState, prompts: Sequence[Prompt], number: int) -> tuple[TrainState, Mapping[str, Any]]:
            nonlocal warm
            if not warm:
                sampler.warm_up(state.params)
                warm = True
            started = time.perf_counter()
            trajectories = sampler.sample(state.params, prompts, samples=config.train.group_size, step=number)
            sampled = time.perf_counter()
            verdicts = [score_trajectory(trajectory) for trajectory in trajectories]
            batch, padding = assemble(trajectories, verdicts, pack, config.train.mini_batches)
            batch = batch._replace(rows=shard_batch(batch.rows, policy.mesh, axis=2))
            packed = time.perf_counter()
            state, metrics = update(state, batch)
            metrics = jax.device_get(dict(metrics))
            updated = time.perf_counter()
            if config.train.dump_every and number % config.train.dump_every == 0:
                judged = zip(trajectories, verdicts, strict=True)
                records = (trajectory_record(trajectory, verdict, step=number) for trajectory, verdict in judged)
                write_records(rollouts_path(config.output, number), records)
            return state, {
                **rollout_metrics(trajectories, verdicts, sampler.stats),
                **metrics,
                "rows/padding": padding,
                "time/rollout": sampled - started,
                "time/pack": packed - sampled,
                "time/update": updated - packed,
            }

        return train(config, policy, optimizer, data, step, title=title, figures=FIGURES)


def assemble(
    trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], pack: RowBatcher, mini_batches: int
) -> tuple[UpdateBatch, float]:
    """The update's input, and the share of padding in its rows.

    `trajectories` come in the order of groups and samples, every group whole. Dropped rollouts keep their place
    and are masked.
    """
    groups = max(trajectory.group for trajectory in trajectories) + 1
    size = len(trajectories) // groups
    families = [
        group_family(trajectories[first : first + size], first, pack.model)
        for first in range(0, len(trajectories), size)
    ]
    each = groups // mini_batches
    micro_batches: Any
    rows, micro_batches = pack([families[first : first + each] for first in range(0, groups, each)])

    def per_rollout(values: Sequence[float | bool], dtype: type) -> Any:
        return np.asarray(values, dtype).reshape(groups, size)

    batch = UpdateBatch(
        rows=rows,
        micro_batches=micro_batches,
        accuracy_rewards=per_rollout([verdict.accuracy for verdict in verdicts], np.float32),
        tool_rewards=per_rollout([verdict.tool for verdict in verdicts], np.float32),
        calls=per_rollout([trajectory.calls for trajectory in trajectories], np.float32),
        correct=per_rollout([verdict.correct for verdict in verdicts], np.bool_),
        usable=per_rollout([trajectory.usable for trajectory in trajectories], np.bool_),
    )
    return batch, padding_share(rows)


def rollout_metrics(
    trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], stats: RolloutStats
) -> dict[str, float]:
    """Rewards, tool use, lengths and where the rollout's time went."""
    pairs = [pair for pair in zip(trajectories, verdicts, strict=True) if pair[0].usable]
    kept, judged = [trajectory for trajectory, _ in pairs], [verdict for _, verdict in pairs]
    summary = summarise([outcome(trajectory, verdict) for trajectory, verdict in pairs])
    by_legibility = {
        f"signs/{name}": value
        for name, value in summary.items()
        if name not in ("accuracy", "tool_rate", "calls_per_rollout")
    }
    count = max(len(kept), 1)
    return {
        "reward/accuracy": sum(verdict.accuracy for verdict in judged) / count,
        "reward/tool": sum(verdict.tool for verdict in judged) / count,
        "reward/format": sum(verdict.format for verdict in judged) / count,
        "reward/correct": summary["accuracy"],
        "tools/rate": summary["tool_rate"],
        "tools/calls_per_rollout": summary["calls_per_rollout"],
        **by_legibility,
        "rollout/dropped": len(trajectories) - len(kept),
        "rollout/tokens": float(np.mean([trajectory.sampled.sum() for trajectory in trajectories])),
        "rollout/out_of_budget": sum(trajectory.stop is StopReason.TOKEN_BUDGET for trajectory in kept) / count,
        "rollout/occupancy": stats.occupancy,
        "rollout/chunks": stats.chunks,
        "rollout/computed_tokens": stats.computed_tokens,
        "rollout/evictions": stats.evictions,
        "rollout/peak_pages": stats.peak_pages,
        "time/extend": stats.extend_seconds,
        "time/decode": stats.decode_seconds,
        "time/tools_waited": stats.wait_seconds,
    }
