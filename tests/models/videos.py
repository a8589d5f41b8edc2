"""Small real videos, and transformers' own video processor, whole but for two functions that torchvision has."""

import importlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from models.qwen3_vl.processing import Processor

CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4", ".ts": "mpeg2video"}


def clip(frames: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """[frames, height, width, 3], 8-bit: smooth pictures, each another, with a bright band that moves down."""
    random = np.random.default_rng([seed, frames])
    rows, columns = np.mgrid[0:height, 0:width]
    waves = random.uniform(0.02, 0.12, (frames, 3, 2))
    angles = waves[..., 0, None, None] * rows + waves[..., 1, None, None] * columns
    pictures = 120 + 100 * np.sin(angles)
    for number in range(frames):
        pictures[number, :, number * height // frames] = 255
    return pictures.transpose(0, 2, 3, 1).astype(np.uint8)


def write_video(path: Path, pictures: np.ndarray, *, rate: int = 10, times: Sequence[int] = (), **options: str) -> Path:
    """`times`: when each frame is shown, in 1/`rate` seconds; by default one after the other."""
    count, height, width, _ = pictures.shape
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(CODECS[path.suffix], rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture, time in zip(pictures, times or range(count), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _resize(self: Any, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
    # torchvision's resize of 8-bit tensors is this very function (equal bit for bit, torchvision 0.29).
    flat = image.reshape(-1, *image.shape[-3:])
    resized = torch.nn.functional.interpolate(flat, (size.height, size.width), mode="bicubic", antialias=True)
    return resized.reshape(*image.shape[:-2], size.height, size.width)


def _normalize(self: Any, image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, **_: Any) -> torch.Tensor:
    return (image - mean[:, None, None]) / std[:, None, None]


def video_module() -> Any:
    """transformers' module, past the guard of its package: most of what is in it does without torchvision."""
    return importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")


def video_processor_class() -> Any:
    return video_module().Qwen3VLVideoProcessor


def hf_processor(directory: Path, processor: Processor, monkeypatch: Any) -> Any:
    """transformers' processor of text, images and videos."""
    monkeypatch.setattr(TorchvisionBackend, "resize", _resize)
    monkeypatch.setattr(TorchvisionBackend, "normalize", _normalize)
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    return Qwen3VLProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        video_processor_class().from_pretrained(directory, do_convert_rgb=False),  # torchvision's too; frames are RGB
        chat_template=processor.tokenizer.chat_template,
    )
