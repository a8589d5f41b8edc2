"""The whole method on a laptop: built-in data, cold start, HDPO, evaluation, report, export. `hdpo quickstart`."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from configs import signs_hdpo, signs_read, signs_sft
from hdpo_jax.config import ConfigError, RLConfig, SFTConfig, ToolsConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.signs import cold_start_texts, write_signs
from hdpo_jax.data.signs_config import SignsConfig
from hdpo_jax.data.tiny_checkpoint import write_tiny_checkpoint
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.evaluate.report import write_report
from hdpo_jax.evaluate.runner import evaluate_policy
from hdpo_jax.files import write_text_atomically
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.tools.protocol import Tools
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.compilations import CompilationCounter
from hdpo_jax.train.loop import RunResult
from hdpo_jax.train.policy import load_policy, require_one_process
from hdpo_jax.train.rl import train_rl
from hdpo_jax.train.sft import train_sft

Result = TypeVar("Result")
Config = TypeVar("Config", SFTConfig, RLConfig)

SHOWN = {
    "accuracy": "accuracy",
    "accuracy_legible": "  legible signs",
    "accuracy_illegible": "  illegible signs",
    "redundant_tool_rate": "redundant calls (legible)",
    "needed_tool_rate": "needed calls (illegible)",
    "calls_per_rollout": "calls a question",
}


def run(out: Path, seed: int, tools: ToolsConfig, signs: SignsConfig) -> Mapping[str, Any]:
    """Every stage in turn, each skipped or resumed where `out` already holds it. Returns the summary."""
    require_one_process()
    console = Console()
    clock = _Clock(out / "seconds.json")

    # What can refuse does so first: nothing is trained before the sandbox is known to work.
    with open_toolbox(tools) as toolbox:
        clock.time("data", lambda: _make_task(out, seed, signs, console))
        read, sft, hdpo = _configs(out, seed, tools)
        results = [
            clock.time("read", lambda: _trained(train_sft(read, title="1/3 learn to read"), read)),
            clock.time("sft", lambda: _trained(train_sft(sft, title="2/3 cold start"), sft)),
            clock.time("rl", lambda: _trained(train_rl(hdpo, title="3/3 HDPO"), hdpo)),
        ]
        scores, compiled = clock.time("eval", lambda: _compare(out, sft, hdpo, toolbox, seed))

    summary = {
        "cold_start": scores["cold_start"],
        "hdpo": scores["hdpo"],
        "hf_export": str(out / "hdpo" / "hf"),
        "seconds": clock.seconds | {"total": sum(clock.seconds.values())},
        "compilations_after_warmup": compiled + sum(result.compilations_after_warmup for result in results),
        "seed": seed,
    }
    write_text_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(out)
    console.print(_table(summary))
    for line in (
        f"report         {out / 'report.html'}",
        f"the policy     {summary['hf_export']}  (HF format)",
        "load it with   transformers.AutoModelForImageTextToText.from_pretrained(…), or",
        f"               hdpo generate --model {summary['hf_export']} --messages IN.jsonl --output OUT.jsonl",
    ):
        console.print(line, soft_wrap=True)  # to be copied: no line breaks in paths
    return summary


class _Clock:
    """Seconds that each stage took, over all the calls that it took."""

    def __init__(self, file: Path):
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def time(self, name: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            write_text_atomically(self._file, json.dumps(self.seconds, indent=2) + "\n")


def _make_task(out: Path, seed: int, signs: SignsConfig, console: Console) -> None:
    """Boards, conversations and a random model, unless `out` holds them already."""
    # Written last: what is there without it is half of a task, and drawn again.
    marker, settings = out / "task.json", json.loads(json.dumps({"seed": seed, "signs": dataclasses.asdict(signs)}))
    if marker.exists():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found != settings:
            raise ConfigError(
                f"{out} holds a run with seed {found.get('seed')} or other settings; this one has seed {seed}: "
                "choose another --out, or delete it"
            )
        return
    boards = sum(phase.conversations for phase in signs.cold_start) + signs.train_boards + signs.test_boards
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task("draw signs", total=boards)
        advance = functools.partial(progress.advance, task)
        files = write_signs(out / "data", signs, seed=seed, workers=2, advance=advance)
    write_tiny_checkpoint(out / "random", seed=seed, corpus=cold_start_texts(files.cold_start))
    write_text_atomically(marker, json.dumps(settings, indent=2) + "\n")


def _configs(out: Path, seed: int, tools: ToolsConfig) -> tuple[SFTConfig, SFTConfig, RLConfig]:
    """The three runs of configs/signs_*.py, moved to `out`, with one seed for all."""

    def moved(config: Config, name: str, start: str, file: str) -> Config:
        return replace(
            config,
            output=str(out / name),
            model=replace(config.model, path=str(out / start)),
            data=replace(config.data, path=str(out / "data" / file)),
            train=replace(config.train, seed=seed),
        )

    hdpo = moved(signs_hdpo.get_config(), "hdpo", "sft/hf", "train.parquet")
    return (
        moved(signs_read.get_config(), "read", "random", "cold_start_0.parquet"),
        moved(signs_sft.get_config(), "sft", "read/hf", "cold_start_1.parquet"),
        replace(hdpo, tools=tools),
    )


def _trained(result: RunResult, config: SFTConfig | RLConfig) -> RunResult:
    """The result of a finished run, its policy exported to `hf` beside its checkpoints."""
    result.require_finished(config.output)
    export_hf(Path(config.output), Path(config.output) / "hf")
    return result


def _compare(
    out: Path, sft: SFTConfig, hdpo: RLConfig, toolbox: Tools, seed: int
) -> tuple[dict[str, dict[str, float]], int]:
    """Held-out results before and after HDPO, and how many programs were compiled after warm-up."""
    compilations = CompilationCounter()
    prompts = PromptDataset(out / "data" / "test.parquet")
    sampler, warm, scores = None, 0, {}
    with Scorer(hdpo.rewards) as scorer:
        for name, config in (("cold_start", sft), ("hdpo", hdpo)):
            policy = load_policy(replace(config.model, path=f"{config.output}/hf"), config.mesh)
            if sampler is None:
                sampler = policy.sampler(toolbox, agent=hdpo.agent, rollout=hdpo.rollout, seed=seed)
                sampler.warm_up(policy.params)
                warm = compilations.count
            scores[name] = evaluate_policy(
                sampler,
                policy.params,
                prompts,
                scorer,
                out / "evaluation" / f"{name}.jsonl",
                count=len(prompts),
                title=f"evaluate {name.replace('_', ' ')}",
            )
    return scores, compilations.count - warm


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title="held-out signs, one sampled answer each")
    table.add_column()
    table.add_column("cold start", justify="right")
    table.add_column("HDPO", justify="right")
    for key, label in SHOWN.items():
        table.add_row(label, f"{summary['cold_start'][key]:.3f}", f"{summary['hdpo'][key]:.3f}")
    return table
