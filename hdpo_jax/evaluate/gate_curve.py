"""What the confidence gate's dial does: fewer calls, and what becomes of accuracy. `hdpo eval --calibrate-gate`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hdpo_jax.files import replacing
from hdpo_jax.rewards.outcomes import Outcome
from hdpo_jax.rollout.gate import Paired

ROWS = 12
"""Thresholds in the table, at most."""


def paired(with_calls: Sequence[Outcome], without: Sequence[Outcome]) -> Paired:
    """The same rollouts both ways; those that were dropped, or could not be judged, in either are left out."""
    pairs = [
        (one, other)
        for one, other in zip(with_calls, without, strict=True)
        if one.usable and other.usable and one.correct is not None and other.correct is not None
    ]
    first = [one.call_probability for one, _ in pairs]
    return Paired(
        probability=np.asarray([np.nan if p is None else p for p in first]),
        called=np.asarray([p is not None for p in first], bool),
        right=np.asarray([bool(one.correct) for one, _ in pairs], bool),
        right_without=np.asarray([bool(other.correct) for _, other in pairs], bool),
    )


def calibrate(pairs: Paired, output: Path) -> None:
    """Writes gate.json and gate.png, and prints the curve. Raises ConfigError where no rollout calls a tool."""
    gate = pairs.gate()
    curve = pairs.curve(gate)
    gate.save(output / "gate.json")
    _draw(curve, output / "gate.png")
    table = Table(title=f"the gate's dial, from {pairs.called.sum():,} first calls")
    for name in ("--agent.gate_threshold", "calls a tool", "accuracy"):
        table.add_column(name, justify="right")
    for place in sorted({*np.linspace(0, len(curve) - 1, min(ROWS, len(curve))).astype(int).tolist()}):
        threshold, rate, accuracy = curve[place]
        table.add_row(f"{min(threshold, 1.0):.3f}", f"{rate:.3f}", f"{accuracy:.3f}")
    console = Console()
    console.print(table)
    console.print(f"{output / 'gate.png'}   {output / 'gate.json'}", soft_wrap=True)


def _draw(curve: Sequence[tuple[float, float, float]], path: Path) -> None:
    thresholds, rates, accuracies = (np.asarray(values) for values in zip(*curve, strict=True))
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.step(rates, accuracies, where="post", color="0.7", zorder=1)
    points = axes.scatter(rates, accuracies, c=np.minimum(thresholds, 1), vmin=0, vmax=1, cmap="viridis", zorder=2)
    figure.colorbar(points, label="threshold")
    axes.set(xlabel="rollouts that call a tool", ylabel="right answers", title="The confidence gate")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
