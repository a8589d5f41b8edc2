"""`make quickstart`: seconds of each stage, and of a step of HDPO by part (the median step). Then what speculative
decoding with looked-up drafts would bring on the rollouts of its cold start, in decode steps without drafts (it would
be worth its code from 1.3x on).

python -m tests.bench.signs [--from RUN_DIR]     a finished run's figures; by default a run of its own
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from hdpo_jax.train.metrics import read_metrics
from tests.bench import drafts
from tests.bench.table import Row, markdown

STAGES = {
    "data": "draw the boards",
    "read": "learn to read and crop",
    "sft": "cold start",
    "rl": "HDPO",
    "eval": "evaluate twice",
    "total": "quickstart",
}
PARTS = {
    "time/step": "a step of HDPO",
    "time/rollout": "a step's rollouts",
    "time/extend": "rollouts: prompts and observations",
    "time/decode": "rollouts: sampling",
    "time/tools_waited": "rollouts: waiting for tools",
    "time/score": "a step's rewards",
    "time/pack": "a step's packing",
    "time/update": "a step's update",
}


def main(finished: Path | None) -> None:
    if finished:
        print(markdown([*table(finished), *drafts.rows(finished)]))
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "hdpo_jax", "quickstart", "--out", folder], check=True)
        print(markdown([*table(Path(folder)), *drafts.rows(Path(folder))]))


def table(run: Path) -> Iterator[Row]:
    """The stages and their shares of the whole, then the parts of a step and their shares of it."""
    seconds = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds"]
    for name, what in STAGES.items():
        yield _share(what, seconds[name], seconds["total"])
    steps = read_metrics(run / "hdpo" / "metrics.jsonl")
    whole = median(step["time/step"] for step in steps)
    for name, what in PARTS.items():
        # A run in rollout.mode fused does not know its parts.
        if all(name in step for step in steps):
            yield _share(what, median(step[name] for step in steps), whole)


def _share(what: str, seconds: float, whole: float) -> Row:
    return Row(f"{what}, {100 * seconds / whole:.0f} %", seconds, unit="s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="seconds a stage of quickstart")
    parser.add_argument("--from", dest="finished", type=Path, metavar="RUN_DIR")
    main(parser.parse_args().finished)
