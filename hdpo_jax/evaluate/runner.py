"""Evaluation: sample every held-out prompt, judge the answers, keep the trajectories."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hdpo_jax.config import AgentConfig, ConfigError, Dtype, ModelConfig, RolloutConfig, ToolsConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.evaluate.summary import summarise
from hdpo_jax.files import write_text_atomically
from hdpo_jax.rewards import score_trajectory
from hdpo_jax.rollout.agent import Sampler
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.dumps import trajectory_record, write_records
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt, Trajectory
from sharding.mesh import MeshAxes

PROMPTS_AT_A_TIME = 256
"""Prompts whose images are in memory."""


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
    rollout: RolloutConfig,
) -> Mapping[str, float]:
    """Samples the prompts of `data`, writes `results.json` and `trajectories.jsonl` to `output`, prints a table.

    One of `model` (HF directory) and `run_dir` (a training run: its newest checkpoint) says who answers.
    """
    with ToolBox(tools) as toolbox, _model_directory(model, run_dir) as directory:
        policy = load_policy(ModelConfig(path=str(directory), dtype=dtype), MeshAxes())
        sampler = Sampler(policy.model, policy.processor, toolbox, agent=agent, rollout=rollout, seed=seed)
        dataset = PromptDataset(data)
        prompts = [dataset[index] for index in range(min(limit, len(dataset)) if limit else len(dataset))]
        with jax.set_mesh(policy.mesh):
            results = evaluate_policy(sampler, policy.params, prompts, output / "trajectories.jsonl", samples=samples)
    write_text_atomically(output / "results.json", json.dumps(results, indent=2) + "\n")
    table = Table(title=f"{len(prompts)} prompts, {samples} rollouts each")
    table.add_column()
    table.add_column("share" if samples == 1 else "mean", justify="right")
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
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
        export_hf(run_dir, Path(folder) / "hf")
        yield Path(folder) / "hf"


def evaluate_policy(
    sampler: Sampler,
    params: nnx.State,
    prompts: Sequence[Prompt],
    trajectories_path: Path,
    *,
    samples: int = 1,
    title: str = "evaluate",
) -> dict[str, float]:
    """Accuracy and tool use over `samples` rollouts a prompt; the trajectories go to `trajectories_path`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    trajectories: list[Trajectory] = []
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=len(prompts) * samples)
        for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
            finished = sampler.sample(
                params,
                prompts[first : first + PROMPTS_AT_A_TIME],
                samples=samples,
                step=0,
                first_prompt=first,
                on_finished=lambda _: progress.advance(task),
            )
            for trajectory in finished:
                trajectory.images = ()  # patches are by far the largest part, and nobody needs them any more
            trajectories += finished
    verdicts = [score_trajectory(trajectory) for trajectory in trajectories]
    judged = zip(trajectories, verdicts, strict=True)
    write_records(trajectories_path, (trajectory_record(trajectory, verdict, step=0) for trajectory, verdict in judged))
    return summarise(trajectories, verdicts)
