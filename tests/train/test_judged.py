"""Iterations whose answers a judge can not always judge: what is learned then, and when a run stops."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from configs import signs_hdpo
from hdpo_jax.algorithm.state import TrainState, init_state
from hdpo_jax.config import JudgeConfig, ModelConfig, RewardsConfig, RLConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.evaluate.runner import evaluate_policy
from hdpo_jax.rewards import VerifierOutage, extract_answer
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.train.iteration import Iterate, Iteration, make_iteration
from hdpo_jax.train.policy import load_policy
from hdpo_jax.types import Prompt
from sharding.mesh import MeshAxes
from tests.rewards.judge_server import Asked, JudgeServer, Raw, shown
from tests.rollout.chatty import forbid_all_but_answers
from tests.small_signs import write_small_signs

pytestmark = pytest.mark.slow

PROMPTS, SAMPLES = 3, 6
OUT = Raw(500)


def fair(asked: Asked) -> str:
    """Right are answers with an even number of As: what differs within every group."""
    return "CORRECT" if shown(asked, "prediction")[0].count("A") % 2 == 0 else "INCORRECT"


@dataclass
class Setting:
    iterate: Iterate
    prompts: list[Prompt]
    state: Callable[[], TrainState]
    evaluate: Callable[[Path, int], dict[str, float]]
    server: JudgeServer
    answer: Callable[[Asked], str | Raw] = fair

    def run(self, answer: Callable[[Asked], str | Raw], prompts: Sequence[Prompt] | None = None) -> Iteration:
        """The first step of a run, by a judge that answers so; what an earlier step was told is in its cache."""
        self.answer = answer
        done = self.iterate(self.state(), prompts or self.prompts, 1)
        return replace(done, state=jax.device_get(done.state))


@pytest.fixture(scope="module", params=["host_driven", "fused"])
def setting(request, tmp_path_factory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("signs")
    files = write_small_signs(directory, conversations=40, boards=8)
    model = ModelConfig(path=str(directory / "model"), dtype="float32", remat="nothing")
    policy = load_policy(model, MeshAxes(), jax.devices()[:1])
    forbid_all_but_answers(policy.processor)
    base = signs_hdpo.get_config()
    with JudgeServer(lambda asked: setting.answer(asked)) as server:
        config: RLConfig = replace(
            base,
            model=model,
            rewards=RewardsConfig(
                verifiers=("judge",),
                judge=JudgeConfig(url=server.url, model="judge", attempts=1, max_outage=0.5),
            ),
            rollout=replace(base.rollout, mode=request.param, slots=8, chunk=8, shapes=((4, 48, 64),)),
            agent=replace(base.agent, max_calls=0, max_response_tokens=16),
            train=replace(base.train, prompts_per_step=PROMPTS, group_size=SAMPLES, micro_batch_rows=4, max_rows=12),
        )
        sampler = policy.sampler(None, agent=config.agent, rollout=config.rollout, seed=5)
        optimizer = optax.sgd(1.0)  # what is learned is the gradient
        dataset = PromptDataset(files.train)
        prompts = list(dataset)[:PROMPTS]

        def state() -> TrainState:
            return init_state(jax.tree.map(lambda leaf: leaf.copy(), policy.params), optimizer)

        def evaluate(path: Path, count: int) -> dict[str, float]:
            return evaluate_policy(sampler, policy.params, dataset, scorer, path, count=count, samples=SAMPLES)

        with Scorer(config.rewards) as scorer, jax.set_mesh(policy.mesh):
            iterate = make_iteration(config, policy, sampler, optimizer, range(PROMPTS), scorer)
            setting = Setting(iterate, prompts, state, evaluate, server)
            yield setting


def distance(one: TrainState, other: TrainState) -> float:
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def test_2c_an_outage_leaves_its_group_out_of_the_update_and_is_not_a_wrong_answer(setting, caplog):
    """Of the second group's answers: none can be judged; one can not; that one is called wrong."""
    truth = setting.prompts[1].ground_truth
    none = setting.run(lambda asked: OUT if shown(asked, "ground_truths") == [truth] else fair(asked))
    answers = [extract_answer(one.response_text) or "" for one in none.trajectories]
    mine = answers[SAMPLES : 2 * SAMPLES]
    lost = next(answer for answer in mine if answer.count("A") % 2 == 0 and mine.count(answer) == 1)
    assert len({answer.count("A") % 2 for answer in mine if answer != lost}) == 2, "nothing would be compared"
    assert none.verdicts[SAMPLES : 2 * SAMPLES] == [None] * SAMPLES and none.verdicts.count(None) == SAMPLES
    assert none.metrics["rewards/judge_outages"] == SAMPLES and none.metrics["rewards/dropped_groups"] == 1

    def is_lost(asked: Asked) -> bool:
        return shown(asked, "ground_truths") == [truth] and shown(asked, "prediction") == [lost]

    with caplog.at_level(logging.WARNING):
        caplog.clear()
        one = setting.run(lambda asked: OUT if is_lost(asked) else fair(asked))
    (warning,) = [record.message for record in caplog.records if "could not be judged" in record.message]
    assert warning.startswith(
        "step 1: 1 of 18 answers could not be judged, groups left out of the update: 1; the judge"
    )
    assert one.verdicts.count(None) == 1 and one.verdicts[SAMPLES + mine.index(lost)] is None
    assert one.metrics["rewards/judge_outages"] == 1 and one.metrics["rewards/dropped_groups"] == 1
    # What the other five were judged to be makes no difference: they were compared with nobody.
    assert distance(one.state, none.state) == 0

    wrong = setting.run(lambda asked: "INCORRECT" if is_lost(asked) else OUT)
    assert wrong.verdicts.count(None) == 0
    assert distance(wrong.state, one.state) > 1e-4
    assert wrong.metrics["rewards/judged"] == 1 and wrong.metrics["rewards/dropped_groups"] == 0
    assert wrong.metrics["rewards/cached"] == len([answer for answer in answers if answer]) - 1


