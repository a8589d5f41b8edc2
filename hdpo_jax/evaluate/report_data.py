"""Reads a run directory into the one JSON object that the report page draws."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpo_jax.evaluate.report_curves import Records, charts_of
from hdpo_jax.evaluate.report_trajectories import (
    ImageTable,
    Key,
    Outcome,
    choose_pairs,
    group_items,
    outcomes,
    pair_items,
)
from hdpo_jax.train.metrics import read_metrics

# Rows of the evaluation table: summary key, name, what it is measured on ("" for all), its colour's meaning.
MEASURES = (
    ("accuracy", "Right answers", "", "accuracy"),
    ("accuracy_legible", "on legible signs", "legible", "accuracy"),
    ("accuracy_illegible", "on illegible signs", "illegible", "accuracy"),
    ("tool_rate", "Rollouts that call the tool", "", "ink"),
    ("redundant_tool_rate", "on legible signs: redundant", "legible", "tool"),
    ("needed_tool_rate", "on illegible signs: needed", "illegible", "needed"),
)
TILES = (
    ("accuracy", "Right answers", "on all held-out signs", "accuracy"),
    ("redundant_tool_rate", "Redundant calls", "on signs that can be read without", "tool"),
    ("needed_tool_rate", "Needed calls", "on signs that can not", "needed"),
)
STAGES = {
    "data": "Drawing signs",
    "read": "Learning to read",
    "sft": "Cold start",
    "rl": "HDPO",
    "eval": "Evaluation",
    "total": "Total",
}


def collect(run_dir: Path) -> dict[str, Any]:
    """What page.js draws; ValueError where `run_dir` holds no run."""
    if (run_dir / "summary.json").exists():
        return _comparison(run_dir)
    if (run_dir / "metrics.jsonl").exists():
        return _single_run(run_dir)
    raise ValueError(f"{run_dir} holds neither summary.json nor metrics.jsonl; expected the output folder of a run")


def _comparison(run_dir: Path) -> dict[str, Any]:
    """The quickstart: the cold-started policy against the same one after HDPO, on held-out prompts."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["cold_start"], summary["hdpo"]
    old, new = (run_dir / "evaluation" / f"{name}.jsonl" for name in ("cold_start", "hdpo"))
    seen = old_cases, new_cases = outcomes(old), outcomes(new)
    keys, which = choose_pairs(old_cases, new_cases)
    images = ImageTable()
    items = pair_items(old, new, keys, images)
    training, more = charts_of(read_metrics(run_dir / "hdpo" / "metrics.jsonl"))
    supervised = []
    for stage in ("read", "sft"):
        charts, _ = charts_of(read_metrics(run_dir / stage / "metrics.jsonl"))
        supervised += [chart | {"title": STAGES[stage]} for chart in charts if chart["title"] == "Loss"]
    return {
        "title": "Knowing when to look closer",
        "lede": _lede(before, after),
        "sides": ["Cold start", "HDPO"],
        "tiles": [
            {"label": label, "note": note, "tone": tone, "share": True, "before": before[key], "after": after[key]}
            for key, label, note, tone in TILES
            if _known(before, after, key)
        ],
        "table": _table(before, after, seen),
        "paths": _paths(seen),
        "facts": _run_facts(summary),
        "sections": _sections(("HDPO, step by step", training), ("Before it: supervised loss", supervised)),
        "more": more,
        "browser": {"note": f"Shown: {which}.", "items": items},
        "images": images.uris,
    }


