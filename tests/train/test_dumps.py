"""Rollout dumps: what a person needs to read a trajectory, and nothing that JSON can not hold."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdpo_jax.rewards import Verdict
from hdpo_jax.train.dumps import data_uri, rollouts_path, trajectory_record, write_records
from hdpo_jax.types import Prompt, StopReason, Trajectory, Turn


def image_file(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture
def trajectory() -> Trajectory:
    question = [{"type": "image"}, {"type": "text", "text": "What does the sign say?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    crop = Image.new("RGB", (64, 32))
    return Trajectory(
        prompt=Prompt(
            id="signs-7",
            messages=messages,
            images=[image_file(1024, 512)],
            ground_truth=["AEG", "aeg"],
            data_source="signs",
            extra={"legible": True, "plate": np.array([1, 2]), "index": np.int64(3)},
        ),
        group=2,
        sample=5,
        token_ids=np.arange(6),
        sampled=np.array([False, False, True, True, False, True]),
        logprobs=np.zeros(6),
        sampled_logprobs=np.zeros(6),
        prompt_length=2,
        images=(),
        prompt_images=1,
        turns=[
            Turn(role="assistant", text="<tool_call>{…}"),
            Turn(role="tool", text="", images=[crop]),
            Turn(role="assistant", text="<answer>AEG</answer>"),
        ],
        calls=1,
        stop=StopReason.END_OF_TURN,
    )


def test_a_record_holds_the_trajectory(trajectory: Trajectory, tmp_path: Path):
    verdict = Verdict(answer=1, format=0, accuracy=0.9, tool=0.5, correct=True)
    path = rollouts_path(tmp_path, 40)
    write_records(path, [trajectory_record(trajectory, verdict, step=40)])
    assert path == tmp_path / "rollouts" / "step_40.jsonl"
    record: dict[str, Any] = json.loads(path.read_text())
    prompt_images, turns = record.pop("prompt_images"), record.pop("turns")
    assert record == {
        "step": 40,
        "prompt_id": "signs-7",
        "group": 2,
        "sample": 5,
        "data_source": "signs",
        "system": "Be brief.",
        "question": "<image>What does the sign say?",
        "ground_truth": ["AEG", "aeg"],
        "extra": {"legible": True, "plate": [1, 2], "index": 3},
        "rewards": {"accuracy": 0.9, "tool": 0.5, "answer": 1.0, "format": 0.0},
        "correct": True,
        "calls": 1,
        "stop": "end_of_turn",
        "tokens": 3,
    }
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "assistant"]
    assert decoded(prompt_images[0]).size == (512, 256)
    assert decoded(turns[1]["images"][0]).size == (64, 32)


def test_what_could_not_be_judged_is_neither_right_nor_wrong(trajectory: Trajectory):
    record = trajectory_record(trajectory, None, step=40)
    assert record["correct"] is None and record["rewards"] is None and record["calls"] == 1


def test_small_images_are_kept_to_the_pixel():
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    uri = data_uri(Image.fromarray(noise))
    assert uri.startswith("data:image/png;base64,")
    assert (np.asarray(decoded(uri)) == noise).all()


def test_large_images_become_thumbnails_and_the_original_stays():
    image = Image.new("RGBA", (600, 2000))
    uri = data_uri(image)
    assert uri.startswith("data:image/jpeg;base64,")
    assert max(decoded(uri).size) == 512
    assert image.size == (600, 2000)


def test_a_dump_that_fails_leaves_nothing(tmp_path: Path):
    def records():
        yield {"a": 1}
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError):
        write_records(tmp_path / "dump.jsonl", records())
    assert list(tmp_path.iterdir()) == []
