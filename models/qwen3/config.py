"""Sizes of a Qwen3 model (dense, text only), read from and written to the `config.json` of Hugging Face checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.qwen3_vl.config import TextConfig

NO_TOKEN = -1
# What transformers gives to fields that a config.json leaves out, where it differs from Qwen3-VL.
_DEFAULTS = {"max_position_embeddings": 32768, "rope_theta": 10000.0}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """A decoder like that of Qwen3-VL; positions are one number, so `text.mrope_section` has no bearing."""

    text: TextConfig
    tie_word_embeddings: bool = False

    @property
    def vision(self) -> None:
        return None

    @property
    def image_token_id(self) -> int:
        return NO_TOKEN

    @property
    def video_token_id(self) -> int:
        return NO_TOKEN

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Qwen3Config":
        """From a parsed config.json, either dialect: `rope_theta`, or `rope_parameters`.

        Raises ValueError for another architecture, for a scaled rotary embedding and for sliding windows.
        """
        found = raw.get("model_type")
        if found != "qwen3":
            raise ValueError(f"config.json says model_type {found!r}; expected 'qwen3' (dense Qwen3)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json asks for rotary scaling {kind!r}; only 'default' is supported")
        if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
            raise ValueError("config.json asks for sliding windows; only full attention is supported")
        text = {**_DEFAULTS, **{field.name: raw[field.name] for field in fields(TextConfig) if field.name in raw}}
        text["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
        if text.get("num_key_value_heads") is None:
            text["num_key_value_heads"] = text.get("num_attention_heads", TextConfig.num_attention_heads)
        return cls(text=TextConfig(**text), tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers loads."""
        text = {field.name: getattr(self.text, field.name) for field in fields(TextConfig)}
        del text["mrope_section"], text["moe"]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        architecture = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        return {**architecture, "tie_word_embeddings": self.tie_word_embeddings, **text}
