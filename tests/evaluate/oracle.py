"""Conversations to try, and what transformers takes of them."""

import base64
import io
import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.qwen3_vl.processing import Processor
from models.qwen3_vl.video import Video
from tests.models.videos import clip, write_video


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def video_uri(frames: int) -> str:
    """At 10 frames a second."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_video(Path(folder) / "a.mp4", clip(frames)).read_bytes()
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def user(text: str, *images: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": text}],
    }


def user_with_videos() -> dict[str, Any]:
    """A video of three times, an image, a video of two."""
    content = [
        {"type": "video", "video": video_uri(21), "fps": 3},
        {"type": "text", "text": "Is the sign of"},
        {"type": "image", "image": data_uri(picture(64, 40, 3))},
        {"type": "text", "text": "in"},
        {"type": "video", "video": video_uri(12), "num_frames": 4},
    ]
    return {"role": "user", "content": content}


def write_lines(path: Path, conversations: Iterable[list[Any]]) -> Path:
    path.write_text("".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations))
    return path


def model_inputs(processor: Processor, conversation: list[Any], token_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What transformers' model takes for these ids and the conversation's images and videos."""
    ids = torch.tensor(token_ids[None].astype(np.int64))
    inputs = {"input_ids": ids}
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    parts = [part for part in itertools.chain(*contents) if part["type"] != "text"]
    images = iter(processor.encode_messages(conversation, add_generation_prompt=True).images)
    shown: dict[str, list[Any]] = {"image": [], "video": []}
    for part in parts:
        times = len(processor.encode_video(Video.from_part(part)).images) if part["type"] == "video" else 1
        shown[part["type"]].append(list(itertools.islice(images, times)))
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if shown[kind]:
            patches = [image.patches for images in shown[kind] for image in images]
            inputs[f"pixel_values{suffix}"] = torch.tensor(np.concatenate(patches))
            grids = [(len(images), *images[0].grid[1:]) for images in shown[kind]]
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
    if parts:
        config = processor.config
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return inputs
