"""HDPO: rollouts with tools, rewards of both channels, one update program a step, resumable at any step."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from hdpo_jax.algorithm.state import TrainState
from hdpo_jax.config import RLConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.rewards import Verdict
from hdpo_jax.rewards.outcomes import outcome, summarise
from hdpo_jax.rollout.ahead import Ahead
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.stats import RolloutStats
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.dumps import rollouts_path, trajectory_record, write_records
from hdpo_jax.train.iteration import make_iteration
from hdpo_jax.train.loop import RunResult, host_batches, train
from hdpo_jax.train.optimizer import make_optimizer
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt, StopReason, Trajectory

FIGURES = {"reward/correct": "right", "tools/rate": "tool use", "loss/total": "loss"}


def train_rl(config: RLConfig, *, title: str = "hdpo") -> RunResult:
    """Runs, or goes on with, the reinforcement-learning run that `config` describes."""
    # First what can refuse at once: a missing sandbox should not be found after the model is loaded.
    with ToolBox(config.tools) as toolbox, ExitStack() as stack:
        policy = load_policy(config.model, config.mesh)
        encode = PromptEncoder(policy.processor, config.rollout, cache_mb=config.data.cache_mb)
        sampler = policy.sampler(
            toolbox, agent=config.agent, rollout=config.rollout, seed=config.train.seed, encode=encode
        )
        optimizer = make_optimizer(config.optimizer, config.train.steps * config.train.mini_batches, policy.params)
        dataset = PromptDataset(config.data.path, max_bad_rows=config.data.max_bad_rows, problem=encode.problem)
        data = host_batches(dataset, config.train.prompts_per_step, config)
        ahead = None
        if config.train.off_policy_steps:
            ahead = Ahead(sampler, data.peek, samples=config.train.group_size, steps=config.train.steps)
            stack.enter_context(closing(ahead))
        iterate = make_iteration(config, policy, sampler, optimizer, ahead)

        def step(state: TrainState, prompts: Sequence[Prompt], number: int) -> tuple[TrainState, Mapping[str, Any]]:
            done = iterate(state, prompts, number)
            if config.train.dump_every and number % config.train.dump_every == 0:
                judged = zip(done.trajectories, done.verdicts, strict=True)
                records = (trajectory_record(trajectory, verdict, step=number) for trajectory, verdict in judged)
                write_records(rollouts_path(config.output, number), records)
            return done.state, {**rollout_metrics(done.trajectories, done.verdicts, done.stats), **done.metrics}

        return train(config, policy, optimizer, data, step, title=title, figures=FIGURES)


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
        "engine/occupancy": stats.occupancy,
        "engine/chunks": stats.chunks,
        "engine/computed_tokens": stats.computed_tokens,
        "engine/evictions": stats.evictions,
        "engine/peak_pages": stats.peak_pages,
        "time/extend": stats.extend_seconds,
        "time/decode": stats.decode_seconds,
        "time/tools_waited": stats.wait_seconds,
    }
