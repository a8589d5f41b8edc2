"""What a step learns from where some of its answers could not be judged: the same in every process."""

import logging
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from hdpo_jax.rewards import Verdict
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.types import Trajectory
from sharding.multihost import agree, is_lead

log = logging.getLogger(__name__)


def learnable(trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict | None]) -> list[bool]:
    """Which rollouts take part in the update: those that the world did not break off, in groups judged as a whole.

    A group of which some could not be judged is left out, not only those: rules judge what is easy, so what is left of
    it would be compared with too good, or too bad, a mean.
    """
    lost = unjudged_groups(trajectories, verdicts)
    return [trajectory.usable and trajectory.group not in lost for trajectory in trajectories]


def unjudged_groups(trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict | None]) -> set[int]:
    pairs = zip(trajectories, verdicts, strict=True)
    return {trajectory.group for trajectory, verdict in pairs if verdict is None}


def outage_metrics(
    scorer: Scorer,
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict | None],
    *,
    step: int,
    of: int,
) -> dict[str, float]:
    """Of all processes: answers that could not be judged, groups left out for them, and the judge's own figures.

    Every process calls it, and in every one it raises VerifierOutage where there are more of them than allowed `of` a
    step's rollouts. Nothing where rules alone are asked.
    """
    judge = scorer.judge
    if scorer.is_embedded:
        return {}
    tally = astuple(judge.take_tally()) if judge else ()
    own = [verdicts.count(None), len(unjudged_groups(trajectories, verdicts)), *tally]
    lost, groups, *figures = agree(np.asarray(own, np.float64)).sum(axis=0).tolist()
    scorer.check(int(lost), of=of)
    if lost and is_lead():
        log.warning(
            "step %d: %d of %d answers could not be judged, groups left out of the update: %d; %s",
            *(step, lost, of, groups, scorer.said or "another process knows why"),
        )
    metrics = {"rewards/judge_outages": lost, "rewards/dropped_groups": groups}
    if judge is None:
        return metrics
    asked, cached, seconds, checked, disagreed = figures
    metrics |= {
        "rewards/judged": asked,
        "rewards/cached": cached,
        "rewards/judge_seconds": seconds / max(asked, 1),
    }
    return metrics | ({"rewards/judge_disagreement": disagreed / max(checked, 1)} if judge.checks else {})
