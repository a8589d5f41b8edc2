"""Verdicts of trajectories as a run's settings say: in order, while others are sampled, and honest about outages."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdpo_jax.config import ConfigError, JudgeConfig, RewardsConfig
from hdpo_jax.rewards import Claim, Verdict, VerifierOutage
from hdpo_jax.rewards.custom import RewardFunctionFailed
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.types import Prompt, StopReason, Trajectory, Turn
from tests.rewards.judge_server import Asked, JudgeServer, Raw, careful, shown

RIGHT, WRONG = Verdict(1.0, 1.0, 1.0, 1.0, True), Verdict(0.0, 1.0, 0.1, 0.0, False)


def trajectory(answer: str, *, truth: Sequence[str] = ("a zebra",), sample: int = 0, **more: Any) -> Trajectory:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    settings = {"stop": StopReason.END_OF_TURN, "group": 0, "calls": 0} | more
    return Trajectory(
        prompt=Prompt(id="p", messages=messages, images=[], ground_truth=tuple(truth), data_source="test"),
        sample=sample,
        token_ids=np.zeros(0, np.int32),
        sampled=np.zeros(0, bool),
        logprobs=np.zeros(0, np.float32),
        sampled_logprobs=np.zeros(0, np.float32),
        prompt_length=0,
        images=[],
        prompt_images=0,
        turns=[Turn(role="assistant", text=f"<reason>I look.</reason><answer>{answer}</answer>")],
        **settings,
    )


def config(server: JudgeServer, *verifiers: str, **judge: Any) -> RewardsConfig:
    settings = {"url": server.url, "model": "judge", "attempts": 1} | judge
    return RewardsConfig(verifiers=verifiers or ("rules", "judge"), judge=JudgeConfig(**settings))


def same_animal(asked: Asked) -> str:
    return "CORRECT" if "striped" in shown(asked, "prediction")[0] else "INCORRECT"


def test_2d_rules_answer_first_and_the_judge_what_they_can_not_tell():
    answers = ["a zebra", "a striped horse of Africa", "some horse"]
    with JudgeServer(same_animal) as server, Scorer(config(server)) as scorer:
        assert scorer.verdicts([*map(trajectory, answers)], of=3) == [RIGHT, RIGHT, WRONG]
        assert sorted(shown(asked, "prediction")[0] for asked in server.asked) == sorted(answers[1:])
        assert shown(server.asked[0], "question") == ["<image>What is it?"]


def test_2d_rules_alone_need_no_endpoint_and_no_thread():
    before = threading.active_count()
    with Scorer(RewardsConfig()) as scorer:
        one = trajectory("a zebra")
        scorer.begin(one)
        assert scorer.verdicts([one, trajectory("some horse")], of=2) == [RIGHT, WRONG]
        assert threading.active_count() == before


def test_only_what_can_be_learned_from_is_judged():
    """A rollout that the world broke off, and one without an answer, cost no question; an outage of none is lost."""
    lost = trajectory("a striped horse", stop=StopReason.DROPPED)
    silent = trajectory("")
    silent.turns = [Turn(role="assistant", text="<reason>hm</reason>")]
    with JudgeServer(same_animal) as server, Scorer(config(server)) as scorer:
        verdicts = scorer.verdicts([lost, silent], of=2)
        assert [verdict and verdict.correct for verdict in verdicts] == [False, False] and not server.asked


def test_verdicts_come_in_the_order_of_trajectories_however_long_each_takes():
    def slow(asked: Asked) -> str:
        (prediction,) = shown(asked, "prediction")
        time.sleep(0.02 * (10 - int(prediction.split()[1])))
        return "CORRECT" if int(prediction.split()[1]) % 3 == 0 else "INCORRECT"

    trajectories = [trajectory(f"animal {number}", sample=number) for number in range(10)]
    with JudgeServer(slow) as server, Scorer(config(server, "judge")) as scorer:
        for one in reversed(trajectories[3:]):
            scorer.begin(one)
        verdicts = scorer.verdicts(trajectories, of=10)
        assert [verdict and verdict.correct for verdict in verdicts] == [number % 3 == 0 for number in range(10)]
        assert len(server.asked) == 10  # what had begun was not asked again


def test_a_judge_is_asked_while_others_are_still_sampled():
    """Ten answers, each sampled in 0.1 s and judged in 0.3 s: one after the other they would take 4 s."""

    def slow(asked: Asked) -> str:
        time.sleep(0.3)
        return "CORRECT"

    with JudgeServer(slow) as server, Scorer(config(server, "judge")) as scorer:
        started, trajectories = time.monotonic(), []
        for number in range(10):
            time.sleep(0.1)
            trajectories.append(trajectory(f"animal {number}"))
            scorer.begin(trajectories[-1])
        sampled = time.monotonic()
        assert scorer.verdicts(trajectories, of=10) == [RIGHT] * 10
        # Nine of them were judged meanwhile: what is left is the last one's time, not ten of them.
        assert time.monotonic() - sampled < 2 and time.monotonic() - started < 3.5


def test_2c_an_outage_is_no_verdict_and_not_a_wrong_answer():
    def half(asked: Asked) -> str | Raw:
        return "CORRECT" if "striped" in shown(asked, "prediction")[0] else Raw(500)

    trajectories = [*map(trajectory, ["a striped horse", "a horse", "a zebra"])]
    with JudgeServer(half) as server, Scorer(config(server, max_outage=0.34)) as scorer:
        assert scorer.verdicts(trajectories, of=3) == [RIGHT, None, RIGHT]
        assert "can not be asked: Error code: 500" in scorer.said
    # Of three, one is more than 0.33 allows.
    with JudgeServer(half) as server, Scorer(config(server, max_outage=0.33)) as scorer:
        with pytest.raises(
            VerifierOutage,
            match=r"^1 of 3 answers could not be judged, and rewards.judge.max_outage is 0.33: the judge .* code: 500",
        ) as said:
            scorer.verdicts(trajectories, of=3)
        assert "\n" not in str(said.value)


@pytest.mark.timeout(60)
def test_2c_a_dead_judge_is_found_out_before_all_have_waited_for_it():
    """A thousand answers, two at a time, each for 0.2 s, would take 100 s; after 11 it is clear."""

    def dead(asked: Asked) -> Raw:
        time.sleep(0.2)
        return Raw(500)

    trajectories = [trajectory(f"animal {number}") for number in range(1_000)]
    with JudgeServer(dead) as server, Scorer(config(server, "judge", concurrency=2, max_outage=0.01)) as scorer:
        started = time.monotonic()
        with pytest.raises(VerifierOutage, match="^11 of 1000 answers could not be judged"):
            scorer.verdicts(trajectories, of=1_000)
        scorer.close()
        assert time.monotonic() - started < 10 and len(server.asked) < 30


def knows_colours(claim: Claim) -> bool | None:
    return claim.prediction in claim.truths if claim.prediction.startswith("colour") else None


def is_away(claim: Claim) -> bool | None:
    raise VerifierOutage("my service is away")


def is_broken(*arguments: Any) -> bool:
    raise KeyError("zebra")


def is_vague(*arguments: Any) -> str:
    return "maybe"


def prefers_few_words(trajectory: Trajectory, verdict: Verdict) -> Verdict:
    return verdict._replace(accuracy=verdict.accuracy - 0.01 * len(trajectory.response_text.split()))


CWD = Path.cwd()
HERE = "tests.rewards.test_scorer"


def test_functions_of_ones_own_are_asked_in_their_place():
    rewards = RewardsConfig(verifiers=(f"{HERE}:knows_colours", "rules"), function=f"{HERE}:prefers_few_words")
    with Scorer(rewards) as scorer:
        truth = ("colour red", "a zebra")
        found = scorer.verdicts(
            [trajectory(answer, truth=truth) for answer in ("colour red", "a zebra", "horse")], of=3
        )
    assert [verdict and verdict.correct for verdict in found] == [True, True, False]
    assert [verdict and verdict.accuracy for verdict in found] == pytest.approx([0.97, 0.97, 0.08])


@pytest.mark.parametrize("judged", [False, True])
def test_a_function_that_fails_ends_the_run_and_is_named_and_one_that_is_away_is_an_outage(judged):
    verifiers = ("judge",) if judged else ()
    with JudgeServer(careful) as server:
        for name, said in (
            ("is_broken", f"^{HERE}:is_broken raised KeyError: 'zebra'"),
            ("is_vague", f"^{HERE}:is_vague returned 'maybe'; expected True, False or None"),
        ):
            scorer = Scorer(config(server, f"{HERE}:{name}", *verifiers))
            with scorer, pytest.raises(RewardFunctionFailed, match=said):
                scorer.verdicts([trajectory("a zebra"), trajectory("horse")], of=2)
        with Scorer(config(server, f"{HERE}:is_away", *verifiers, max_outage=1.0)) as scorer:
            assert scorer.verdicts([trajectory("a zebra")], of=1) == [None]
            assert scorer.said == "my service is away"
    for name, said in (("is_broken", "raised KeyError"), ("is_vague", "returned 'maybe'; expected a hdpo_jax")):
        scorer = Scorer(RewardsConfig(function=f"{HERE}:{name}"))
        with scorer, pytest.raises(RewardFunctionFailed, match=f"^{HERE}:{name} {said}"):
            scorer.verdicts([trajectory("a zebra")], of=1)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("judges", "rewards.verifiers holds 'judges'; expected module:name or file.py:name"),
        (":f", "rewards.verifiers holds ':f'; expected module:name or file.py:name"),
        (
            "no.such:f",
            f"rewards.verifiers holds 'no.such:f': there is no module no.such, neither installed nor in {CWD}",
        ),
        ("no/such.py:f", f"rewards.verifiers holds 'no/such.py:f': there is no file {CWD}/no/such.py"),
        (f"{HERE}:nothing", f"rewards.verifiers holds '{HERE}:nothing': {HERE} has no nothing"),
        (f"{HERE}:HERE", f"rewards.verifiers holds '{HERE}:HERE', which is str; expected a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_in_one_line(path, said):
    with pytest.raises(ConfigError) as refused:
        Scorer(RewardsConfig(verifiers=("rules", path)))
    assert str(refused.value) == said
    with pytest.raises(ConfigError) as refused:
        Scorer(RewardsConfig(function=path))
    assert str(refused.value) == said.replace("verifiers", "function")


def test_a_module_of_the_folder_that_the_command_runs_in_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def always(claim):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    with Scorer(RewardsConfig(verifiers=("my_own_rewards:always",))) as scorer:
        assert scorer.verdicts([trajectory("horse")], of=1) == [RIGHT]


def test_what_the_example_in_the_documentation_shows_works(tmp_path, monkeypatch):
    from hdpo_jax.rewards import custom

    assert custom.__doc__
    lines = [line.removeprefix("    ") for line in custom.__doc__.splitlines() if line.startswith("    ")]
    (tmp_path / "my_rewards.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    settings = RewardsConfig(verifiers=("my_rewards:same_colour", "rules"), function="my_rewards:short_answers")
    with Scorer(settings) as scorer:
        red = [trajectory(answer, truth=("red",)) for answer in ("Red", "a red one", "red" + " indeed" * 500)]
        found = scorer.verdicts([*red, trajectory("a zebra")], of=4)
    assert [verdict and verdict.accuracy for verdict in found] == pytest.approx([1.0, 0.1, 0.0, 1.0])


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"url": "", "model": "m"}, "^rewards.judge.url is ''; expected an address such as http"),
        ({"url": "judge:8000", "model": "m"}, "^rewards.judge.url is 'judge:8000'; expected an address such as http"),
        ({"url": "http://judge:8000/v1"}, "^rewards.judge.model is ''; expected a model's name"),
    ],
)
def test_a_judge_needs_an_address_and_a_name(judge, said):
    with pytest.raises(ConfigError, match=said):
        RewardsConfig(verifiers=("rules", "judge"), judge=JudgeConfig(**judge))
