"""All rewards of one rollout, from what the policy wrote and how often it called a tool."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hdpo_jax.rewards.answer import extract_answer, judge_by_rules
from hdpo_jax.rewards.efficiency import tool_reward
from hdpo_jax.rewards.format import format_reward

if TYPE_CHECKING:
    from hdpo_jax.types import Trajectory

ANSWER_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1


class VerifierOutage(RuntimeError):
    """A judge can not be reached: the rollout is dropped from the update, never counted as wrong."""


class Verifier(Protocol):
    """Judges a prediction: True right, False wrong, None can not tell (the next verifier is asked)."""

    def __call__(self, prediction: str, ground_truth: str | Sequence[str], /) -> bool | None:
        """Raises VerifierOutage where it can not be asked."""
        ...


RULES: tuple[Verifier, ...] = (judge_by_rules,)
"""The embedded default: no endpoint, no network."""


class Verdict(NamedTuple):
    """The rewards of one rollout."""

    answer: float
    """1 where the answer is right, else 0."""
    format: float
    """1 where the response keeps to the protocol, else 0."""
    accuracy: float
    """0.9 answer + 0.1 format."""
    tool: float
    """1 / (calls + 1) where the answer is right, else 0."""
    correct: bool


def is_correct(
    prediction: str | None, ground_truth: str | Sequence[str], verifiers: Sequence[Verifier] = RULES
) -> bool:
    """What the first verifier that can tell says. No prediction, or none that can tell: wrong."""
    if prediction is None:
        return False
    for verifier in verifiers:
        verdict = verifier(prediction, ground_truth)
        if verdict is not None:
            return verdict
    return False


def score_response(
    text: str, ground_truth: str | Sequence[str], calls: int, verifiers: Sequence[Verifier] = RULES
) -> Verdict:
    """The rewards of a response.

    Args:
        text: what the policy wrote, all turns. Observations do not belong here: theirs would score.
        ground_truth: what is right; of several, any may match.
        calls: tool calls sent, failed ones too.
        verifiers: asked in order until one can tell. Raises what they raise: VerifierOutage.
    """
    correct = is_correct(extract_answer(text), ground_truth, verifiers)
    answer, form = float(correct), format_reward(text)
    accuracy = ANSWER_WEIGHT * answer + FORMAT_WEIGHT * form
    return Verdict(answer=answer, format=form, accuracy=accuracy, tool=tool_reward(calls, correct), correct=correct)


def score_trajectory(trajectory: "Trajectory", verifiers: Sequence[Verifier] = RULES) -> Verdict:
    """The rewards of a rollout: its assistant turns are judged, its tool turns are not read."""
    return score_response(trajectory.response_text, trajectory.prompt.ground_truth, trajectory.calls, verifiers)
