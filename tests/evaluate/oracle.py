"""Conversations to try, and what transformers takes of them."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.qwen3_vl.processing import Processor


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *images: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": text}],
    }


def write_lines(path: Path, conversations: Iterable[list[Any]]) -> Path:
    path.write_text("".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations))
    return path


def model_inputs(processor: Processor, conversation: list[Any], token_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What transformers' model takes for these ids and the conversation's images."""
    ids = torch.tensor(token_ids[None].astype(np.int64))
    inputs = {"input_ids": ids}
    if images := processor.encode_messages(conversation, add_generation_prompt=True).images:
        inputs["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in images]))
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in images])
        inputs["mm_token_type_ids"] = (ids == processor.config.image_token_id).int()
    return inputs
