"""What every training run does around its step: restore, log, checkpoint, stop when asked to."""

import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from hdpo_jax.algorithm.state import TrainState, abstract_state, init_state
from hdpo_jax.config import RLConfig, SFTConfig
from hdpo_jax.data.dataset import Dataset, Example
from hdpo_jax.data.pipeline import Batches, batches, joined
from hdpo_jax.errors import Stopped
from hdpo_jax.files import write_text_atomically
from hdpo_jax.train.checkpoint import Checkpointer, StopSignal
from hdpo_jax.train.compilations import CompilationCounter
from hdpo_jax.train.metrics import MetricsLog
from hdpo_jax.train.policy import Policy
from sharding.multihost import agree, gather, is_lead, together

log = logging.getLogger(__name__)

ExampleT = TypeVar("ExampleT", bound=Example)

Step = Callable[[TrainState, Sequence[ExampleT], int], tuple[TrainState, Mapping[str, Any]]]
"""(state, batch, number of the step from 1 on) -> (new state, metrics of the step)."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    steps: int
    """Steps done in all, those before a resume included."""
    stopped_by: int
    """The signal that told it to stop, be it in the last step; 0: none, and all steps are done."""
    seconds: float
    compilations_after_warmup: int
    """Programs compiled by steps after the first."""

    def require_finished(self, output: str) -> None:
        """Raises Stopped where the run in `output` was told to stop."""
        if self.stopped_by:
            raise Stopped(
                f"stopped at step {self.steps} of {output}, which is saved; the same command goes on from there",
                self.stopped_by,
            )


def host_batches(
    dataset: Dataset[ExampleT], size: int, config: SFTConfig | RLConfig, *, parts: int = 1
) -> Batches[ExampleT]:
    """This host's share of every global batch of `size` examples, endless, in the order of the run's seed.

    Of a batch that is learned in several `parts`, hosts share each.
    """
    return batches(
        dataset,
        batch_size=size,
        seed=config.train.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        parts=parts,
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

    What a run will do depends on its checkpoint alone: parameters, optimizer, step number, place in the data. All
    processes of a job call it, with their own part of the data; the first writes what people read.
    """
    started = time.perf_counter()
    compilations = CompilationCounter()
    run_dir = Path(config.output)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = config.train
    metadata = {"config": dataclasses.asdict(config)}
    recompiled = 0

    with (
        contextlib.closing(data),
        contextlib.closing(
            Checkpointer(run_dir / "checkpoints", settings.keep_checkpoints, settings.checkpoint_every)
        ) as checkpoints,
        StopSignal() as stop,
        jax.set_mesh(policy.mesh),
    ):
        checkpoints.keep_base(config.model.path)
        restored = checkpoints.restore_latest(abstract_state(policy.params, optimizer))
        if restored:
            done, state, data_states = restored
            data.set_state(joined(data_states))
            # A fresh run donates these to its first step; here they would stay beside the restored ones.
            jax.tree.map(lambda array: array.delete(), policy.params)
        else:
            done, state = 0, init_state(policy.params, optimizer)
        with together():
            if is_lead():
                _remember_config(run_dir, config)
        if done >= settings.steps:
            log.warning("%s is at step %d of %d already: nothing is left to do", run_dir, done, settings.steps)

        with contextlib.ExitStack() as stack:
            with together():
                record = stack.enter_context(_metrics_log(run_dir, settings.steps, done, title, figures))
            first, listed = done + 1, []
            stopped_by = _stopped_by(stop)
            while done < settings.steps and not stopped_by:
                batch_started = time.perf_counter()
                with together():
                    batch = next(data)
                waited = time.perf_counter() - batch_started
                done += 1
                known = compilations.count
                state, metrics = step(state, batch, done)
                if done > first:  # saving compiles too, once, where arrays are spread over devices: not counted
                    recompiled += compilations.count - known
                listed = _list_bad_rows(run_dir, data, listed)
                metrics = dict(metrics) | {
                    "data/bad_rows": len(listed),
                    "time/data": waited,
                    "time/step": time.perf_counter() - batch_started,
                }
                with together():
                    record(done, metrics)
                stopped_by = _stopped_by(stop)
                last = done == settings.steps or bool(stopped_by)
                checkpoints.save(done, state, data.get_state(), metadata, force=last)
        checkpoints.wait()
    return RunResult(
        steps=done,
        stopped_by=_stopped_by(stop),
        seconds=time.perf_counter() - started,
        compilations_after_warmup=recompiled,
    )


@contextlib.contextmanager
def _metrics_log(
    run_dir: Path, steps: int, done: int, title: str, figures: Mapping[str, str]
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """What records the metrics of a step: in the first process; in the others it does nothing."""
    if not is_lead():
        yield lambda step, metrics: None
        return
    with MetricsLog(run_dir, steps=steps, restored_step=done, title=title, figures=figures) as metrics_log:
        yield metrics_log.write


def _stopped_by(stop: StopSignal) -> int:
    """The signal that any process was told to stop by; 0: none."""
    return int(agree(np.asarray(stop.number)).max())


def _list_bad_rows(run_dir: Path, data: Batches[Any], listed: list[str]) -> list[str]:
    """The rows that any process knows to be bad; `bad_rows.txt` names each with the reason, and news are logged.

    `listed`: those known so far.
    """
    mine = [str(row) for row in data.report.bad]
    if not agree(np.asarray(not set(mine) <= set(listed))).any():
        return listed
    bad = list(dict.fromkeys(itertools.chain(listed, *gather(mine))))
    with together():
        if is_lead():
            for row in bad[len(listed) :]:
                log.warning("skipped %s", row)
            write_text_atomically(run_dir / "bad_rows.txt", "".join(f"{row}\n" for row in bad))
    return bad


def _remember_config(run_dir: Path, config: SFTConfig | RLConfig) -> None:
    """Writes config.json; says which settings are others than those of the run so far."""
    file, now = run_dir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if file.exists():
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
        for name, value in _flat(now).items():
            if name in before and before[name] != value:
                log.warning("going on with %s %r; it was %r so far", name, value, before[name])
    write_text_atomically(file, json.dumps(now, indent=2) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as flags name them."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
