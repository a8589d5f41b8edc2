"""Finished trajectories as JSON lines that people, and `hdpo report`, can read."""

import base64
import functools
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hdpo_jax.files import replacing
from hdpo_jax.rewards import Verdict
from hdpo_jax.types import Trajectory
from models.qwen3_vl.processing import load_image

THUMBNAIL = 512
"""Longest side of a dumped image, pixels."""
LOSSLESS = 128
"""Images up to this size are dumped as PNG: a small crop shows what the policy saw, pixel for pixel."""


def trajectory_record(trajectory: Trajectory, verdict: Verdict | None, *, step: int) -> dict[str, Any]:
    """One trajectory as a JSON object; images as data URIs, made smaller where they are large.

    `rewards` and `correct` are null where there is no verdict: the answer could not be judged.
    """
    prompt = trajectory.prompt
    return {
        "step": step,
        "prompt_id": prompt.id,
        "group": trajectory.group,
        "sample": trajectory.sample,
        "data_source": prompt.data_source,
        "system": prompt.said_by("system"),
        "question": prompt.said_by("user"),
        "prompt_images": [_thumbnail_of_file(image) for image in prompt.images],
        "ground_truth": prompt.ground_truth,
        "extra": dict(prompt.extra),
        "turns": [
            {"role": turn.role, "text": turn.text, "images": [data_uri(image) for image in turn.images]}
            for turn in trajectory.turns
        ],
        "rewards": None if verdict is None else _rewards(verdict),
        "correct": None if verdict is None else bool(verdict.correct),
        "calls": trajectory.calls,
        "stop": trajectory.stop.value,
        "tokens": int(trajectory.sampled.sum()),
    }


def _rewards(verdict: Verdict) -> dict[str, float]:
    return {
        "accuracy": float(verdict.accuracy),
        "tool": float(verdict.tool),
        "answer": float(verdict.answer),
        "format": float(verdict.format),
    }


def record_line(record: Mapping[str, Any]) -> str:
    """A record as JSON, on one line."""
    return json.dumps(record, ensure_ascii=False, default=_plain)


def write_records(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, one record each; the file appears when it is whole."""
    write_lines(path, map(record_line, records))


def write_lines(path: Path | str, lines: Iterable[str]) -> None:
    """A text file that appears when it is whole."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def rollouts_path(run_dir: Path | str, step: int) -> Path:
    """Where a run dumps the trajectories of a step."""
    return Path(run_dir) / "rollouts" / f"step_{step}.jsonl"


def data_uri(image: Image.Image) -> str:
    """`image` as a data URI: PNG where it is small, else a JPEG of at most THUMBNAIL pixels a side."""
    small = max(image.size) <= LOSSLESS
    if not small:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG" if small else "JPEG", quality=70)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.lru_cache(maxsize=1024)
def _thumbnail_of_file(image: bytes) -> str:
    """Cached: the rollouts of a group, and two evaluations of the same prompts, share images."""
    return data_uri(load_image(image))


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays (of a parquet row's extra columns) as plain numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
