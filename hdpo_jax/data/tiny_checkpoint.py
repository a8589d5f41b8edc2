"""A Qwen3-VL of a million random weights, in Hugging Face format: what the built-in task starts from."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from hdpo_jax.data.tiny_tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    TURN_END,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    train_tokenizer,
)
from models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig

TINY = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        mrope_section=(6, 5, 5),
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=3,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=128,
        num_position_embeddings=64,
        deepstack_visual_indexes=(0,),
    ),
    tie_word_embeddings=True,
)
"""Sizes that train on two CPU cores in minutes. `vocab_size` is a limit: the corpus may need less."""

MIN_PIXELS, MAX_PIXELS = 256, 4096

_POSITION_DEVIATION = 0.2  # half of what patches bring: where a sign stands is half of the task
_VOCABULARY_MULTIPLE = 64  # so that the embedding divides over a mesh axis


def write_tiny_checkpoint(
    directory: str | Path,
    *,
    seed: int,
    corpus: Iterable[str],
    config: Qwen3VLConfig = TINY,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Qwen3VLConfig:
    """Writes config, weights, tokenizer, processor settings and chat template; returns the final config.

    Args:
        corpus: texts whose common phrases become tokens; the vocabulary and its special ids follow from it.
        min_pixels: an image of fewer pixels is enlarged before the model sees it.
        max_pixels: one of more is reduced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, vocabulary=config.text.vocab_size)
    config = _with_vocabulary(config, tokenizer)

    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(directory / "tokenizer_config.json", _tokenizer_settings(config.text.max_position_embeddings))
    images = _image_settings(config.vision, min_pixels, max_pixels)
    _write_json(directory / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast", **images})
    _write_json(
        directory / "video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor", **images}
    )
    end_of_text, turn_end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, TURN_END))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": end_of_text, "pad_token_id": end_of_text, "eos_token_id": [turn_end, end_of_text]},
    )
    _write_json(directory / "config.json", {"dtype": "float32", **config.to_hf()})
    save_file(initial_weights(config, seed=seed), directory / "model.safetensors", metadata={"format": "pt"})
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _with_vocabulary(config: Qwen3VLConfig, tokenizer: Tokenizer) -> Qwen3VLConfig:
    """The config for this tokenizer: its size, rounded up, and the ids of the vision tokens."""
    size = math.ceil(tokenizer.get_vocab_size() / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return replace(
        config,
        text=replace(config.text, vocab_size=size),
        image_token_id=tokenizer.token_to_id(IMAGE_PAD),
        video_token_id=tokenizer.token_to_id(VIDEO_PAD),
        vision_start_token_id=tokenizer.token_to_id(VISION_START),
        vision_end_token_id=tokenizer.token_to_id(VISION_END),
    )


def _tokenizer_settings(length: int) -> dict[str, Any]:
    return {
        # Not Qwen's own class, which would replace the pre-tokenizer by Qwen's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "image_token": IMAGE_PAD,
        "video_token": VIDEO_PAD,
        "vision_bos_token": VISION_START,
        "vision_eos_token": VISION_END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }


def _image_settings(vision: VisionConfig, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    return {
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def initial_weights(config: Qwen3VLConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors under their Hugging Face names.

    Matrices have a standard deviation of fan_in ** -0.5, as the 0.02 that large models start from is far too small
    at this width; those that write to a residual stream are divided by the root of how many do.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape, deviation in _tensors(config):
        if deviation == 0:
            fill = 1.0 if name.endswith("weight") else 0.0  # scales of norms; biases
            weights[name] = np.full(shape, fill, np.float32)
        else:
            weights[name] = (deviation * rng.standard_normal(shape)).astype(np.float32)
    return weights


_Tensor = tuple[str, tuple[int, ...], float]
"""Name, shape, standard deviation; a deviation of 0 stands for norms and biases."""


def _tensors(config: Qwen3VLConfig) -> Iterator[_Tensor]:
    text, vision = config.text, config.vision
    yield from _text_tensors(text)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (text.vocab_size, text.hidden_size), text.hidden_size**-0.5

    root, width, merged = "model.visual", vision.hidden_size, vision.merged_size
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield f"{root}.patch_embed.proj.weight", (width, *patch), vision.patch_dim**-0.5
    yield f"{root}.patch_embed.proj.bias", (width,), 0
    yield f"{root}.pos_embed.weight", (vision.num_position_embeddings, width), _POSITION_DEVIATION
    residual = (2 * vision.depth) ** -0.5
    for layer in range(vision.depth):
        block = f"{root}.blocks.{layer}"
        yield from _norm(f"{block}.norm1", width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width, residual)
        yield from _linear(f"{block}.mlp.linear_fc1", width, vision.intermediate_size)
        yield from _linear(f"{block}.mlp.linear_fc2", vision.intermediate_size, width, residual)
    deepstack = [f"{root}.deepstack_merger_list.{i}" for i in range(len(vision.deepstack_visual_indexes))]
    for merger in (f"{root}.merger", *deepstack):
        yield from _norm(f"{merger}.norm", merged if merger in deepstack else width)
        yield from _linear(f"{merger}.linear_fc1", merged, merged)
        yield from _linear(f"{merger}.linear_fc2", merged, vision.out_hidden_size)


def _text_tensors(text: TextConfig) -> Iterator[_Tensor]:
    root, width = "model.language_model", text.hidden_size
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    residual = (2 * text.num_hidden_layers) ** -0.5
    yield f"{root}.embed_tokens.weight", (text.vocab_size, width), width**-0.5
    for layer in range(text.num_hidden_layers):
        block, bias = f"{root}.layers.{layer}", text.attention_bias
        yield f"{block}.input_layernorm.weight", (width,), 0
        yield f"{block}.post_attention_layernorm.weight", (width,), 0
        yield f"{block}.self_attn.q_norm.weight", (text.head_dim,), 0
        yield f"{block}.self_attn.k_norm.weight", (text.head_dim,), 0
        yield from _linear(f"{block}.self_attn.q_proj", width, queries, bias=bias)
        yield from _linear(f"{block}.self_attn.k_proj", width, keys, bias=bias)
        yield from _linear(f"{block}.self_attn.v_proj", width, keys, bias=bias)
        yield from _linear(f"{block}.self_attn.o_proj", queries, width, residual, bias=bias)
        yield from _linear(f"{block}.mlp.gate_proj", width, text.intermediate_size, bias=False)
        yield from _linear(f"{block}.mlp.up_proj", width, text.intermediate_size, bias=False)
        yield from _linear(f"{block}.mlp.down_proj", text.intermediate_size, width, residual, bias=False)
    yield f"{root}.norm.weight", (width,), 0


def _norm(name: str, width: int) -> Iterator[_Tensor]:
    yield f"{name}.weight", (width,), 0
    yield f"{name}.bias", (width,), 0


def _linear(name: str, inputs: int, outputs: int, scale: float = 1.0, *, bias: bool = True) -> Iterator[_Tensor]:
    yield f"{name}.weight", (outputs, inputs), scale * inputs**-0.5
    if bias:
        yield f"{name}.bias", (outputs,), 0
