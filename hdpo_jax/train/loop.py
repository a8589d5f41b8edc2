"""What every training run does around its step: restore, log, checkpoint, stop when asked to."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import optax

from hdpo_jax.algorithm.state import TrainState, abstract_state, init_state
from hdpo_jax.config import RLConfig, SFTConfig
from hdpo_jax.files import write_text_atomically
from hdpo_jax.train.checkpoint import Checkpointer, StopSignal
from hdpo_jax.train.compilations import CompilationCounter
from hdpo_jax.train.metrics import MetricsLog
from hdpo_jax.train.policy import Policy

Batch_co = TypeVar("Batch_co", covariant=True)
Batch = TypeVar("Batch")


class Data(Protocol[Batch_co]):
    """An endless iterator over batches that can say, and be told, where it is."""

    def __iter__(self) -> Iterator[Batch_co]: ...
    def __next__(self) -> Batch_co: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


Step = Callable[[TrainState, Batch, int], tuple[TrainState, Mapping[str, Any]]]
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


def train(
    config: SFTConfig | RLConfig,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    data: Data[Batch],
    step: Step[Batch],
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
            first = done + 1
            while done < settings.steps and not stop.requested:
                batch_started = time.perf_counter()
                batch = next(data)
                waited = time.perf_counter() - batch_started
                done += 1
                state, metrics = step(state, batch, done)
                metrics = dict(metrics) | {
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


def _remember_config(run_dir: Path, config: SFTConfig | RLConfig) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
