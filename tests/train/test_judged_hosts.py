"""A job of two processes with a judge: they leave the same groups out, learn what one does, and stop together."""

from pathlib import Path

import pytest

from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.train.metrics import read_metrics
from tests.processes import run_job
from tests.rewards.judge_server import Asked, JudgeServer, Raw, shown
from tests.train.conftest import Task
from tests.train.test_hosts import assert_same_run
from tests.train.test_runs import RL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, PROMPTS, SAMPLES = 2, 4, 4


def command_of(task: Task, directory: Path, server: JudgeServer, *flags: str) -> list[str]:
    directory.mkdir()
    config = directory / "config.py"
    places = {"output": str(directory / "run"), "model": str(task.model), "data": str(task.prompts)}
    text = RL.format(**places, steps=STEPS, every=STEPS)
    # Steps so short that what is rounding in a gradient decides no token; and few programs to compile.
    changes = {
        "learning_rate=1e-2": "learning_rate=1e-4",
        "chunk=8": "chunk=8, shapes=((16, 48, 64),)",
        "max_response_tokens=48": "max_response_tokens=8",
        "dump_every=2": "dump_every=1",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    judge = ["--rewards.verifiers", "judge", "--rewards.judge.url", server.url, "--rewards.judge.model", "judge"]
    judge += ["--rewards.judge.attempts", "1", "--tools.sandbox", "none"]
    return ["-m", "tests.train.answering_hdpo", "train", str(config), "--mesh.data", "2", *judge, *flags]


def test_2c_two_processes_leave_the_same_groups_out_and_learn_what_one_does(task, tmp_path):
    """Of every third prompt, the judge can not be asked about answers with an A."""
    out = {prompt.ground_truth for prompt in list(PromptDataset(task.prompts))[::3]}

    def answer(asked: Asked) -> str | Raw:
        (prediction,), (truth,) = shown(asked, "prediction"), shown(asked, "ground_truths")
        if truth in out and "A" in prediction:
            return Raw(500)
        return "CORRECT" if prediction.count("A") % 2 == 0 else "INCORRECT"

    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    with JudgeServer(answer) as server:
        for run, processes in ((one, 1), (two, 2)):
            command = command_of(task, run.parent, server, "--rewards.judge.max-outage", "1.0")
            outcomes = run_job(command, processes=processes, devices=2 // processes, seconds=400)
            for number, (status, _, errors) in enumerate(outcomes):
                assert status == 0, errors[-3000:]
                # Said once, by the first, of all processes.
                warned = [line for line in errors.splitlines() if "of 16 answers could not be judged, groups" in line]
                assert len(warned) == (STEPS if number == 0 else 0), errors[-3000:]
    assert_same_run(two, one, task.model)
    lines = read_metrics(one / "metrics.jsonl")
    # Something was left out, and something was learned from.
    assert all(0 < line["rewards/dropped_groups"] < PROMPTS for line in lines)
    assert [line["rollout/dropped"] for line in lines] == [SAMPLES * line["rewards/dropped_groups"] for line in lines]
    assert all(0 < line["reward/correct"] < 1 and line["loss/total"] != 0 for line in lines)


def test_2c_past_the_share_both_processes_stop_in_one_line(task, tmp_path):
    """Neither alone can have more than half of the step's answers out of reach; together they have."""
    with JudgeServer(lambda asked: Raw(500)) as server:
        command = command_of(task, tmp_path / "job", server, "--rewards.judge.max-outage", "0.6")
        outcomes = run_job(command, processes=2, devices=1, seconds=400)
    for status, _, errors in outcomes:
        assert status == 1, errors[-3000:]
        said = errors.splitlines()[-1]
        assert "of 16 answers could not be judged, and rewards.judge.max_outage is 0.6: the judge (" in said
        assert "Traceback" not in errors
    assert read_metrics(tmp_path / "job" / "run" / "metrics.jsonl") == []
