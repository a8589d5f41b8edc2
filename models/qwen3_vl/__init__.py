"""Qwen3-VL, dense and MoE: decoder, vision tower with deepstack, Hugging Face checkpoints in and out."""

from models.qwen3_vl.cache import KVCache, SharedPages
from models.qwen3_vl.config import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.decoding import decoding_layout
from models.qwen3_vl.huggingface import load_hf, read_config, save_hf
from models.qwen3_vl.images import EncodedImage, PackedImages
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.stored import CheckpointError

__all__ = [
    "CheckpointError",
    "EncodedImage",
    "KVCache",
    "MoEConfig",
    "PackedImages",
    "Qwen3VL",
    "Qwen3VLConfig",
    "SharedPages",
    "TextConfig",
    "VisionConfig",
    "decoding_layout",
    "load_hf",
    "read_config",
    "save_hf",
]
