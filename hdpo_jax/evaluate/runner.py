"""Evaluation: sample every held-out prompt, judge the answers, keep the trajectories."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hdpo_jax.config import AgentConfig, ConfigError, Dtype, ModelConfig, RewardsConfig, RolloutConfig, ToolsConfig
from hdpo_jax.data.dataset import BadRow, BadRowError
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.evaluate.gate_curve import calibrate, paired
from hdpo_jax.files import write_text_atomically
from hdpo_jax.rewards.outcomes import Outcome, outcome, summarise
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.rollout.gate import Gate
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.dumps import trajectory_record, write_records
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt, Trajectory
from sharding.mesh import MeshAxes

PROMPTS_AT_A_TIME = 256
"""Prompts whose images, and whose trajectories, are in memory."""

log = logging.getLogger(__name__)


def evaluate(
    *,
    data: Path,
    output: Path,
    model: Path | None = None,
    run_dir: Path | None = None,
    samples: int = 1,
    limit: int = 0,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    agent: AgentConfig,
    tools: ToolsConfig,
    rewards: RewardsConfig,
    rollout: RolloutConfig,
    calibrate_gate: bool = False,
) -> Mapping[str, float]:
    """Samples the prompts of `data`, writes `results.json` and `trajectories.jsonl` to `output`, prints a table.

    One of `model` (HF directory) and `run_dir` (a training run: its newest checkpoint) says who answers. With
    `calibrate_gate` once more, with an answer in place of each call: `gate.json`, and the curve of its dial.
    """
    if calibrate_gate and agent.gate:
        raise ConfigError("agent.gate beside --calibrate-gate; expected one of them")
    with open_toolbox(tools) as toolbox, Scorer(rewards) as scorer, _model_directory(model, run_dir) as directory:
        policy = load_policy(ModelConfig(path=str(directory), dtype=dtype), MeshAxes())
        encode = PromptEncoder(policy.processor, rollout)
        dataset = PromptDataset(data, problem=encode.problem)
        count = min(limit or len(dataset), len(dataset))
        rollout = replace(rollout, slots=min(rollout.slots, count * samples), replay_experts=False)
        make = partial(policy.sampler, toolbox, agent=agent, rollout=rollout, seed=seed, encode=encode)

        def sampled(sampler: Sampler, name: str, title: str) -> list[Outcome]:
            path = output / f"{name}.jsonl"
            return outcomes_of(sampler, policy.params, dataset, scorer, path, count=count, samples=samples, title=title)

        outcomes = sampled(make(), "trajectories", "evaluate")
        results = summarise(outcomes)
        if calibrate_gate:
            without = sampled(make(gate=Gate.closed()), "without_calls", "answer in place of calls")
            calibrate(paired(outcomes, without), output)
    write_text_atomically(output / "results.json", json.dumps(results, indent=2) + "\n")
    table = Table(title=f"{count:,} prompts, {samples} rollout{'s' * (samples > 1)} each")
    table.add_column()
    table.add_column("share" if samples == 1 else "mean", justify="right")
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
    Console().print(table)
    return results


@contextlib.contextmanager
def _model_directory(model: Path | None, run_dir: Path | None) -> Iterator[Path]:
    """An HF directory: the one given, or an export of a run's newest checkpoint that goes away afterwards."""
    if model is not None:
        yield model
        return
    if run_dir is None:
        raise ConfigError("expected one of --model and --run-dir")
    with tempfile.TemporaryDirectory(prefix="hdpo-eval-") as folder:
        # As trained: in the masters' own precision, not in that of the files the run started from.
        export_hf(run_dir, Path(folder) / "hf", dtype="float32")
        yield Path(folder) / "hf"


def evaluate_policy(
    sampler: Sampler,
    params: nnx.State,
    dataset: PromptDataset,
    scorer: Scorer,
    trajectories_path: Path,
    *,
    count: int,
    samples: int = 1,
    title: str = "evaluate",
) -> dict[str, float]:
    """Accuracy and tool use over `samples` rollouts a prompt; as for `outcomes_of`."""
    return summarise(
        outcomes_of(sampler, params, dataset, scorer, trajectories_path, count=count, samples=samples, title=title)
    )


def outcomes_of(
    sampler: Sampler,
    params: nnx.State,
    dataset: PromptDataset,
    scorer: Scorer,
    trajectories_path: Path,
    *,
    count: int,
    samples: int,
    title: str,
) -> list[Outcome]:
    """What becomes of `samples` rollouts a prompt; the trajectories go to `trajectories_path`.

    The first `count` prompts. Those that turn out to be unusable are left out and named; DataError where
    they are more than the data set puts up with. Answers that could not be judged are left out of the accuracy and
    counted; VerifierOutage where they are more than the config allows.
    """
    outcomes: list[Outcome] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=count * samples)

        def finished(trajectory: Trajectory) -> None:
            progress.advance(task)
            scorer.begin(trajectory)

        def records() -> Iterator[Mapping[str, Any]]:
            bad: list[BadRow] = []
            lost = 0
            for first in range(0, count, PROMPTS_AT_A_TIME):
                prompts = list(_usable(dataset, range(first, min(first + PROMPTS_AT_A_TIME, count)), bad))
                trajectories = sampler.sample(
                    params,
                    prompts,
                    samples=samples,
                    step=0,
                    numbers=range(first, first + len(prompts)),
                    on_finished=finished,
                )
                verdicts = scorer.verdicts(trajectories, of=count * samples)
                lost += verdicts.count(None)
                scorer.check(lost, of=count * samples)
                for trajectory, verdict in zip(trajectories, verdicts, strict=True):
                    outcomes.append(outcome(trajectory, verdict))
                    yield trajectory_record(trajectory, verdict, step=0)

        write_records(trajectories_path, records())
    if not_judged := summarise(outcomes).get("not_judged"):
        log.warning("%d answers could not be judged and are left out of the accuracy: %s", not_judged, scorer.said)
    return outcomes


def _usable(dataset: PromptDataset, indices: Iterable[int], bad: list[BadRow]) -> Iterator[Prompt]:
    """The good ones among these prompts; `bad` grows by the others."""
    for index in indices:
        try:
            yield dataset[index]
        except BadRowError as error:
            log.warning("skipped %s", error)
            bad.append(error.bad)
            dataset.report.with_more(bad).check(dataset.max_bad_rows)
