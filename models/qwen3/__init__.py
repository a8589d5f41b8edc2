"""Qwen3, dense, text only: the decoder of Qwen3-VL by itself."""

from models.qwen3.config import Qwen3Config
from models.qwen3.model import Qwen3

__all__ = ["Qwen3", "Qwen3Config"]
