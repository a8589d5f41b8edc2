"""What a run tells about itself while it goes: metrics.jsonl, TensorBoard, Weights & Biases, a progress display."""

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from hdpo_jax.config import ConfigError
from hdpo_jax.files import write_text_atomically

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal to draw on."""


class MetricsLog:
    """Appends one line of scalars a step to `run_dir`/metrics.jsonl, and draws how far the run is.

    A resumed run passes the last step of its checkpoint as `restored_step`: what an interrupted run had written
    after it is cut off, so that every step stands in the file once. Use it as a context manager, on one process
    of a run only.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        steps: int,
        restored_step: int = 0,
        title: str = "train",
        figures: Mapping[str, str] | None = None,
        console: Console | None = None,
    ):
        """`figures` are the metrics that the display shows, each with a short label: {"reward/correct": "right"}."""
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= restored_step]
        write_text_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._lines = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=restored_step + 1)
        self._wandb = _start_wandb(directory)
        self._display = _Display(title, steps, restored_step, figures or {}, console or Console(stderr=True))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the scalars of a step: numbers, or arrays of one number. What is not finite becomes null."""
        scalars = {name: float(np.asarray(value)) for name, value in metrics.items()}
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        line = {"step": step} | {name: finite.get(name) for name in scalars}
        self._lines.write(f"{json.dumps(line)}\n")
        self._lines.flush()
        # In a mounted bucket a line is there for others, and outlives a kill, only once it is synced.
        os.fsync(self._lines.fileno())
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)
        self._display.show(step, finite)

    def close(self) -> None:
        self._display.close()
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no such file.

    The last line may be half-written, by a run that was killed or one that is still going: it is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            sound = isinstance(record, dict) and isinstance(record.get("step"), int)
        except json.JSONDecodeError:
            sound = False
        if sound:
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}:{number} is not a JSON object with a step; mend or delete the line")
    return records


class _Display:
    """A bar with the time left and a few figures; plain lines now and then where the output is not a terminal."""

    def __init__(self, title: str, steps: int, start: int, figures: Mapping[str, str], console: Console):
        self._title, self._steps, self._figures, self._console = title, steps, figures, console
        self._started = time.monotonic()
        self._last_line = -math.inf
        self._warm: tuple[int, float] | None = None
        """The first step, and when it was done: it compiled, and says nothing of how long the others take."""
        self._progress = None
        if console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("[dim]{task.fields[figures]}"),
            )
            self._progress = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._progress.add_task(title, total=steps, completed=start, figures="")
            self._progress.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in self._figures.items() if name in metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        self._warm = self._warm or (step, now)
        if step < self._steps and now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        ending = f"took {_clock(now - self._started)}" if step >= self._steps else self._left(step, now)
        self._console.print(
            f"{self._title} {step}/{self._steps}  {figures}  {ending}", highlight=False, markup=False, soft_wrap=True
        )

    def _left(self, step: int, now: float) -> str:
        if self._warm is None or step <= self._warm[0]:
            return "compiled"
        first, since = self._warm
        return f"{_clock((now - since) / (step - first) * (self._steps - step))} left"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _start_wandb(directory: Path) -> Any:
    """A Weights & Biases run where WANDB_PROJECT is set, the same one after a resume; None otherwise."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        hint = "install it with `pip install 'hdpo-jax[wandb]'`, or unset the variable"
        raise ConfigError(f"WANDB_PROJECT is set, but wandb is not installed; {hint}") from error
    identity = directory / "wandb_id"
    if not identity.exists():
        write_text_atomically(identity, uuid.uuid4().hex[:12])
    return wandb.init(id=identity.read_text(), resume="allow", dir=str(directory), name=directory.name)
