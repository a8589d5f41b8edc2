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
    """A judge can not be asked: the rollout's group is left out of the update, it never counts as wrong."""


class Claim(NamedTuple):
    """What a verifier is asked about: a prediction, and what is right."""

    question: str
    """What the user asks, images as <image>."""
    prediction: str
    """What the policy answered: hostile input."""
    truths: tuple[str, ...]
    """What is right; any of several may match."""


class Verifier(Protocol):
    """Judges a claim: True right, False wrong, None can not tell (the next verifier is asked)."""

    def __call__(self, claim: Claim, /) -> bool | None:
        """Raises VerifierOutage where it can not be asked. With a judge in the run, several threads call it."""
        ...


def by_rules(claim: Claim) -> bool | None:
    return judge_by_rules(claim.prediction, claim.truths)


RULES: tuple[Verifier, ...] = (by_rules,)
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


def is_correct(claim: Claim, verifiers: Sequence[Verifier] = RULES) -> bool:
    """What the first verifier that can tell says; wrong where none can."""
    for verifier in verifiers:
        verdict = verifier(claim)
        if verdict is not None:
            return verdict
    return False


def score_response(
    text: str,
    ground_truth: str | Sequence[str],
    calls: int,
    verifiers: Sequence[Verifier] = RULES,
    *,
    question: str = "",
) -> Verdict:
    """The rewards of a response. Without an answer nobody is asked: it is wrong.

    Args:
        text: what the policy wrote, all turns. Observations do not belong here: theirs would score.
        ground_truth: what is right; of several, any may match.
        calls: tool calls sent, failed ones too.
        verifiers: asked in order until one can tell. Raises what they raise: VerifierOutage.
        question: what was asked, for verifiers that read it.
    """
    prediction = extract_answer(text)
    truths = (ground_truth,) if isinstance(ground_truth, str) else tuple(ground_truth)
    correct = prediction is not None and is_correct(Claim(question, prediction, truths), verifiers)
    answer, form = float(correct), format_reward(text)
    accuracy = ANSWER_WEIGHT * answer + FORMAT_WEIGHT * form
    return Verdict(answer=answer, format=form, accuracy=accuracy, tool=tool_reward(calls, correct), correct=correct)


def score_trajectory(trajectory: "Trajectory", verifiers: Sequence[Verifier] = RULES) -> Verdict:
    """The rewards of a rollout: its assistant turns are judged, its tool turns are not read."""
    prompt = trajectory.prompt
    return score_response(
        trajectory.response_text, prompt.ground_truth, trajectory.calls, verifiers, question=prompt.said_by("user")
    )
