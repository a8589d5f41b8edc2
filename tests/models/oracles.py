"""transformers' own Qwen3-VL with random weights, at awkward sizes, and inputs for it: what ours is held against."""

import copy
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from models.qwen3_vl import EncodedImage, PackedImages, Qwen3VL, Qwen3VLConfig, load_hf
from models.qwen3_vl.images import Grid, feature_indices, mrope_positions, pack_images

IMAGE, VIDEO, VISION_START, VISION_END = 91, 92, 93, 94
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def rope(section: list[int], theta: float = 1e4) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}


SMALL_VISION = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 3,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}

# Head sizes that are no power of two, groups of three heads a key, one vision layer tapped twice over, taps that are
# not in order, sections that are shorter or longer than the frequencies there are.
CONFIGS: dict[str, dict[str, Any]] = {
    "biased, untied": {
        "text_config": {
            "vocab_size": 101,
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "attention_bias": True,
            "rope_parameters": rope([2, 2, 1]),
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 3,
            "out_hidden_size": 36,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
        },
        "tie_word_embeddings": False,
    },
    "tied, taps out of order": {
        "text_config": {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 14,
            "rope_parameters": rope([1, 5, 5], theta=5e5),
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [2, 0, 1],
        },
        "tie_word_embeddings": True,
    },
    "no deepstack, merge 3": {
        "text_config": {
            "vocab_size": 120,
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope([1, 1, 1]),
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_heads": 1,
            "patch_size": 4,
            "in_channels": 1,
            "spatial_merge_size": 3,
            "out_hidden_size": 40,
            "num_position_embeddings": 9,
            "deepstack_visual_indexes": [],
        },
        "tie_word_embeddings": False,
    },
    "experts in some layers": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "vocab_size": 97,
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "attention_bias": True,
            "rope_parameters": rope([2, 2, 1]),
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            # An MLP, experts, and two MLPs.
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        "vision_config": SMALL_VISION | {"out_hidden_size": 36},
        "tie_word_embeddings": False,
    },
}

# Beside those above, which tests of everything go through.
ONLY_EXPERTS: dict[str, dict[str, Any]] = {
    "experts in all layers": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "rope_parameters": rope([2, 2, 1]),
            "num_experts": 8,
            "num_experts_per_tok": 3,
            # Half the width: the matrices into an expert are square, and do not tell how they are stored.
            "moe_intermediate_size": 16,
        },
        "vision_config": SMALL_VISION | {"out_hidden_size": 32},
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The same weights in transformers and here."""

    hf: Any
    model: Qwen3VL
    folder: tempfile.TemporaryDirectory

    @property
    def directory(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Qwen3VLConfig:
        return self.model.config


def hf_config(name: str) -> Any:
    raw = copy.deepcopy((CONFIGS | ONLY_EXPERTS)[name])
    kind: Any = transformers.CONFIG_MAPPING[raw.pop("model_type", "qwen3_vl")]
    return kind.from_dict(raw | TOKENS)


@functools.cache
def oracle(name: str) -> Oracle:
    """fp32, random weights: large enough that every part of the model shows in the logits."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    hf: Any = transformers.AutoModelForImageTextToText.from_config(hf_config(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    # Removed when the process ends; pytest's tmp_path is not there for a cached function.
    folder = tempfile.TemporaryDirectory(prefix="hdpo-oracle-")
    hf.save_pretrained(folder.name)
    return Oracle(hf=hf, model=load_hf(folder.name, dtype=jnp.float32), folder=folder)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of tokens with its images, in order; `videos` are given frame by frame, as the text shows them."""

    token_ids: np.ndarray
    images: Sequence[EncodedImage]
    positions: np.ndarray


def encoded_image(config: Qwen3VLConfig, grid: Grid, seed: int = 0) -> EncodedImage:
    values = np.random.default_rng([seed, *grid]).standard_normal((int(np.prod(grid)), config.vision.patch_dim))
    return EncodedImage(patches=values.astype(np.float32), grid=grid)


def row(config: Qwen3VLConfig, sizes: Sequence[tuple[int, int]], *, text: int = 4, seed: int = 0) -> Row:
    """Text, then an image of each size (in merged features) with text after it."""
    random = np.random.default_rng(seed)
    merge = config.vision.spatial_merge_size
    images = [encoded_image(config, (1, merge * h, merge * w), seed + k) for k, (h, w) in enumerate(sizes)]
    ids = list(random.integers(0, 90, text))
    for image in images:
        ids += [VISION_START, *[IMAGE] * image.tokens(config), VISION_END, *random.integers(0, 90, text)]
    token_ids = np.array(ids, np.int32)
    positions, _ = mrope_positions(token_ids, [image.grid for image in images], config)
    return Row(token_ids=token_ids, images=images, positions=positions)


class Batch(NamedTuple):
    """Rows padded on the right to one length; padding is segment 0."""

    token_ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    images: PackedImages | None


def batch(config: Qwen3VLConfig, rows: Sequence[Row], *, length: int | None = None, patches: int = 0) -> Batch:
    length = length or max(len(row.token_ids) for row in rows)
    token_ids, segment_ids = np.zeros((2, len(rows), length), np.int32)
    positions = np.zeros((len(rows), length, 3), np.int32)
    index = np.full((len(rows), length), -1, np.int32)
    for number, row in enumerate(rows):
        span = np.s_[number, : len(row.token_ids)]
        token_ids[span], positions[span], segment_ids[span] = row.token_ids, row.positions, 1
        index[span] = feature_indices(row.token_ids, IMAGE, VIDEO)
    patches = patches or max(sum(len(image.patches) for image in row.images) for row in rows)
    images = pack_images(config, [row.images for row in rows], index, patches) if patches else None
    return Batch(token_ids=token_ids, positions=positions, segment_ids=segment_ids, images=images)


def hf_inputs(row: Row) -> dict[str, torch.Tensor]:
    """What transformers takes for one row."""
    ids = torch.tensor(row.token_ids)[None].long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.images:
        inputs |= {
            "pixel_values": torch.tensor(np.concatenate([image.patches for image in row.images])),
            "image_grid_thw": torch.tensor([image.grid for image in row.images]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return inputs
