"""The published models by name. Instruct and thinking models of a name have the same sizes.

Source: the config.json of each `Qwen/Qwen3-VL-…` on the Hugging Face hub.
"""

from models.qwen3_vl.config import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig

EDITIONS = ("-Instruct", "-Thinking")


def published_config(name: str) -> Qwen3VLConfig:
    """The config of "8B", "Qwen3-VL-8B-Thinking", "Qwen/Qwen3-VL-8B-Instruct", ...; ValueError for an unknown name."""
    size = name.removeprefix("Qwen/").removeprefix("Qwen3-VL-")
    for edition in EDITIONS:
        size = size.removesuffix(edition)
    if size not in SIZES:
        raise ValueError(f"no published Qwen3-VL is named {name!r}; expected one of {', '.join(SIZES)}")
    return SIZES[size]


def _text(
    *, hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int, moe: MoEConfig | None = None
) -> TextConfig:
    return TextConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=262144,
        rope_theta=5e6,
        moe=moe,
    )


def _experts(hidden_units: int) -> MoEConfig:
    return MoEConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=hidden_units)


def _model(text: TextConfig, *, small_vision: bool = False, tied: bool = False) -> Qwen3VLConfig:
    """The two smallest models share one vision tower, all others another."""
    width = text.hidden_size
    vision = VisionConfig(out_hidden_size=width)
    if small_vision:
        vision = VisionConfig(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            deepstack_visual_indexes=(5, 11, 17),
            out_hidden_size=width,
        )
    return Qwen3VLConfig(text=text, vision=vision, tie_word_embeddings=tied)


SIZES = {
    "2B": _model(
        _text(hidden_size=2048, layers=28, heads=16, kv_heads=8, intermediate_size=6144), small_vision=True, tied=True
    ),
    "4B": _model(
        _text(hidden_size=2560, layers=36, heads=32, kv_heads=8, intermediate_size=9728), small_vision=True, tied=True
    ),
    "8B": _model(_text(hidden_size=4096, layers=36, heads=32, kv_heads=8, intermediate_size=12288)),
    "32B": _model(_text(hidden_size=5120, layers=64, heads=64, kv_heads=8, intermediate_size=25600)),
    "30B-A3B": _model(
        _text(hidden_size=2048, layers=48, heads=32, kv_heads=4, intermediate_size=6144, moe=_experts(768))
    ),
    "235B-A22B": _model(
        _text(hidden_size=4096, layers=94, heads=64, kv_heads=4, intermediate_size=12288, moe=_experts(1536))
    ),
}
