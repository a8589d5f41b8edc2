"""Videos in training data: what a row may hold, how it is encoded and packed, and that a bad one is named."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo_jax.config import RolloutConfig
from hdpo_jax.data.conversations import ConversationDataset
from hdpo_jax.data.dataset import BadRowError
from hdpo_jax.data.encoding import encode_conversation
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.schemas import COLD_START_SCHEMA, RL_SCHEMA, VIDEOS
from hdpo_jax.data.videos import VideoError, video_in_cell
from hdpo_jax.rollout.packing import RowShape, assign_rows, conversation_family, fill_rows
from hdpo_jax.rollout.prompts import PromptEncoder, PromptTooLong
from models.qwen3_vl.images import mrope_positions
from models.qwen3_vl.processing import Processor, load_image
from models.qwen3_vl.video import Video
from tests.models.hf_directory import write_hf_directory
from tests.models.videos import clip, write_video


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    return Processor.from_hf(write_hf_directory(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    """2 seconds."""
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", clip(20))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(clip(1, 40, 30, seed)[0]).save(file, "PNG")
    return file.getvalue()


def prompt_row(content: str, videos: list[dict[str, Any]], images: int = 0) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": content}],
        "images": [{"bytes": png(seed)} for seed in range(images)],
        "videos": videos,
        "reward_model": {"ground_truth": "cat"},
    }


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema.append(VIDEOS)), path)
    return path


def test_a_row_of_prompts_may_show_images_and_videos_in_any_order(processor, mp4, tmp_path):
    videos = [
        {"path": str(mp4), "fps": 3.0},
        {"bytes": mp4.read_bytes()},
        {"frames": [png(0), png(1), png(2)], "fps": 1.0},
    ]
    rows = [prompt_row("<video>Is <image> in <video> or <video>?", videos, 1), prompt_row("No video?", [])]
    prompt, without = PromptDataset(write(tmp_path / "a.parquet", rows, RL_SCHEMA))
    assert without.videos == () and without.messages[0]["content"] == "No video?"
    parts = [part["type"] for part in prompt.messages[0]["content"]]
    assert parts == ["video", "text", "image", "text", "video", "text", "video", "text"]
    assert prompt.videos[0] == Video(source=str(mp4), fps=3.0)
    assert prompt.videos[2] == Video(source=(png(0), png(1), png(2)), fps=1.0)

    question = PromptEncoder(processor, RolloutConfig())(prompt)
    # 6 frames a temporal patch of two, an image, 4 frames, and 3 of which the last is repeated.
    assert len(question.images) == 3 + 1 + 2 + 2
    text = processor.decode(question.token_ids, keep_special=True)
    times = ["<0.2 seconds>", "<1.0 seconds>", "<1.7 seconds>", "<0.3 seconds>", "<1.6 seconds>"]
    found = [text.index(time) for time in times]
    assert found == sorted(found) and "<0.5 seconds>" in text and "<2.0 seconds>" in text
    # What is kept beside the patches: the files that came as bytes.
    files = len(str(mp4)) + len(mp4.read_bytes()) + len(png(0)) + sum(len(png(seed)) for seed in range(3))
    patches = sum(image.patches.nbytes for image in question.images)
    assert question.nbytes == patches + files + 16 * len(question.token_ids)

    small = PromptEncoder(processor, RolloutConfig(patches=64))
    with pytest.raises(PromptTooLong, match=r"image patches; expected at most 64 \(rollout.patches\)"):
        small(prompt)


def conversation() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "<video>What?"},
        {"role": "assistant", "content": "<answer>A sign</answer>"},
        {"role": "user", "content": "And <image> in <video>?"},
        {"role": "assistant", "content": "<answer>42</answer>"},
    ]


def test_a_conversation_is_learned_as_the_chat_template_writes_it(processor, mp4, tmp_path):
    row = {
        "messages": json.dumps(conversation()),
        "images": [base64.b64encode(png()).decode()],
        "videos": [{"path": str(mp4)}, {"path": str(mp4), "fps": 3.0}],
    }
    one = ConversationDataset(write(tmp_path / "a.parquet", [row], COLD_START_SCHEMA))[0]
    images = [load_image(image) for image in one.images]
    encoded = encode_conversation(one.messages, images, one.videos, processor)
    whole = processor.encode_messages(one.messages, images, one.videos, add_generation_prompt=False)
    # All but the newline behind the last turn, which nobody predicts.
    np.testing.assert_array_equal(encoded.token_ids, whole.token_ids[: len(encoded.token_ids)])
    assert len(whole.token_ids) - len(encoded.token_ids) <= 1
    assert [image.grid for image in encoded.images] == [image.grid for image in whole.images]
    learned = processor.decode(encoded.token_ids[encoded.learned])
    assert learned == "<answer>A sign</answer><answer>42</answer>"

    # Packed, each placeholder, of an image or a video, takes the next feature, at its own position.
    config = processor.config
    family = conversation_family(encoded.token_ids, encoded.learned, encoded.images, config)
    shape = RowShape(2 * len(encoded.token_ids), 2 * sum(len(image.patches) for image in encoded.images))
    rows = fill_rows(assign_rows([family, family], shape), 1, shape, config)
    assert rows.images is not None
    placeholders = np.isin(rows.token_ids[0], (config.image_token_id, config.video_token_id))
    features = np.asarray(rows.images.feature_index[0])
    assert features[placeholders].tolist() == list(range(shape.patches // 4))
    assert (features[~placeholders] == -1).all()
    positions, _ = mrope_positions(whole.token_ids, [image.grid for image in whole.images], config)
    length = len(encoded.token_ids) - 1
    np.testing.assert_array_equal(rows.positions[0, length : 2 * length], positions[:length])
    assert (np.unique(rows.images.segment_ids[0]) == np.arange(1, 2 * len(encoded.images) + 1)).all()


@pytest.mark.parametrize(
    ("content", "videos", "reason"),
    [
        ("<video>?", [], "there are 1 <video> marks and 0 videos; expected as many"),
        ("?", [{"path": "MP4"}], "there are 0 <video> marks and 1 videos; expected as many"),
        ("<video>?", [{"path": "gone.mp4"}], "video 1 is to be in 'gone.mp4', where no file is"),
        ("<video>?", [{"fps": 2.0}], "video 1 has 0 of the fields bytes, path, frames, video; expected one of them"),
        ("<video>?", [{"path": "MP4", "bytes": b"x"}], "video 1 has 2 of the fields"),
        ("<video>?", [{"path": "MP4", "fps": -1.0}], "video 1 can not be used: a video's fps is -1.0"),
        ("<video>?", [None], "video 1 can not be used: a video part carries 'None'"),
    ],
)
def test_a_bad_row_is_named_when_the_data_is_opened(mp4, tmp_path, content, videos, reason):
    videos = [video and video | ({"path": str(mp4)} if video.get("path") == "MP4" else {}) for video in videos]
    path = write(tmp_path / "a.parquet", [prompt_row(content, videos)] + [prompt_row("?", [])], RL_SCHEMA)
    (bad,) = PromptDataset(path, max_bad_rows=0.5).report.bad
    assert bad.row == 0 and bad.reason.startswith(reason)


def test_a_damaged_video_is_named_when_it_is_first_read(processor, mp4, tmp_path):
    data = mp4.read_bytes()
    rows = [prompt_row("<video>?", [{"bytes": data[: len(data) // 2]}]), prompt_row("<video>?", [{"bytes": data}])]
    encode = PromptEncoder(processor, RolloutConfig())
    path = write(tmp_path / "a.parquet", rows, RL_SCHEMA)
    dataset = PromptDataset(path, max_bad_rows=0.5, problem=encode.problem)
    with pytest.raises(BadRowError, match="row 0: video of .* bytes can not be decoded: Invalid data found"):
        dataset[0]
    assert len(encode(dataset[1]).images) == 2


def test_what_a_cell_may_hold(mp4):
    data = mp4.read_bytes()
    assert video_in_cell(data) == Video(source=data)
    assert video_in_cell(str(mp4)) == Video(source=str(mp4))
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    assert video_in_cell({"video": uri, "num_frames": 4}) == Video(source=uri, num_frames=4)
    # ArrayRecord has no nulls: what is empty is not there.
    empty = {"bytes": b"", "path": str(mp4), "frames": [], "fps": 0.0}
    assert video_in_cell(empty) == Video(source=str(mp4))
    assert video_in_cell([{"bytes": png()}, base64.b64encode(png()).decode()]) == Video(source=(png(), png()))
    for value, reason in (
        ({"video": uri, "max_pixels": 9}, "can not be used: a video part has max_pixels"),
        ([b"x", "?"], "has a frame that is text, but not base64"),
        (3, "can not be used: a video part carries '3'"),
    ):
        with pytest.raises(VideoError, match=reason):
            video_in_cell(value)
