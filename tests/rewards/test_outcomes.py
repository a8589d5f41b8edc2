"""Summaries of judged trajectories: worked by hand."""

import pytest

from hdpo_jax.rewards.outcomes import Outcome, summarise


def outcome(correct: bool | None, calls: int, legible: bool | None = None, usable: bool = True) -> Outcome:
    return Outcome(correct=correct, calls=calls, usable=usable, legible=legible)


def test_dropped_rollouts_do_not_count():
    # Counted as wrong, the third would make the accuracy 1/3; its 5 calls would make the mean 7/3.
    assert summarise([outcome(True, 0), outcome(False, 2), outcome(False, 5, usable=False)]) == {
        "accuracy": 0.5,
        "tool_rate": 0.5,
        "calls_per_rollout": 1.0,
    }


def test_what_could_not_be_judged_is_left_out_of_the_accuracy_and_counted():
    # As a wrong answer, the third would make the accuracy 1/3; how it got there still counts.
    assert summarise([outcome(True, 0), outcome(False, 1), outcome(None, 2)]) == {
        "accuracy": 0.5,
        "tool_rate": pytest.approx(2 / 3),
        "calls_per_rollout": 1.0,
        "not_judged": 1,
    }


def test_rates_by_legibility():
    outcomes = [outcome(True, 1, True), outcome(True, 0, True), outcome(False, 0, False), outcome(True, 2, False)]
    summary = summarise([*outcomes, outcome(True, 1, False)])
    assert summary["redundant_tool_rate"] == 0.5  # one of two legible boards; one of five boards would be 0.2
    assert summary["needed_tool_rate"] == pytest.approx(2 / 3)
    assert (summary["accuracy_legible"], summary["accuracy_illegible"]) == (1.0, pytest.approx(2 / 3))
    assert summary["calls_per_rollout"] == pytest.approx(4 / 5)


def test_nothing_usable_is_zero_not_an_error():
    assert summarise([outcome(True, 1, True, usable=False)])["accuracy"] == 0.0
