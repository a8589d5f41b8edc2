"""metrics.jsonl: one sound line a step, also after an interruption."""

import io
import json
import os
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from hdpo_jax.config import ConfigError
from hdpo_jax.train.metrics import MetricsLog, read_metrics


def quiet() -> Console:
    return Console(file=io.StringIO())


def write_steps(run_dir: Path, steps: range, restored_step: int = 0) -> None:
    with MetricsLog(run_dir, steps=10, restored_step=restored_step, console=quiet()) as log:
        for step in steps:
            log.write(step, {"reward/correct": step / 10})


def test_a_line_is_there_as_soon_as_its_step_is(tmp_path: Path):
    with MetricsLog(tmp_path, steps=2, console=quiet()) as log:
        log.write(
            1, {"loss/total": jnp.float32(0.5), "reward/correct": np.float64(1), "count": jnp.ones((1,), jnp.int32)[0]}
        )
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss/total": 0.5, "reward/correct": 1.0, "count": 1.0}
        ]


def test_a_line_is_synced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A mounted bucket shows what was synced or closed: flushed lines alone would go with a killed run."""
    path, synced = tmp_path / "metrics.jsonl", []

    def sync(number: int) -> None:
        if os.path.samestat(os.fstat(number), path.stat()):
            synced.append([record["step"] for record in read_metrics(path)])

    monkeypatch.setattr(os, "fsync", sync)
    write_steps(tmp_path, range(1, 3))
    assert synced == [[1], [1, 2]]


def test_what_is_not_finite_becomes_null(tmp_path: Path):
    with MetricsLog(tmp_path, steps=1, console=quiet()) as log:
        log.write(1, {"a": float("nan"), "b": jnp.inf, "c": 2})
    # NaN is no JSON: the report's JSON.parse would refuse the whole page for one such value.
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 2.0}


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(6, 9), restored_step=5)
    records = read_metrics(tmp_path / "metrics.jsonl")
    # Appending blindly would instead give 1…7, 6, 7, 8.
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fresh_start_empties_the_file(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("tail", ['{"step": 4, "reward/cor', '{"step"', "{}", "\x00\x00"])
def test_half_written_last_line_is_left_out(tmp_path: Path, tail: str):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 6), restored_step=3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a JSON object with a step"):
        read_metrics(path)


def test_no_file_reads_as_no_records(tmp_path: Path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_the_scalars(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    assert b"reward/correct" in files[0].read_bytes()


def test_without_a_terminal_the_display_is_plain_lines(tmp_path: Path):
    output = io.StringIO()
    figures = {"reward/correct": "right", "absent": "absent"}
    console = Console(file=output, width=40)
    with MetricsLog(tmp_path, steps=50, title="hdpo", figures=figures, console=console) as log:
        for step in range(1, 51):
            log.write(step, {"reward/correct": 0.25, "other": 1})
    lines = output.getvalue().splitlines()
    # The first and the last step: the steps between came within the same few seconds.
    assert len(lines) == 2
    assert lines[0].startswith("hdpo 1/50  right 0.25  ") and lines[0].endswith("compiled")
    assert lines[1].startswith("hdpo 50/50  right 0.25  took ")
    assert "\x1b" not in output.getvalue()


def test_on_a_terminal_the_display_is_a_bar(tmp_path: Path):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with MetricsLog(tmp_path, steps=4, restored_step=2, figures={"reward/correct": "right"}, console=console) as log:
        log.write(3, {"reward/correct": 0.5})
    assert "3/4" in output.getvalue() and "right 0.5" in output.getvalue()


def test_wandb_is_asked_for_by_its_own_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_PROJECT", "hdpo")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        MetricsLog(tmp_path, steps=1, console=quiet())


def test_wandb_run_keeps_its_identity_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)

    def init(**settings: str) -> types.SimpleNamespace:
        started.append(settings["id"])
        return run

    monkeypatch.setenv("WANDB_PROJECT", "hdpo")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    write_steps(tmp_path, range(1, 2))
    write_steps(tmp_path, range(2, 3), restored_step=1)
    assert started[0] == started[1]
    assert logged == [(1, {"reward/correct": 0.1}), (2, {"reward/correct": 0.2})]
