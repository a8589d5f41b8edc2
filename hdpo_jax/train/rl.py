"""HDPO: rollouts with tools, rewards of both channels, one update program a step, resumable at any step."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from hdpo_jax.algorithm.state import TrainState
from hdpo_jax.config import RLConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.rewards import Verdict
from hdpo_jax.rewards.outcomes import Outcome, summarise
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.rollout.ahead import Ahead
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.stats import RolloutStats
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.dumps import record_line, rollouts_path, trajectory_record, write_lines
from hdpo_jax.train.iteration import Iteration, make_iteration
from hdpo_jax.train.loop import RunResult, host_batches, train
from hdpo_jax.train.optimizer import make_optimizer
from hdpo_jax.train.policy import load_policy
from hdpo_jax.train.scoring import learnable
from hdpo_jax.types import Prompt, StopReason, Trajectory
from sharding.multihost import gather, is_lead, together

FIGURES = {"reward/correct": "right", "tools/rate": "tool use", "loss/total": "loss"}


def train_rl(config: RLConfig, *, title: str = "hdpo") -> RunResult:
    """Runs, or goes on with, the reinforcement-learning run that `config` describes."""
    # First what can refuse at once: a missing sandbox should not be found after the model is loaded.
    with open_toolbox(config.tools) as toolbox, Scorer(config.rewards) as scorer, ExitStack() as stack:
        policy = load_policy(config.model, config.mesh, together=True)
        encode = PromptEncoder(policy.processor, config.rollout, cache_mb=config.data.cache_mb)
        sampler = policy.sampler(
            toolbox, agent=config.agent, rollout=config.rollout, seed=config.train.seed, encode=encode
        )
        optimizer = make_optimizer(config.optimizer, config.train.steps * config.train.mini_batches, policy.params)
        dataset = PromptDataset(config.data.path, max_bad_rows=config.data.max_bad_rows, problem=encode.problem)
        data = host_batches(dataset, config.train.prompts_per_step, config, parts=config.train.mini_batches)
        ahead = None
        if config.train.off_policy_steps:
            ahead = Ahead(
                sampler,
                data.peek,
                samples=config.train.group_size,
                steps=config.train.steps,
                on_finished=scorer.begin,
            )
            stack.enter_context(closing(ahead))
        iterate = make_iteration(config, policy, sampler, optimizer, data.places, scorer, ahead)

        def step(state: TrainState, prompts: Sequence[Prompt], number: int) -> tuple[TrainState, Mapping[str, Any]]:
            done = iterate(state, prompts, number)
            if config.train.dump_every and number % config.train.dump_every == 0:
                _dump(config, done, number)
            learned = learnable(done.trajectories, done.verdicts)
            results = map(result, done.trajectories, done.verdicts, learned)
            everyone = [Result(*fields) for part in gather(list(results)) for fields in part]
            return done.state, {**rollout_metrics(sorted(everyone), done.stats.of_all_processes()), **done.metrics}

        return train(config, policy, optimizer, data, step, title=title, figures=FIGURES)


def _dump(config: RLConfig, done: Iteration, number: int) -> None:
    """All processes' trajectories, in the order of groups and samples, in one file."""
    with together():
        lines = [
            (trajectory.group, trajectory.sample, record_line(trajectory_record(trajectory, verdict, step=number)))
            for trajectory, verdict in zip(done.trajectories, done.verdicts, strict=True)
        ]
    everyone = sorted(tuple(line) for part in gather(lines) for line in part)
    with together():
        if is_lead():
            write_lines(rollouts_path(config.output, number), (line for _, _, line in everyone))


class Result(NamedTuple):
    """What the metrics need of a judged trajectory; plain numbers, which processes tell each other."""

    group: int
    sample: int
    accuracy: float
    tool: float
    format: float
    correct: bool
    calls: int
    learned: bool
    """False: left out of the update, through no fault of the policy's."""
    legible: bool | None
    tokens: int
    out_of_budget: bool


def result(trajectory: Trajectory, verdict: Verdict | None, learned: bool) -> Result:
    return Result(
        group=trajectory.group,
        sample=trajectory.sample,
        accuracy=float(verdict.accuracy) if verdict else 0.0,
        tool=float(verdict.tool) if verdict else 0.0,
        format=float(verdict.format) if verdict else 0.0,
        correct=bool(verdict and verdict.correct),
        calls=trajectory.calls,
        learned=learned,
        legible=trajectory.prompt.extra.get("legible"),
        tokens=int(trajectory.sampled.sum()),
        out_of_budget=trajectory.stop is StopReason.TOKEN_BUDGET,
    )


def rollout_metrics(results: Sequence[Result], stats: RolloutStats) -> dict[str, float]:
    """Rewards, tool use, lengths and where the rollout's time went. Rewards are those that the update saw."""
    kept = [one for one in results if one.learned]
    summary = summarise(
        [Outcome(correct=one.correct, calls=one.calls, usable=True, legible=one.legible) for one in kept]
    )
    by_legibility = {
        f"signs/{name}": value
        for name, value in summary.items()
        if name not in ("accuracy", "tool_rate", "calls_per_rollout")
    }
    count = max(len(kept), 1)
    # One program tells nobody when it goes from one part to the next.
    timed = {"time/extend": stats.extend_seconds, "time/decode": stats.decode_seconds} if stats.decode_seconds else {}
    return {
        "reward/accuracy": sum(one.accuracy for one in kept) / count,
        "reward/tool": sum(one.tool for one in kept) / count,
        "reward/format": sum(one.format for one in kept) / count,
        "reward/correct": summary["accuracy"],
        "tools/rate": summary["tool_rate"],
        "tools/calls_per_rollout": summary["calls_per_rollout"],
        **by_legibility,
        "rollout/dropped": len(results) - len(kept),
        "rollout/tokens": sum(one.tokens for one in results) / len(results),
        "rollout/out_of_budget": sum(one.out_of_budget for one in kept) / count,
        "engine/occupancy": stats.occupancy,
        "engine/chunks": stats.chunks,
        "engine/computed_tokens": stats.computed_tokens,
        "engine/evictions": stats.evictions,
        "engine/peak_pages": stats.peak_pages,
        "time/tools_waited": stats.wait_seconds,
        **timed,
    }
