"""Qwen3 (dense, text only): the decoder of Qwen3-VL by itself."""

from typing import Any

from models.qwen3.config import Qwen3Config
from models.qwen3_vl.model import Qwen3VL


class Qwen3(Qwen3VL):
    """Qwen3-VL without its vision tower; numerically transformers' `Qwen3ForCausalLM`.

    Of a text M-RoPE's three positions are one number, and rotate as the plain rotary embedding does.
    """

    def __init__(self, config: Qwen3Config, **settings: Any):
        """`settings` as of `Qwen3VL`."""
        sizes: Any = config
        super().__init__(sizes, **settings)
