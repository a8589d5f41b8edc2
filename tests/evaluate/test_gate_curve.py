"""`hdpo eval --calibrate-gate`: the same rollouts with calls and without, a gate, and the curve of its dial."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdpo_jax import cli
from hdpo_jax.config import ConfigError
from hdpo_jax.evaluate.gate_curve import calibrate, paired
from hdpo_jax.rewards.outcomes import Outcome
from hdpo_jax.types import StopReason
from tests.serve.parrot import write_parrot
from tests.small_signs import write_small_signs

CALL = '<reason>look</reason><tool_call>{"name": "python", "arguments": {"code": "image_1.size"}}</tool_call>'


def outcome(correct: bool | None, probability: float | None, usable: bool = True) -> Outcome:
    return Outcome(
        correct=correct, calls=int(probability is not None), usable=usable, legible=None, call_probability=probability
    )


def test_rollouts_that_can_not_be_compared_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with_calls = [outcome(True, 0.9), outcome(True, 0.4), outcome(False, None), outcome(None, 0.5), outcome(True, 0.6)]
    without = [
        outcome(False, 0.9),
        outcome(True, 0.4),
        outcome(False, None),
        outcome(True, 0.5),
        outcome(False, 0.6, False),
    ]
    pairs = paired(with_calls, without)
    assert pairs.called.tolist() == [True, True, False] and pairs.right_without.tolist() == [False, True, False]
    calibrate(pairs, tmp_path)
    assert json.loads((tmp_path / "gate.json").read_text()) == {"p": [0.4, 0.9], "worth": [0.0, 1.0]}
    assert Image.open(tmp_path / "gate.png").width > 400
    assert "1.000" in capsys.readouterr().out
    nobody = paired([outcome(True, None)], [outcome(True, None)])
    with pytest.raises(ConfigError, match="none of these rollouts calls a tool"):
        calibrate(nobody, tmp_path)
    assert np.isnan(nobody.probability).all()


@pytest.mark.slow
@pytest.mark.requires_bwrap
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The parrot calls on every prompt, and is as wrong without: no call is worth it."""
    files = write_small_signs(tmp_path, conversations=8, boards=8)
    model = write_parrot(tmp_path / "parrot", CALL)
    command = ["eval", "--model", str(model), "--data", str(files.train), "--output", str(tmp_path / "out")]
    command += ["--limit", "3", "--dtype", "float32", "--agent.max-calls", "1", "--agent.max-observation-tokens", "100"]
    command += ["--rollout.capacity", "2000", "--rollout.patches", "256", "--rollout.shapes", "4", "256", "64"]
    assert cli.main([*command, "--calibrate-gate"]) == 0, capsys.readouterr()
    out = tmp_path / "out"
    gate = json.loads((out / "gate.json").read_text())
    assert gate["worth"] and set(gate["worth"]) == {0.0}
    lines = [json.loads(line) for line in (out / "without_calls.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["calls"] == 0 and "<answer>" in line["turns"][0]["text"] for line in lines)
    assert all(line["stop"] in {reason.value for reason in StopReason} for line in lines)
    # With the gate that came of it, nothing is called any more.
    gated = [*command, "--agent.gate", str(out / "gate.json"), "--agent.gate-threshold", "0.2"]
    assert cli.main(gated) == 0, capsys.readouterr()
    assert json.loads((out / "results.json").read_text())["calls_per_rollout"] == 0
