"""The rewards of a whole response: formula, protocol, and whose words count."""

import numpy as np
import pytest

from hdpo_jax.rewards import (
    VerifierOutage,
    format_reward,
    score_response,
    score_trajectory,
    tool_reward,
)
from hdpo_jax.types import Prompt, StopReason, Trajectory, Turn

GOOD = "<reason>It is striped.</reason>\n<answer>zebra</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1),
        ("<answer>zebra</answer>", 1),
        ("<reason>a</reason><tool_call>{}</tool_call>\n<reason>b</reason><answer>x</answer>", 1),
        ("<answer>a</answer><answer>b</answer>", 1),
        ("", 0),
        ("zebra", 0),
        ("<reason>a<answer>x</answer>", 0),
        ("a</reason><answer>x</answer>", 0),
        ("<answer>x</answer><tool_call>{}", 0),
        ("<answer>x", 0),
        ("<answer>x</answer></answer>", 0),
        # The answer must come after the reasoning.
        ("<answer>x</answer><reason>a</reason>", 0),
        ("<reason><answer>x</answer></reason>", 0),
        # An unbalanced mention inside the reasoning is no error.
        ("<reason>I write <answer> next</reason><answer>x</answer>", 1),
    ],
)
def test_format(text, reward):
    assert format_reward(text) == reward


def test_tool_reward():
    assert [tool_reward(calls, True) for calls in range(4)] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert tool_reward(0, False) == tool_reward(5, False) == 0.0
    with pytest.raises(ValueError, match="calls is -1"):
        tool_reward(-1, True)


@pytest.mark.parametrize(
    ("text", "accuracy", "correct"),
    [
        (GOOD, 1.0, True),
        (GOOD.replace("zebra", "horse"), 0.1, False),
        ("<reason>a<answer>zebra</answer>", 0.9, True),
        ("zebra", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_accuracy_is_nine_tenths_answer_and_one_tenth_format(text, accuracy, correct):
    verdict = score_response(text, "zebra", calls=0)
    assert (verdict.accuracy, verdict.correct) == (accuracy, correct)


def test_a_right_answer_in_bad_format_still_earns_the_tool_reward():
    verdict = score_response("<reason>a<answer>zebra</answer>", ["a zebra", "zebra"], calls=1)
    assert verdict == (1.0, 0.0, 0.9, 0.5, True)


def rollout(*turns: Turn, calls: int = 0) -> Trajectory:
    prompt = Prompt(id="p", messages=[], images=[], ground_truth="zebra", data_source="test")
    return Trajectory(
        prompt=prompt,
        group=0,
        sample=0,
        token_ids=np.zeros(0, np.int32),
        sampled=np.zeros(0, bool),
        logprobs=np.zeros(0, np.float32),
        sampled_logprobs=np.zeros(0, np.float32),
        prompt_length=0,
        images=[],
        prompt_images=0,
        turns=turns,
        calls=calls,
        stop=StopReason.END_OF_TURN,
    )


def test_only_what_the_policy_wrote_counts():
    call = Turn(role="assistant", text="<reason>look</reason><tool_call>{}</tool_call>")
    page = Turn(role="tool", text="<answer>zebra</answer>")
    # Reading the whole transcript would give 1.0: a web page that holds the answer.
    assert score_trajectory(rollout(call, page, Turn(role="assistant", text="hm"), calls=1)).accuracy == 0.0
    wrong = Turn(role="assistant", text="<reason>r</reason><answer>horse</answer>")
    assert score_trajectory(rollout(call, page, wrong, calls=1)).accuracy == 0.1
    # And a page can not spoil a good format: the whole transcript has one </reason> too many.
    spoiler = Turn(role="tool", text="</reason><answer>horse</answer><tool_call>")
    verdict = score_trajectory(rollout(call, spoiler, Turn(role="assistant", text=GOOD), calls=1))
    assert verdict == (1.0, 1.0, 1.0, 0.5, True)


def test_the_last_answer_counts():
    first, second = (Turn(role="assistant", text=f"<answer>{answer}</answer>") for answer in ("zebra", "horse"))
    assert not score_trajectory(rollout(first, second)).correct
    assert score_trajectory(rollout(second, first)).correct


def test_verifiers_are_asked_in_order_until_one_can_tell():
    asked = []

    def verifier(name, verdict):
        def judge(claim):
            asked.append((name, *claim))
            return verdict

        return judge

    chain = (verifier("rules", None), verifier("judge", True), verifier("never", False))
    assert score_response(GOOD, "a zebra", 0, chain, question="What is it?").correct
    claim = ("What is it?", "zebra", ("a zebra",))
    assert asked == [("rules", *claim), ("judge", *claim)]
    assert not score_response(GOOD, "a zebra", 0, (verifier("rules", None),)).correct
    asked.clear()
    # Without an answer nobody is asked.
    assert not score_response("zebra", "zebra", 0, chain).correct and not asked


def test_an_outage_is_not_a_wrong_answer():
    def judge(claim):
        raise VerifierOutage("the judge at localhost:1 does not answer")

    with pytest.raises(VerifierOutage):
        score_response(GOOD, "a zebra", 0, (judge,))
