"""Accuracy and tool use of a set of trajectories, as a report or a training curve shows them."""

from collections.abc import Callable, Sequence

from hdpo_jax.rewards import Verdict
from hdpo_jax.types import Trajectory


def summarise(trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of all usable trajectories; by legibility too, where the prompts say whether their image is legible.

    `redundant_tool_rate`: share of legible boards answered with a call. `needed_tool_rate`: of illegible ones.
    """
    judged = list(zip(trajectories, verdicts, strict=True))

    def mean(value: Callable[[Trajectory, Verdict], float], legible: bool | None = None) -> float:
        values = [value(t, v) for t, v in judged if legible is None or t.prompt.extra.get("legible") is legible]
        return sum(values) / max(len(values), 1)

    def is_correct(_: Trajectory, verdict: Verdict) -> float:
        return float(verdict.correct)

    def uses_tool(trajectory: Trajectory, _: Verdict) -> float:
        return float(trajectory.calls > 0)

    summary = {
        "accuracy": mean(is_correct),
        "tool_rate": mean(uses_tool),
        "calls_per_rollout": mean(lambda trajectory, _: trajectory.calls),
    }
    if any("legible" in trajectory.prompt.extra for trajectory in trajectories):
        summary |= {
            "accuracy_legible": mean(is_correct, legible=True),
            "accuracy_illegible": mean(is_correct, legible=False),
            "redundant_tool_rate": mean(uses_tool, legible=True),
            "needed_tool_rate": mean(uses_tool, legible=False),
        }
    return summary
