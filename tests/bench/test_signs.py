"""Quickstart's stages, read from what a run leaves behind."""

import json
from pathlib import Path

from tests.bench import signs
from tests.bench.table import Row


def test_a_finished_quickstart_is_read(tmp_path: Path):
    seconds = {"data": 30.0, "read": 190.0, "sft": 50.0, "rl": 400.0, "eval": 30.0, "total": 700.0}
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": seconds}))
    (tmp_path / "hdpo").mkdir()
    steps = [{"step": n, "time/step": 2.0 * n, "time/rollout": 1.0 * n, "time/update": 0.5 * n} for n in (1, 2, 9)]
    (tmp_path / "hdpo" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    rows = list(signs.table(tmp_path))
    assert Row("HDPO, 57 %", 400.0, unit="s") in rows and rows[5] == Row("quickstart, 100 %", 700.0, unit="s")
    assert rows[6:] == [
        Row("a step of HDPO, 100 %", 4.0, unit="s"),
        Row("a step's rollouts, 50 %", 2.0, unit="s"),
        Row("a step's update, 25 %", 1.0, unit="s"),
    ]
