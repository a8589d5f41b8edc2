"""Rewards: is the answer right, does the response keep to the protocol, how many tool calls did it take."""

from hdpo_jax.rewards.answer import answer_matches, extract_answer, judge_by_rules
from hdpo_jax.rewards.efficiency import tool_reward
from hdpo_jax.rewards.format import format_reward
from hdpo_jax.rewards.verdict import (
    RULES,
    Claim,
    Verdict,
    Verifier,
    VerifierOutage,
    by_rules,
    is_correct,
    score_response,
    score_trajectory,
)

__all__ = [
    "RULES",
    "Claim",
    "Verdict",
    "Verifier",
    "VerifierOutage",
    "answer_matches",
    "by_rules",
    "extract_answer",
    "format_reward",
    "is_correct",
    "judge_by_rules",
    "score_response",
    "score_trajectory",
    "tool_reward",
]
