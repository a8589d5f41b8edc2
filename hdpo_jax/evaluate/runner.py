"""Evaluation: sample every held-out prompt, judge the answers, keep the trajectories."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hdpo_jax.config import AgentConfig, Dtype, ModelConfig, RolloutConfig, ToolsConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.evaluate.summary import summarise
from hdpo_jax.files import write_text_atomically
from hdpo_jax.rewards import score_trajectory
from hdpo_jax.rollout.agent import Sampler
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.dumps import trajectory_record, write_records
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt
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
    """Samples the prompts of `data`, writes `results.json` and `trajectories.jsonl` to `output`, prints a table."""
    with ToolBox(tools) as toolbox:
        policy = load_policy(ModelConfig(path=str(model), dtype=dtype), MeshAxes())
        sampler = Sampler(policy.model, policy.processor, toolbox, agent=agent, rollout=rollout, seed=seed)
        dataset = PromptDataset(data, max_bad_rows=1.0)
        prompts = [dataset[index] for index in range(limit or len(dataset))]
        with jax.set_mesh(policy.mesh):
            results = evaluate_policy(sampler, policy.params, prompts, output / "trajectories.jsonl", samples=samples)
    write_text_atomically(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


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
    trajectories = []
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=len(prompts) * samples)
        for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
            trajectories += sampler.sample(
                params,
                prompts[first : first + PROMPTS_AT_A_TIME],
                samples=samples,
                step=0,
                first_prompt=first,
                on_finished=lambda _: progress.advance(task),
            )
    verdicts = [score_trajectory(trajectory) for trajectory in trajectories]
    judged = zip(trajectories, verdicts, strict=True)
    write_records(trajectories_path, [trajectory_record(trajectory, verdict, step=0) for trajectory, verdict in judged])
    return summarise(trajectories, verdicts)
