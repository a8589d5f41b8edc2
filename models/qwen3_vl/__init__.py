"""Qwen3-VL, dense and MoE: decoder, vision tower with deepstack, Hugging Face checkpoints in and out."""

from models.qwen3_vl.attention import cache_for
from models.qwen3_vl.cache import Cache, KVCache, RaggedCache, SharedPages
from models.qwen3_vl.config import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.decoding import GATHERED, decoding_layout
from models.qwen3_vl.huggingface import load_hf, read_config, save_hf
from models.qwen3_vl.images import EncodedImage, PackedImages
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.stored import CheckpointError

__all__ = [
    "GATHERED",
    "Cache",
    "CheckpointError",
    "EncodedImage",
    "KVCache",
    "MoEConfig",
    "PackedImages",
    "Qwen3VL",
    "Qwen3VLConfig",
    "RaggedCache",
    "SharedPages",
    "TextConfig",
    "VisionConfig",
    "cache_for",
    "decoding_layout",
    "load_hf",
    "read_config",
    "save_hf",
]
