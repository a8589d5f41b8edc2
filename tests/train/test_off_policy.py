"""A run that samples a step ahead: what it learns from, and where it goes on when it was told to stop."""

import functools
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from configs import signs_hdpo
from hdpo_jax.config import RewardsConfig, RLConfig, ToolsConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.rewards import Verdict
from hdpo_jax.train import rl
from hdpo_jax.train.loop import host_batches
from hdpo_jax.train.metrics import read_metrics
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Trajectory
from tests.small_signs import write_small_signs

STEPS, STOPPED = 4, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RLConfig:
    directory = tmp_path_factory.mktemp("signs")
    files = write_small_signs(directory, conversations=40, boards=16)
    config = signs_hdpo.get_config()
    return replace(
        config,
        output=str(directory / "run"),
        model=replace(config.model, path=str(directory / "model"), remat="nothing"),
        data=replace(config.data, path=str(files.train)),
        tools=ToolsConfig(sandbox="none", workers=1),
        rewards=RewardsConfig(function="tests.train.test_off_policy:judge"),
        rollout=replace(config.rollout, slots=8, chunk=8, shapes=((2, 48, 64),)),
        agent=replace(config.agent, max_calls=0, max_response_tokens=16),
        algorithm=replace(config.algorithm, importance_cap=2.0),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
        train=replace(
            config.train,
            steps=STEPS,
            prompts_per_step=2,
            group_size=4,
            micro_batch_rows=2,
            max_rows=8,
            dump_every=1,
            off_policy_steps=1,
        ),
    )


def judge(trajectory: Trajectory, _: Verdict) -> Verdict:
    """What differs within every group, though the policy is random."""
    accuracy = int(trajectory.token_ids.sum()) % 7 / 7
    return Verdict(accuracy=accuracy, tool=0.0, answer=accuracy, format=0.0, correct=False)


def prompts_learned(config: RLConfig) -> list[list[str]]:
    """Ids of the prompts of each step, by the rollout dumps."""
    files = [Path(config.output) / "rollouts" / f"step_{step}.jsonl" for step in range(1, STEPS + 1)]
    steps = [[json.loads(line)["prompt_id"] for line in file.read_text().splitlines()] for file in files]
    return [list(dict.fromkeys(ids)) for ids in steps]


@pytest.mark.slow
def test_a_run_told_to_stop_goes_on_with_what_it_sampled_but_did_not_learn(config, monkeypatch):
    monkeypatch.setattr(rl, "load_policy", functools.partial(load_policy, devices=jax.devices()[:1]))
    write_lines = rl.write_lines

    def write_and_stop(path, records):
        write_lines(path, records)
        if path.stem == f"step_{STOPPED}":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rl, "write_lines", write_and_stop)
    stopped = rl.train_rl(config)
    assert (stopped.steps, stopped.stopped_by) == (STOPPED, signal.SIGTERM)
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
    finished = rl.train_rl(config)
    assert (finished.steps, finished.stopped_by) == (STEPS, 0)
    assert stopped.compilations_after_warmup == finished.compilations_after_warmup == 0

    dataset = PromptDataset(config.data.path)
    expected = host_batches(dataset, config.train.prompts_per_step, config)
    # The third batch was under way when the run stopped: from the state after it, the fourth would come twice early.
    assert prompts_learned(config) == [[prompt.id for prompt in next(expected)] for _ in range(STEPS)]
    expected.close()

    lines = read_metrics(Path(config.output) / "metrics.jsonl")
    importance = [line["policy/importance_mean"] for line in lines]
    gaps = [line["policy/logprob_gap_max"] for line in lines]
    # The first step of each part is on-policy; the others were sampled by parameters of a step before.
    for on_policy in (0, STOPPED):
        assert importance[on_policy] == pytest.approx(1.0, abs=1e-4) and gaps[on_policy] < 1e-3
    for off_policy in (1, STOPPED + 1):
        assert 0.1 < importance[off_policy] < 2.0 and gaps[off_policy] > 1e-2
