"""Whole runs in jobs of several processes: what one process learns, also where some are slow, killed or stopped."""

import json
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from hdpo_jax.data.pipeline import share
from hdpo_jax.train.metrics import read_metrics
from sharding.watch import EX_TEMPFAIL
from tests.processes import end, ended, run_job, start_job
from tests.train.conftest import Task
from tests.train.test_runs import RL, SFT, exported, reached_step, saved_steps
from tests.updates import assert_learned_the_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EIGHT = ("--mesh.data", "2", "--mesh.fsdp", "4")
SMALL = ("--train.mini-batches", "1", "--train.micro-batch-rows", "8", "--model.remat", "nothing")


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
    free = ("time/", "engine/", "rows/padding")
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


def wait_for_step(workers, run: Path, step: int) -> None:
    until = time.monotonic() + 500
    while reached_step(run) < step:
        if time.monotonic() > until or any(worker.poll() for worker in workers):
            end(workers)
            pytest.fail(f"step {step} was not reached: {[errors[-1000:] for _, _, errors in ended(workers, 10)]}")
        time.sleep(0.05)


def test_four_processes_killed_and_stopped_and_one_that_finishes_learn_what_one_does(task, tmp_path):
    """Their tools, those of one of them slow, run where the slots are; no prompt is skipped or learned from twice."""
    expected, found = tmp_path / "one" / "run", tmp_path / "many" / "run"
    run([*configure(task, expected.parent, RL, steps=3), *EIGHT], processes=1, devices=8)
    command = configure(task, found.parent, RL, steps=3)

    workers = start_job([*command, *EIGHT], processes=4, devices=2)
    wait_for_step(workers, found, 1)
    saved = max(saved_steps(found), default=0)
    workers[2].kill()
    killed = time.monotonic()
    outcomes = ended(workers, 100)
    assert time.monotonic() - killed < 60
    for status, _, errors in (outcomes[number] for number in (0, 1, 3)):
        assert status == EX_TEMPFAIL, errors[-3000:]
        (said,) = [line for line in errors.splitlines() if line.startswith("hdpo:")]
        assert re.match("hdpo: process 2 of 4 on .* has not been heard of for 30 s: .* from its last checkpoint$", said)
    calls_in_steps(found, expected, task)

    workers = start_job([*command, *EIGHT], processes=4, devices=2)
    wait_for_step(workers, found, saved + 1)
    workers[3].terminate()
    for status, _, errors in ended(workers, 100):
        assert status == 128 + signal.SIGTERM, errors[-3000:]
    assert max(saved_steps(found)) == reached_step(found) < 3

    run([*command, *EIGHT], processes=1, devices=8)
    assert_same_run(found, expected, task.model)


def calls_in_steps(found: Path, expected: Path, task: Task) -> None:
    """Every process answered the calls of its own prompts, in the steps so far (of the last of them, perhaps some)."""
    prompts = [json.loads(line) for line in (expected / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    owners = {number: process for process in range(4) for number in share(4, process, 4).tolist()}
    calls = Counter()
    for one in prompts:
        calls[owners[one["group"]]] += one["calls"]
    assert min(calls.values()) > 0 and len(calls) == 4
    for process, number in calls.items():
        lines = (found.parent / f"calls_{process}").read_text().split()
        assert len(set(lines)) == 1 and number <= len(lines)


def test_two_processes_learn_conversations_as_one_does(task, tmp_path):
    expected, found = tmp_path / "one" / "run", tmp_path / "two" / "run"
    run(configure(task, expected.parent, SFT, steps=2), processes=1, devices=4)
    run([*configure(task, found.parent, SFT, steps=2), "--mesh.data", "2"], processes=2, devices=2)
    assert_same_run(found, expected, task.model)