def _single_run(run_dir: Path) -> dict[str, Any]:
    """A run of `hdpo train` or `hdpo sft`: its first steps against its last ones, and its dumps if it has any."""
    records = read_metrics(run_dir / "metrics.jsonl")
    charts, more = charts_of(records)
    paths = [(int(path.stem.removeprefix("step_")), path) for path in (run_dir / "rollouts").glob("step_*.jsonl")]
    images = ImageTable()
    items, which = group_items(sorted(paths), images)
    window = max(1, len(records) // 10)
    steps, what = ("step", "values") if window == 1 else (f"{window} steps", "means")
    last = records[-1]["step"] if records else 0
    return {
        "title": run_dir.resolve().name,
        "lede": f"{last} steps. The figures are {what} of the first and of the last {steps}.",
        "sides": [f"First {steps}", f"Last {steps}"],
        "tiles": _ends(records, window),
        "table": [],
        "paths": [],
        "facts": _config_facts(run_dir / "config.json"),
        "sections": _sections(("Step by step", charts)),
        "more": more,
        "browser": {"note": f"Shown: {which}.", "items": items},
        "images": images.uris,
    }


def _lede(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The result in a paragraph."""
    if not all(_known(before, after, key) for key, *_ in TILES):
        return ""
    redundant, needed, right = (
        (_percent(before[key]), _percent(after[key])) for key in ("redundant_tool_rate", "needed_tool_rate", "accuracy")
    )
    return (
        f"After its cold start the policy calls the tool on {redundant[0]} of the signs that it could read without, "
        f"and after HDPO on {redundant[1]}. On signs that it can not read without, calls went from {needed[0]} to "
        f"{needed[1]}. Right answers went from {right[0]} to {right[1]}."
    )


def _table(
    before: Mapping[str, Any], after: Mapping[str, Any], seen: Sequence[Mapping[Key, Outcome]]
) -> list[dict[str, Any]]:
    rows = []
    for key, name, kind, tone in MEASURES:
        if not _known(before, after, key):
            continue
        cells = []
        for side, cases in zip((before, after), seen, strict=True):
            count = sum(not kind or outcome.kind == kind for outcome in cases.values())
            bounds = wilson_interval(side[key], count) if count else None
            cells.append({"value": side[key], "bounds": bounds, "count": count})
        rows.append({"name": name, "indent": bool(kind), "share": True, "tone": tone, "cells": cells})
    if _known(before, after, "calls_per_rollout"):
        cells = [{"value": side["calls_per_rollout"], "bounds": None, "count": 0} for side in (before, after)]
        rows.append({"name": "Calls a rollout", "indent": False, "share": False, "tone": "ink", "cells": cells})
    return rows


def _paths(seen: Sequence[Mapping[Key, Outcome]]) -> list[dict[str, Any]]:
    """How right each way to an answer was: with and without a call, by kind of prompt, before and after."""
    kinds = sorted({outcome.kind for cases in seen for outcome in cases.values()}, reverse=True)
    rows = []
    for kind in kinds:
        for called in (True, False):
            cells = []
            for cases in seen:
                right = [o.correct for o in cases.values() if o.kind == kind and o.called == called]
                cells.append({"count": len(right), "right": sum(right)})
            rows.append({"kind": kind, "called": called, "cells": cells})
    return rows


def _ends(records: Records, window: int) -> list[dict[str, Any]]:
    shown = (
        ("reward/correct", "Right answers", "accuracy", True),
        ("tools/rate", "Rollouts that call a tool", "tool", True),
        ("tools/calls_per_rollout", "Calls a rollout", "tool", False),
        ("loss/total", "Loss", "ink", False),
        ("loss", "Loss", "ink", False),
    )
    tiles = []
    for metric, label, tone, share in shown:
        values = [record[metric] for record in records if isinstance(record.get(metric), int | float)]
        if values:
            ends = (values[:window], values[-window:])
            before, after = (sum(end) / len(end) for end in ends)
            tiles.append({"label": label, "tone": tone, "share": share, "before": before, "after": after})
    return tiles[:3]


def _run_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = summary.get("seconds") or {}
    facts = [(name, _duration(seconds[key])) for key, name in STAGES.items() if key in seconds]
    if "compilations_after_warmup" in summary:
        facts.append(("Compilations after warm-up", str(summary["compilations_after_warmup"])))
    if summary.get("hf_export"):
        facts.append(("Exported model", str(summary["hf_export"])))
    return facts


def _config_facts(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    wanted = {
        "model.path": "Model",
        "data.path": "Data",
        "algorithm.advantages": "Advantages",
        "algorithm.w_tool": "Weight of the efficiency loss",
        "train.prompts_per_step": "Prompts a step",
        "train.group_size": "Rollouts a prompt",
        "train.steps": "Steps planned",
    }
    facts = []
    for name, label in wanted.items():
        section, key = name.split(".")
        value = (config.get(section) or {}).get(key)
        if value is not None:
            facts.append((label, str(value)))
    return facts


def _sections(*sections: tuple[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"title": title, "charts": charts} for title, charts in sections if charts]


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share found in `count` trials; sound near 0 and 1, where the normal one is not."""
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _known(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> bool:
    return before.get(key) is not None and after.get(key) is not None


def _percent(share: float) -> str:
    """One decimal near the ends, where it matters, none between."""
    percent = 100 * share
    whole = 5 <= percent <= 95 or percent in (0, 100)
    return f"{percent:.0f} %" if whole else f"{percent:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
