"""Accuracy and tool use of a set of judged trajectories, as a report or a training curve shows them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hdpo_jax.rewards.verdict import Verdict
from hdpo_jax.types import Trajectory


class Outcome(NamedTuple):
    """What a summary needs to know of a trajectory."""

    correct: bool | None
    """None: it could not be judged."""
    calls: int
    usable: bool
    """False: dropped, through no fault of the policy's."""
    legible: bool | None
    """Whether the question could be answered without tools; None where the prompt does not say."""
    call_probability: float | None = None
    """That the policy gave its first call; None: there was none."""


def outcome(trajectory: Trajectory, verdict: Verdict | None) -> Outcome:
    return Outcome(
        correct=None if verdict is None else verdict.correct,
        calls=trajectory.calls,
        usable=trajectory.usable,
        legible=trajectory.prompt.extra.get("legible"),
        call_probability=next(iter(trajectory.call_probabilities), None),
    )


def summarise(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares of all usable trajectories; by legibility too, where the prompts say whether their image is legible.

    Accuracies are over those that could be judged; where some could not, `not_judged` says how many.
    `redundant_tool_rate`: share of legible boards answered with a call. `needed_tool_rate`: of illegible ones.
    """
    usable = [one for one in outcomes if one.usable]

    def mean(value: Callable[[Outcome], float | None], legible: bool | None = None) -> float:
        found = [value(one) for one in usable if legible is None or one.legible is legible]
        values = [each for each in found if each is not None]
        return sum(values) / max(len(values), 1)

    def is_correct(one: Outcome) -> float | None:
        return one.correct

    def uses_tool(one: Outcome) -> float:
        return float(one.calls > 0)

    summary = {
        "accuracy": mean(is_correct),
        "tool_rate": mean(uses_tool),
        "calls_per_rollout": mean(lambda one: one.calls),
    }
    not_judged = sum(one.correct is None for one in usable)
    if not_judged:
        summary["not_judged"] = not_judged
    if any(one.legible is not None for one in usable):
        summary |= {
            "accuracy_legible": mean(is_correct, legible=True),
            "accuracy_illegible": mean(is_correct, legible=False),
            "redundant_tool_rate": mean(uses_tool, legible=True),
            "needed_tool_rate": mean(uses_tool, legible=False),
        }
    return summary
