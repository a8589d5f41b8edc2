"""What every training run does around its step: restore, log, checkpoint, stop when asked to."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax

from hdpo_jax.algorithm.state import TrainState, abstract_state, init_state
from hdpo_jax.config import RLConfig, SFTConfig
from hdpo_jax.data.dataset import Dataset, Example
from hdpo_jax.data.pipeline import Batches, batches
from hdpo_jax.files import write_text_atomically
from hdpo_jax.train.checkpoint import Checkpointer, StopSignal
from hdpo_jax.train.compilations import CompilationCounter
from hdpo_jax.train.metrics import MetricsLog
from hdpo_jax.train.policy import Policy

log = logging.getLogger(__name__)

ExampleT = TypeVar("ExampleT", bound=Example)

Step = Callable[[TrainState, Sequence[ExampleT], int], tuple[TrainState, Mapping[str, Any]]]
"""(state, batch, number of the step from 1 on) -> (new state, metrics of the step)."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    steps: int
    """Steps done in all, those before a resume included."""
    finished: bool
    """False: told to stop; the same command goes on from here."""
    seconds: float
    compilations_after_warmup: int


def host_batches(dataset: Dataset[ExampleT], size: int, config: SFTConfig | RLConfig) -> Batches[ExampleT]:
    """This host's share of every global batch of `size` examples, endless, in the order of the run's seed."""
    return batches(
        dataset,
        batch_size=size,
        seed=config.train.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        workers=config.data.workers,
    )


def train(
    config: SFTConfig | RLConfig,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    data: Batches[ExampleT],
    step: Step[ExampleT],
    *,
    title: str,
    figures: Mapping[str, str],
) -> RunResult:
    """Runs `step` until `config.train.steps` are done or SIGTERM comes, from the newest checkpoint if there is one.

    What a run will do depends on its checkpoint alone: parameters, optimizer, step number, place in the data.
    """
    started = time.perf_counter()
    compilations = CompilationCounter()
    run_dir = Path(config.output)
    _remember_config(run_dir, config)
    settings = config.train
    metadata = {"config": dataclasses.asdict(config)}
    compiled = 0

    with (
        contextlib.closing(
            Checkpointer(run_dir / "checkpoints", settings.keep_checkpoints, settings.checkpoint_every)
        ) as checkpoints,
        StopSignal() as stop,
        jax.set_mesh(policy.mesh),
    ):
        checkpoints.keep_base(config.model.path)
        restored = checkpoints.restore_latest(abstract_state(policy.params, optimizer))
        if restored:
            done, state, data_state = restored
            data.set_state(data_state)
        else:
            done, state = 0, init_state(policy.params, optimizer)

        with MetricsLog(run_dir, steps=settings.steps, restored_step=done, title=title, figures=figures) as log:
            first, listed = done + 1, 0
            while done < settings.steps and not stop.requested:
                batch_started = time.perf_counter()
                batch = next(data)
                waited = time.perf_counter() - batch_started
                done += 1
                state, metrics = step(state, batch, done)
                listed = _list_bad_rows(run_dir, data, listed)
                metrics = dict(metrics) | {
                    "data/bad_rows": listed,
                    "time/data": waited,
                    "time/step": time.perf_counter() - batch_started,
                }
                log.write(done, metrics)
                if done == first:
                    compiled = compilations.count
                last = done == settings.steps or stop.requested
                checkpoints.save(done, state, data.get_state(), metadata, force=last)
        checkpoints.wait()
    return RunResult(
        steps=done,
        finished=done >= settings.steps,
        seconds=time.perf_counter() - started,
        compilations_after_warmup=compilations.count - compiled if done >= first else 0,
    )


def _list_bad_rows(run_dir: Path, data: Batches[Any], listed: int) -> int:
    """How many rows are known to be bad; `bad_rows.txt` names each with the reason, and news are logged."""
    bad = data.report.bad
    if len(bad) > listed:
        for row in bad[listed:]:
            log.warning("skipped %s", row)
        write_text_atomically(run_dir / "bad_rows.txt", "".join(f"{row}\n" for row in bad))
    return len(bad)


def _remember_config(run_dir: Path, config: SFTConfig | RLConfig) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