def test_2c_a_run_stops_past_the_share_of_outages_and_takes_no_step(setting):
    """To the judge the prompts are others now: nothing of them is in its cache."""
    prompts = [replace(prompt, ground_truth=f"{prompt.ground_truth} or so") for prompt in setting.prompts]
    said = r"^10 of 18 answers could not be judged, and rewards.judge.max_outage is 0.5: the judge .*: Error code: 500"
    with pytest.raises(VerifierOutage, match=said):
        setting.run(lambda asked: OUT, prompts)
    assert setting.run(fair, prompts).verdicts.count(None) == 0


def test_2c_an_evaluation_leaves_out_what_could_not_be_judged_and_says_how_many(setting, tmp_path, caplog):
    truth = setting.prompts[1].ground_truth
    setting.answer = lambda asked: OUT if shown(asked, "ground_truths") == [truth] else fair(asked)
    results = setting.evaluate(tmp_path / "trajectories.jsonl", PROMPTS)
    records = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    unjudged = [record for record in records if record["correct"] is None]
    judged = [record["correct"] for record in records if record["correct"] is not None]
    assert all(record["group"] == 1 and record["rewards"] is None for record in unjudged)
    assert results["not_judged"] == len(unjudged) > 1
    # As wrong answers they would be in the denominator too.
    assert 0 < results["accuracy"] == sum(judged) / len(judged)
    assert f"{len(unjudged)} answers could not be judged and are left out of the accuracy: the judge (" in caplog.text
    # Of eight prompts, what is known of three does not help: 24 answers and more of 48 can not be judged.
    setting.answer = lambda asked: OUT
    with pytest.raises(VerifierOutage, match="^25 of 48 answers could not be judged"):
        setting.evaluate(tmp_path / "again.jsonl", 8)
    assert not (tmp_path / "again.jsonl").exists()
