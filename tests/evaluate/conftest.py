"""A tiny model, and run directories with made-up figures: what `hdpo report` reads, without a run."""

import base64
import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hdpo_jax.data.tiny_checkpoint import write_tiny_checkpoint

PROMPTS = 24
STEPS = 200


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL of random weights in HF format."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    corpus = ["What does the sign say? Read the sign. <reason>read it as it is</reason><answer>AEG</answer>"] * 4
    write_tiny_checkpoint(directory, seed=0, corpus=corpus)
    return directory


@pytest.fixture
def quickstart_run(tmp_path: Path) -> Path:
    """The layout of `hdpo quickstart`: summary.json, sft/, hdpo/, evaluation/."""
    write_quickstart_run(tmp_path / "quickstart")
    return tmp_path / "quickstart"


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    """The layout of `hdpo train`: metrics.jsonl, config.json, rollouts/."""
    write_training_run(tmp_path / "run-7")
    return tmp_path / "run-7"


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    """A trajectory as the dumps hold it; keyword arguments replace its fields."""
    return record


def write_quickstart_run(run_dir: Path) -> None:
    rng = np.random.default_rng(0)
    hdpo = [_hdpo_metrics(step, STEPS, rng) for step in range(1, STEPS + 1)]
    sft = [{"step": s, "loss/total": 3.2 * math.exp(-s / 40) + 0.05 + 0.02 * rng.random()} for s in range(1, 271)]
    _write_lines(run_dir / "hdpo" / "metrics.jsonl", hdpo)
    _write_lines(run_dir / "sft" / "metrics.jsonl", sft)
    _write_lines(run_dir / "read" / "metrics.jsonl", sft)
    before = [_evaluated(i, rng, calls=rng.random() < 0.97, right=rng.random() < 0.8) for i in range(PROMPTS)]
    after = [_evaluated(i, rng, calls=i % 2 == 1, right=rng.random() < 0.97) for i in range(PROMPTS)]
    _write_lines(run_dir / "evaluation" / "cold_start.jsonl", before)
    _write_lines(run_dir / "evaluation" / "hdpo.jsonl", after)
    summary = {
        "cold_start": _summary(before),
        "hdpo": _summary(after),
        "hf_export": "runs/quickstart/hf",
        "seconds": {"data": 9.1, "read": 170.2, "sft": 199.0, "rl": 190.4, "eval": 31.7, "total": 600.3},
        "compilations_after_warmup": 0,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))


def write_training_run(run_dir: Path) -> None:
    rng = np.random.default_rng(1)
    _write_lines(run_dir / "metrics.jsonl", [_hdpo_metrics(step, 60, rng) for step in range(1, 61)])
    for step in (10, 20, 60):
        rollouts = []
        for group in range(4):
            for sample in range(8):
                right = rng.random() < (0, 0.5, 0.9, 1)[group]
                rollouts.append(
                    _evaluated(group, rng, calls=rng.random() < 0.6, right=right) | {"sample": sample, "step": step}
                )
        _write_lines(run_dir / "rollouts" / f"step_{step}.jsonl", rollouts)
    config = {"model": {"path": "models/signs"}, "algorithm": {"advantages": "hdpo", "w_tool": 0.15}}
    (run_dir / "config.json").write_text(json.dumps(config | {"train": {"steps": 400, "group_size": 8}}))


def record(**fields: Any) -> dict[str, Any]:
    base = {
        "step": 0,
        "prompt_id": "signs-0",
        "group": 0,
        "sample": 0,
        "data_source": "signs",
        "system": "Answer the question accurately with as few tool calls as needed.",
        "question": "<image>What does the sign say?",
        "prompt_images": [],
        "ground_truth": "MAV",
        "extra": {"legible": True, "family": "read"},
        "turns": [{"role": "assistant", "text": "<reason>read it</reason><answer>MAV</answer>", "images": []}],
        "rewards": {"accuracy": 1.0, "tool": 1.0, "answer": 1.0, "format": 1.0},
        "correct": True,
        "calls": 0,
        "stop": "end_of_turn",
        "tokens": 9,
    }
    return base | fields


