"""Whole runs in jobs of several processes: what one process learns, also where some are slow, killed or stopped."""

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from hdpo_jax.train.metrics import read_metrics
from sharding.watch import EX_TEMPFAIL
from tests.processes import end, ended, run_job, start_job
from tests.train.conftest import Task
from tests.train.test_runs import RL, SFT, exported, reached_step, saved_steps
from tests.updates import assert_learned_the_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EIGHT = ("--mesh.data", "2", "--mesh.fsdp", "4")
SMALL = ("--train.mini-batches", "1", "--train.micro-batch-rows", "8", "--model.remat", "nothing")
SFT_STEPS = 6


def configure(task: Task, directory: Path, template: str, steps: int) -> list[str]:
    """A config in `directory`, a checkpoint each step; the command that runs it."""
    directory.mkdir()
    config, data = directory / "config.py", task.conversations if template is SFT else task.prompts
    places = {"output": str(directory / "run"), "model": str(task.model), "data": str(data)}
    text = template.format(**places, steps=steps, every=1)
    # Steps so short that what is rounding in a gradient decides no token; and few programs to compile.
    changes = {
        "learning_rate=1e-2": "learning_rate=1e-4",
        "chunk=8": "chunk=8, shapes=((16, 48, 64),)",
        "dump_every=2": "dump_every=1",
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    config.write_text(text)
    if template is SFT:
        return ["-m", "tests.hdpo", "sft", str(config), "--train.micro-batch-rows", "4"]
    return ["-m", "tests.train.chatty_hdpo", "train", str(config), *SMALL]


def run(command: list[str], **job: int) -> None:
    for status, _, errors in run_job(command, **job, seconds=600):
        assert status == 0, errors[-3000:]


def assert_same_run(found: Path, expected: Path, before: Path) -> None:
    """What was sampled, logged and learned; each process packs its own rows, and schedules its own slots."""
    free = ("time/", "engine/", "rows/padding", "rewards/judge_seconds")
    ours, theirs = read_metrics(found / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in (name for name in other if not name.startswith(free)):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    for dump in (expected / "rollouts").glob("*.jsonl"):
        assert (found / "rollouts" / dump.name).read_text() == dump.read_text()
    weights, wanted = exported(found), exported(expected)
    start = load_file(before / "model.safetensors")
    assert weights.keys() == wanted.keys()
    assert_learned_the_same(*([each[name] for name in wanted] for each in (weights, wanted, start)))


def wait_for_checkpoint(workers: Sequence[subprocess.Popen[str]], run: Path, step: int) -> None:
    until = time.monotonic() + 500
    while max(saved_steps(run), default=0) < step:
        if time.monotonic() > until or any(worker.poll() for worker in workers):
            end(workers)
            pytest.fail(f"step {step} was not saved: {[errors[-1000:] for _, _, errors in ended(workers, 10)]}")
        time.sleep(0.05)


def test_four_processes_one_killed_and_one_that_finishes_learn_what_one_does(task, tmp_path):
    """Their tools, those of one of them slow, run where the slots are; no prompt is skipped or learned from twice."""
    expected, found = tmp_path / "one" / "run", tmp_path / "many" / "run"
    run([*configure(task, expected.parent, RL, steps=3), *EIGHT], processes=1, devices=8)
    command = configure(task, found.parent, RL, steps=3)

    workers = start_job([*command, *EIGHT], processes=4, devices=2)
    wait_for_checkpoint(workers, found, 1)
    workers[2].kill()
    killed = time.monotonic()
    outcomes = ended(workers, 100)
    assert time.monotonic() - killed < 60
    for status, _, errors in (outcomes[number] for number in (0, 1, 3)):
        assert status == EX_TEMPFAIL, errors[-3000:]
        said = "\n".join(line for line in errors.splitlines() if "this one can not go on without it" in line)
        assert re.search("process 2 of 4 on .* has not been heard of for 30 s: .* from its last checkpoint$", said), (
            errors[-3000:]
        )
    assert_tools_ran_at_their_slots(found, expected)

    run([*command, *EIGHT], processes=1, devices=8)
    assert_same_run(found, expected, task.model)


def assert_tools_ran_at_their_slots(found: Path, expected: Path) -> None:
    """Each of four processes answered the calls of its own prompt, at least in the first step; the second began."""
    calls = Counter()
    for line in (expected / "rollouts" / "step_1.jsonl").read_text().splitlines():
        one = json.loads(line)
        calls[one["group"]] += one["calls"]  # of four prompts, the number of each is that of its process
    assert calls[1] > 0 and sum(number > 0 for number in calls.values()) > 1
    for process, number in calls.items():
        file = found.parent / f"calls_{process}"
        answered = file.read_text().split() if file.exists() else []
        assert number <= len(answered) < calls.total()
        assert len(set(answered)) <= 1


def test_two_processes_told_to_stop_and_one_that_finishes_learn_conversations_as_one_does(task, tmp_path):
    """SIGTERM to one of them has both save and stop."""
    expected, found = tmp_path / "one" / "run", tmp_path / "two" / "run"
    mesh = ("--mesh.data", "2")
    run([*configure(task, expected.parent, SFT, steps=SFT_STEPS), *mesh], processes=1, devices=4)
    command = [*configure(task, found.parent, SFT, steps=SFT_STEPS), *mesh]
    workers = start_job(command, processes=2, devices=2)
    wait_for_checkpoint(workers, found, 1)
    workers[1].terminate()
    for status, _, errors in ended(workers, 100):
        assert status == 128 + signal.SIGTERM, errors[-3000:]
    assert max(saved_steps(found)) == reached_step(found) < SFT_STEPS
    run(command, processes=1, devices=4)
    assert_same_run(found, expected, task.model)
