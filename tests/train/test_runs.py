"""Whole runs through the command line: SFT and HDPO on the built-in task, killed in the middle and resumed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hdpo_jax.evaluate.convert import export_hf
from tests.processes import run_job
from tests.train.conftest import Task
from tests.updates import assert_learned_the_same

pytestmark = [pytest.mark.slow, pytest.mark.requires_bwrap, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 5

SFT = """
from dataclasses import replace
from configs import signs_read

def get_config():
    config = signs_read.get_config()
    return replace(
        config,
        output={output!r},
        model=replace(config.model, path={model!r}),
        data=replace(config.data, path={data!r}),
        train=replace(
            config.train, steps={steps}, batch_size=8, checkpoint_every={every}, micro_batch_rows=2, max_rows=8
        ),
    )
"""

RL = """
from dataclasses import replace
from configs import signs_hdpo

def get_config():
    config = signs_hdpo.get_config()
    return replace(
        config,
        output={output!r},
        model=replace(config.model, path={model!r}),
        data=replace(config.data, path={data!r}),
        rollout=replace(config.rollout, slots=8, chunk=8),
        agent=replace(config.agent, max_response_tokens=48),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
        train=replace(
            config.train, steps={steps}, prompts_per_step=4, group_size=4, mini_batches=2, checkpoint_every={every},
            micro_batch_rows=2, max_rows=16, dump_every=2,
        ),
    )
"""


def start(command: str, config: Path, largest_file: int = 0) -> subprocess.Popen:
    """`hdpo COMMAND CONFIG`. The system lets it write no file of more than `largest_file` bytes (0: of any size)."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hdpo", command, str(config)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if largest_file:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return process


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def reached_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0)


def saved_steps(run: Path) -> list[int]:
    return [int(folder.name) for folder in (run / "checkpoints").glob("*") if folder.name.isdigit()]


def interrupt(process: subprocess.Popen, run: Path, how: signal.Signals) -> None:
    """Stops the run between two checkpoints, of which the first is whole on disk.

    Checkpoints are written in the background, so how far the disk is behind the steps is unknown: the run is frozen
    for every look at it, and killed while what was seen is still true.
    """
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGSTOP)
        if 0 < max(saved_steps(run), default=0) < reached_step(run):
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
            process.wait(timeout=120)
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"was not between two checkpoints: {process.communicate()[0]}")


def exported(run: Path) -> dict[str, np.ndarray]:
    export_hf(run, run / "hf")
    return load_file(run / "hf" / "model.safetensors")


def same_but_for_scheduling(ours: list[dict], theirs: list[dict]) -> bool:
    def what(lines: list[dict]) -> list[dict]:
        return [{name: value for name, value in line.items() if not name.startswith(scheduling)} for line in lines]

    scheduling = ("time/", "engine/")  # how long tools take decides who runs when, and nothing else

    return what(ours) == what(theirs)


@dataclass(frozen=True)
class Outcome:
    log: list[dict]
    rollouts: str
    weights: dict[str, np.ndarray]

    @classmethod
    def of(cls, run: Path) -> "Outcome":
        return cls(metrics(run), (run / "rollouts" / "step_2.jsonl").read_text(), exported(run))


def configure(task: Task, directory: Path) -> tuple[Path, Path]:
    """A run of three steps in `directory`, and its config."""
    run, config = directory / "run", directory / "config.py"
    text = RL.format(output=str(run), model=str(task.model), data=str(task.prompts), steps=3, every=3)
    # Steps so short that what is rounding in a gradient decides no token.
    config.write_text(text.replace("learning_rate=1e-2", "learning_rate=1e-4"))
    return run, config


@pytest.fixture(scope="module")
def host_driven(task, tmp_path_factory) -> Outcome:
    run, config = configure(task, tmp_path_factory.mktemp("host_driven"))
    finish(start("train", config))
    return Outcome.of(run)


@pytest.mark.parametrize(("mode", "processes"), [("fused", 1), ("host_driven", 2), ("fused", 2)])
def test_one_program_an_iteration_and_two_processes_are_the_same_run(task, tmp_path, host_driven, mode, processes):
    """What the sandbox answers, what is learned and what is logged are the same."""
    run, config = configure(task, tmp_path)
    command = ["-m", "tests.hdpo", "train", str(config), "--rollout.mode", mode, "--mesh.data", str(processes)]
    for status, _, errors in run_job(command, processes=processes, seconds=600):
        assert status == 0, errors[-3000:]
    found = Outcome.of(run)
    assert found.rollouts == host_driven.rollouts
    free = ("time/", "engine/") if processes == 1 else ("time/", "engine/", "rows/padding")  # each packs its own
    for ours, theirs in zip(found.log, host_driven.log, strict=True):
        assert ours.keys() >= {name for name in theirs if not name.startswith("time/")}
        for name in (name for name in theirs if not name.startswith(free)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    names, before = host_driven.weights.keys(), load_file(task.model / "model.safetensors")
    assert found.weights.keys() == names
    assert_learned_the_same(
        *([weights[name] for name in names] for weights in (found.weights, host_driven.weights, before))
    )


def test_a_dump_that_can_not_be_written_ends_the_run_and_nothing_is_lost(task, tmp_path, host_driven):
    """As a full disk does, a limit lets the system refuse to write, in the middle of the file."""
    run, config = configure(task, tmp_path)
    process = start("train", config, largest_file=2**15)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "File too large" in output.splitlines()[-1] and "Traceback" not in output
    assert reached_step(run) == 1  # a step is logged once all that it writes is written
    assert not list((run / "rollouts").iterdir())
    finish(start("train", config))
    again = Outcome.of(run)
    assert again.rollouts == host_driven.rollouts and same_but_for_scheduling(again.log, host_driven.log)
    for name, tensor in host_driven.weights.items():
        np.testing.assert_array_equal(again.weights[name], tensor, err_msg=name)


@pytest.mark.parametrize(("command", "template"), [("sft", SFT), ("train", RL)])
def test_killed_and_resumed_is_the_run_undisturbed(task, tmp_path, command, template):
    data = task.conversations if command == "sft" else task.prompts
    runs = []
    for name, kill in (("undisturbed", None), ("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        run, config = tmp_path / name, tmp_path / f"{name}.py"
        places = {"output": str(run), "model": str(task.model), "data": str(data)}
        config.write_text(template.format(**places, steps=STEPS, every=EVERY))
        process = start(command, config)
        if kill:
            interrupt(process, run, kill)
            reached, saved = reached_step(run), saved_steps(run)
            assert reached < STEPS, "the run was not interrupted"
            if kill == signal.SIGTERM:  # what was done is kept, whether a checkpoint was due or not
                assert process.returncode == 128 + kill
                assert max(saved) == reached
            else:
                assert process.returncode == -kill
                assert max(saved) < reached, "no step has to be done again"
            process = start(command, config)
        finish(process)
        runs.append(run)
    undisturbed, *disturbed = runs
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, STEPS + 1))
    weights = exported(undisturbed)
    for run in disturbed:
        assert same_but_for_scheduling(metrics(run), metrics(undisturbed))
        for name, tensor in exported(run).items():
            np.testing.assert_array_equal(tensor, weights[name], err_msg=name)
    if command == "train":
        lines = (undisturbed / "rollouts" / "step_2.jsonl").read_text().splitlines()
        assert len(lines) == 16
        # Sampler and trainer agree at every step.
        assert all(line["policy/logprob_gap_max"] < 1e-4 for line in metrics(undisturbed))