def _evaluated(index: int, rng: np.random.Generator, *, calls: bool, right: bool) -> dict[str, Any]:
    look = np.random.default_rng(index)
    letters = "".join(look.choice(list("AEGJMRSUVWXZ"), 3))
    said = letters if right else "".join(rng.choice(list("AEGJMRSUVWXZ"), 3))
    x, y = 64 * int(look.integers(1, 5)), 64 * int(look.integers(1, 5))
    height = 52 if index % 2 == 0 else 8
    board = _board(letters, x, y, height, index)
    crop = board.crop((x, y, x + 64, y + 32))
    code = f"image_1.crop(({x}, {y}, {x + 64}, {y + 32}))"
    call = json.dumps({"name": "python", "arguments": {"code": code}})
    turns = [{"role": "assistant", "text": f"<reason>read it as it is</reason><answer>{said}</answer>", "images": []}]
    if calls:
        turns = [
            {"role": "assistant", "text": f"<reason>zoom in on the sign</reason><tool_call>{call}</tool_call>"},
            {"role": "tool", "text": "", "images": [_uri(crop, "PNG")]},
            {"role": "assistant", "text": f"<reason>the crop shows the text</reason><answer>{said}</answer>"},
        ]
    return record(
        prompt_id=f"signs-test-{index}",
        group=index,
        prompt_images=[_board_uri(letters, x, y, height, index)],
        ground_truth=letters,
        extra={"legible": index % 2 == 0, "family": "read"},
        turns=turns,
        correct=right,
        calls=int(calls),
        tokens=14 * calls + 6,
        rewards={"accuracy": 0.9 * right + 0.1, "tool": right / (1 + calls), "answer": float(right), "format": 1.0},
    )


def _hdpo_metrics(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    t = step / steps

    def noisy(share: float) -> float:
        return float(rng.binomial(128, min(max(share, 0.0), 1.0)) / 128)

    redundant = noisy(0.98 / (1 + math.exp(18 * (t - 0.35))))
    needed = noisy(0.96 + 0.04 * t)
    legible, illegible = noisy(0.8 + 0.19 * min(1, 4 * t)), noisy(0.82 + 0.16 * t)
    right = (legible + illegible) / 2
    return {
        "step": step,
        "reward/correct": right,
        "reward/accuracy": 0.9 * right + 0.1,
        "reward/tool": right * (0.5 + 0.25 * (1 - redundant)),
        "tools/rate": (redundant + needed) / 2,
        "tools/calls_per_rollout": (redundant + needed) / 2,
        "signs/redundant_tool_rate": redundant,
        "signs/needed_tool_rate": needed,
        "signs/accuracy_legible": legible,
        "signs/accuracy_illegible": illegible,
        "loss/total": float(rng.normal(0, 0.004)),
        "loss/acc": float(rng.normal(0, 0.003)),
        "loss/tool": float(rng.normal(0, 0.01)),
        "tool/qualifying_share": 0.7 + 0.2 * t,
        "tool/nonzero_share": 0.3 - 0.2 * t,
        "policy/entropy": 0.3 * (1 - t) + 0.02,
        "policy/ratio_mean": 1.0,
        "optimizer/grad_norm": float(abs(rng.normal(0.8, 0.2))),
        "time/rollout": float(0.28 + 0.03 * rng.random()),
        "time/update": float(0.17 + 0.02 * rng.random()),
        "time/step": 12.5 if step == 1 else 0.47,
        "advantage/acc_strength": 0.6 * (1 - right) + 0.05,
        "advantage/tool_strength": 0.3 * (1 - t),
        "policy/logprob_gap_max": float(2e-5 * (1 + rng.random())),
        "policy/logprob_gap_mean": float(4e-7 * (1 + rng.random())),
    }


def _summary(records: list[dict[str, Any]]) -> dict[str, float]:
    def mean(name: str, legible: bool | None) -> float:
        values = [bool(r[name]) for r in records if legible is None or r["extra"]["legible"] is legible]
        return sum(values) / len(values)

    return {
        "accuracy": mean("correct", None),
        "accuracy_legible": mean("correct", True),
        "accuracy_illegible": mean("correct", False),
        "tool_rate": mean("calls", None),
        "redundant_tool_rate": mean("calls", True),
        "needed_tool_rate": mean("calls", False),
        "calls_per_rollout": mean("calls", None),
    }


@functools.cache  # the same boards stand in every dump
def _board(letters: str, x: int, y: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    board = Image.fromarray(rng.normal(150, 8, (512, 512)).clip(0, 255).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(board)
    width = int(height * 2.4) + 24
    draw.rectangle((x, y, x + width, y + height + 24), fill=(40, 52, 70))
    draw.text((x + 8, y + 8), letters, font_size=height, fill=(200, 200, 190))
    return board


@functools.cache
def _board_uri(letters: str, x: int, y: int, height: int, seed: int) -> str:
    return _uri(_board(letters, x, y, height, seed), "JPEG")


def _uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=60)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
