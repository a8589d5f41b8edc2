"""Sizes of a Qwen3-VL model, dense or MoE, read from and written to the `config.json` of Hugging Face checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture of experts that most layers have in the place of an MLP. Defaults are those of transformers."""

    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    """Hidden units of an expert."""
    decoder_sparse_step: int = 1
    """Every so many layers have experts, the last of each so many."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers that have an MLP whatever the step says."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}",
        )
        _require(
            self.decoder_sparse_step >= 1, f"decoder_sparse_step is {self.decoder_sparse_step}; expected 1 or more"
        )


class LayerRun(NamedTuple):
    """Neighbouring layers of one kind."""

    layers: range
    moe: MoEConfig | None
    """None: they have an MLP."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. Defaults are those transformers gives to fields that a config.json leaves out."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_theta: float = 500000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    moe: MoEConfig | None = None
    """None: a dense model."""

    def __post_init__(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"text head_dim is {self.head_dim}; rotary embedding needs an even number")
        _require(len(self.mrope_section) == 3, f"mrope_section {self.mrope_section} must hold 3 numbers")
        _require(self.hidden_act in ACTIVATIONS, f"text hidden_act {self.hidden_act!r} is not one of {ACTIVATIONS}")

    def has_experts(self, layer: int) -> bool:
        moe = self.moe
        return moe is not None and layer not in moe.mlp_only_layers and (layer + 1) % moe.decoder_sparse_step == 0

    @property
    def experts_a_token(self) -> tuple[int, int] | None:
        """Layers, and experts that a token goes through in each (in those that have any); None: there are none."""
        return None if self.moe is None else (self.num_hidden_layers, self.moe.num_experts_per_tok)

    @property
    def expert_dtype(self) -> np.dtype:
        """Holds the number of any expert."""
        return np.min_scalar_type(0 if self.moe is None else self.moe.num_experts - 1)

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """All layers in order, those of one kind that follow on each other together."""
        runs = []
        for sparse, group in groupby(range(self.num_hidden_layers), self.has_experts):
            layers = list(group)
            runs.append(LayerRun(layers=range(layers[0], layers[-1] + 1), moe=self.moe if sparse else None))
        return tuple(runs)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision transformer and its mergers."""

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    initializer_range: float = 0.02
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}",
        )
        _require(
            self.head_dim % 4 == 0, f"vision head size is {self.head_dim}; 2-D rotary embedding needs a multiple of 4"
        )
        _require(self.hidden_act in ACTIVATIONS, f"vision hidden_act {self.hidden_act!r} is not one of {ACTIVATIONS}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches that one feature joins."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def position_side(self) -> int:
        """Side of the square table of learned positions."""
        return int(self.num_position_embeddings**0.5)

    @property
    def deepstack_taps(self) -> tuple[tuple[int, int], ...]:
        """(vision layer, deepstack merger) for each feature, in the order in which decoder layers take them.

        The order is that of the layers, not of the config's list, as in transformers.
        """
        indexes = self.deepstack_visual_indexes
        return tuple((layer, indexes.index(layer)) for layer in range(self.depth) if layer in indexes)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig:
    """A whole model: decoder, vision tower and the ids of the vision tokens."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            f"vision out_hidden_size {self.vision.out_hidden_size} differs from text hidden_size "
            f"{self.text.hidden_size}: image features could not stand beside token embeddings",
        )

    @property
    def deepstack_depth(self) -> int:
        """How many of the first decoder layers take image features."""
        return min(len(self.vision.deepstack_taps), self.text.num_hidden_layers)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Qwen3VLConfig":
        """From a parsed config.json, dense or MoE, as the hub has it or as transformers 5 writes it.

        Raises ValueError for another architecture and for what would change the numbers and is not implemented.
        """
        found = raw.get("model_type")
        if found not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ValueError(f"config.json says model_type {found!r}; only 'qwen3_vl' and 'qwen3_vl_moe' are supported")
        text = dict(raw.get("text_config") or {})
        vision = dict(raw.get("vision_config") or {})
        if found == "qwen3_vl_moe":
            text = _with_moe(text)
        if text.get("num_key_value_heads") is None:
            text["num_key_value_heads"] = text.get("num_attention_heads", TextConfig.num_attention_heads)
        rope = _rope_parameters(text, "default")
        section = tuple(rope.get("mrope_section") or TextConfig.mrope_section)
        text |= {"rope_theta": rope.get("rope_theta", TextConfig.rope_theta), "mrope_section": section}
        vision["rope_theta"] = _rope_parameters(vision, "axial").get("rope_theta", VisionConfig.rope_theta)
        vision["deepstack_visual_indexes"] = tuple(
            vision.get("deepstack_visual_indexes", VisionConfig.deepstack_visual_indexes)
        )
        tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return cls(
            text=TextConfig(**_known(TextConfig, text)),
            vision=VisionConfig(**_known(VisionConfig, vision)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            **{name: raw[name] for name in tokens if name in raw},
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers loads."""
        text = {field.name: getattr(self.text, field.name) for field in fields(TextConfig)}
        moe: MoEConfig | None = text.pop("moe")
        kind, architecture = "qwen3_vl", "Qwen3VLForConditionalGeneration"
        if moe is not None:
            kind, architecture = "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"
            text |= {field.name: getattr(moe, field.name) for field in fields(MoEConfig)}
            text["mlp_only_layers"] = list(moe.mlp_only_layers)
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": text.pop("rope_theta"),
            "mrope_section": list(text.pop("mrope_section")),
            "mrope_interleaved": True,
        }
        vision = {field.name: getattr(self.vision, field.name) for field in fields(VisionConfig)}
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
        vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
        return {
            "architectures": [architecture],
            "model_type": kind,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": {"model_type": f"{kind}_text", **text},
            "vision_config": {"model_type": f"{kind}_vision", **vision},
        }


# What transformers gives to fields that the config.json of a MoE leaves out, where it differs from the dense model's.
_MOE_TEXT_DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def _with_moe(section: Mapping[str, Any]) -> dict[str, Any]:
    """The text section of a MoE's config.json with the fields about experts gathered under "moe"."""
    text = {**_MOE_TEXT_DEFAULTS, **section}
    if text.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if text.get("norm_topk_prob") is False:
        raise ValueError("config.json says norm_topk_prob false; Qwen3-VL weighs the chosen experts to a sum of 1")
    # transformers 5 writes the number of experts under another name than the hub.
    text.setdefault("num_experts", text.get("num_local_experts", MoEConfig.num_experts))
    text["mlp_only_layers"] = tuple(text.get("mlp_only_layers") or ())
    return text | {"moe": MoEConfig(**_known(MoEConfig, text))}


def _rope_parameters(section: Mapping[str, Any], plain_type: str) -> dict[str, Any]:
    """The rotary settings of a config section, from whichever dialect it is written in."""
    rope = dict(section.get("rope_parameters") or section.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", plain_type))
    if kind not in (plain_type, "mrope", "default"):
        raise ValueError(f"config.json asks for rotary scaling {kind!r}; only {plain_type!r} is supported")
    if "rope_theta" not in rope and section.get("rope_theta") is not None:
        rope["rope_theta"] = section["rope_theta"]
    return rope


def _known(kind: type[TextConfig] | type[VisionConfig] | type[MoEConfig], section: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config section that are fields here; what is left out has no bearing on the numbers."""
    return {field.name: section[field.name] for field in fields(kind) if field.name in section}
