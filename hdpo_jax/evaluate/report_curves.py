"""Lines of metrics.jsonl as the charts of the report page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from statistics import median
from typing import Any

POINTS = 500
"""Steps that a curve shows at most; longer runs are thinned evenly."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that belong together. A tone is a meaning, and the page gives each meaning one colour."""

    title: str
    note: str = ""
    share: bool = False
    """The axis runs from 0 to 100 %."""
    lines: Mapping[str, tuple[str, str]]
    """Metric -> label, tone ("accuracy", "tool", "needed", "ink" or "muted")."""
    odd_steps: bool = False
    """Single steps may be far off, such as one that compiles: the smooth line is a median, not a mean."""


CHARTS = (
    Chart(
        title="Right answers and tool use",
        note="Share of the step's rollouts that are right, and that call a tool.",
        share=True,
        lines={"reward/correct": ("right", "accuracy"), "tools/rate": ("call a tool", "tool")},
    ),
    Chart(
        title="Redundant and needed calls",
        note="Share of rollouts that call: on signs that can be read without, and on signs that can not.",
        share=True,
        lines={
            "signs/redundant_tool_rate": ("redundant", "tool"),
            "signs/needed_tool_rate": ("needed", "needed"),
        },
    ),
    Chart(
        title="Right answers by kind of sign",
        note="Legible at the size the policy sees, and illegible.",
        share=True,
        lines={
            "signs/accuracy_legible": ("legible", "accuracy"),
            "signs/accuracy_illegible": ("illegible", "needed"),
        },
    ),
    Chart(
        title="Rewards",
        note="Means of the two channels, which stay apart until the loss.",
        share=True,
        lines={"reward/accuracy": ("accuracy", "accuracy"), "reward/tool": ("efficiency", "tool")},
    ),
    Chart(
        title="Rollouts in the efficiency channel",
        note="Share that qualifies (right, in a group with another right one), and that has an advantage.",
        share=True,
        lines={
            "tool/qualifying_share": ("qualify", "ink"),
            "tool/nonzero_share": ("non-zero", "tool"),
        },
    ),
    Chart(
        title="Strength of the channels",
        note="Mean size of the advantages that are not zero.",
        lines={
            "advantage/acc_strength": ("accuracy", "accuracy"),
            "advantage/tool_strength": ("efficiency", "tool"),
        },
    ),
    Chart(
        title="Loss",
        lines={
            "loss/total": ("total", "ink"),
            "loss/acc": ("accuracy", "accuracy"),
            "loss/tool": ("efficiency", "tool"),
        },
    ),
    Chart(title="Gradient norm", note="Before clipping.", lines={"optimizer/grad_norm": ("norm", "ink")}),
    Chart(
        title="Sampler against trainer",
        note="Difference between their log-probs of the same tokens.",
        lines={
            "policy/logprob_gap_max": ("largest", "ink"),
            "policy/logprob_gap_mean": ("mean", "muted"),
        },
    ),
    Chart(
        title="Seconds a step",
        odd_steps=True,
        lines={
            "time/step": ("step", "ink"),
            "time/rollout": ("rollout", "needed"),
            "time/update": ("update", "accuracy"),
        },
    ),
)


def charts_of(records: Records) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The charts that every run shares and these records have data for; then one for each metric left over."""
    names = sorted({name for record in records for name, value in record.items() if _is_number(value)} - {"step"})
    known = [chart for chart in CHARTS if any(name in names for name in chart.lines)]
    shown = {name for chart in known for name in chart.lines}
    rest = [Chart(title=name, lines={name: ("", "ink")}) for name in names if name not in shown]
    return [_draw(chart, records) for chart in known], [_draw(chart, records) for chart in rest]


def _draw(chart: Chart, records: Records) -> dict[str, Any]:
    lines = []
    for metric, (label, tone) in chart.lines.items():
        points = [(record["step"], record[metric]) for record in records if _is_number(record.get(metric))]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        smooth = moving(median if chart.odd_steps else mean, values, len(values) // 20)
        keep = _evenly(len(steps), POINTS)
        lines.append(
            {
                "label": label,
                "tone": tone,
                "steps": [steps[i] for i in keep],
                "raw": [_short(values[i]) for i in keep],
                "smooth": [_short(smooth[i]) for i in keep],
            }
        )
    return {"title": chart.title, "note": chart.note, "share": chart.share, "lines": lines}


def moving(average: Callable[[Sequence[float]], float], values: Sequence[float], radius: int) -> list[float]:
    """Each value's average with its neighbours, up to `radius` on either side; fewer at the ends."""
    return [average(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly spread, the last one among them."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
