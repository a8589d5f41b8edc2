"""What benchmarks compute on: a small Qwen3-VL with random weights, and rollouts of mixed length. NumPy only.

Both sides of a comparison draw the same from the same numbers, each in a process of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE, VIDEO, VISION_START, VISION_END = 31_996, 31_997, 31_998, 31_999
FIRST_SPECIAL = IMAGE
PATCH, MERGE = 16, 2

MODEL: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1_792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 1_024,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 512,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1, 2, 3],
    },
}
"""55M parameters: config.json of transformers' Qwen3-VL."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many rollouts, and how long. Lengths are log-normal and cut."""

    prompts: int
    samples: int
    prompt_tokens: int
    """With the image's."""
    image_side: int
    """Pixels; one image a prompt."""
    median: float
    sigma: float
    longest: int
    """Sampled tokens."""
    observed: int = 0
    """Tokens of the observation in the middle of every fourth rollout."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    token_ids: np.ndarray
    sampled: np.ndarray
    group: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Groups in order, every group whole; rewards are [prompts, samples]."""

    sizes: Sizes
    patches: Sequence[np.ndarray]
    """The image of each prompt, as transformers' processor cuts it up."""
    grid: tuple[int, int, int]
    rollouts: Sequence[Rollout]
    accuracy: np.ndarray
    tool: np.ndarray

    @property
    def sampled_tokens(self) -> int:
        return sum(int(rollout.sampled.sum()) for rollout in self.rollouts)


def draw(sizes: Sizes, seed: int = 0) -> Workload:
    """Random tokens, images, lengths and rewards."""
    random = np.random.default_rng(seed)
    side = sizes.image_side // PATCH
    image = [VISION_START, *[IMAGE] * (side // MERGE) ** 2, VISION_END]
    rollouts = []
    for group in range(sizes.prompts):
        words = random.integers(0, FIRST_SPECIAL, sizes.prompt_tokens - len(image))
        prompt = np.concatenate([words[:8], image, words[8:]])
        for sample in range(sizes.samples):
            length = int(np.clip(random.lognormal(np.log(sizes.median), sizes.sigma), 2, sizes.longest))
            observed = sizes.observed if sample % 4 == 3 else 0
            sampled = np.ones(length + observed, bool)
            sampled[length // 2 : length // 2 + observed] = False
            rollouts.append(
                Rollout(
                    token_ids=np.concatenate(
                        [prompt, random.integers(0, FIRST_SPECIAL, length + observed)], dtype=np.int32
                    ),
                    sampled=np.concatenate([np.zeros(len(prompt), bool), sampled]),
                    group=group,
                    sample=sample,
                )
            )
    numbers = 3 * 2 * PATCH**2
    return Workload(
        sizes=sizes,
        patches=[random.standard_normal((side**2, numbers), np.float32) for _ in range(sizes.prompts)],
        grid=(1, side, side),
        rollouts=rollouts,
        accuracy=random.integers(0, 2, (sizes.prompts, sizes.samples)).astype(np.float32),
        tool=random.choice([1.0, 0.5, 0.0], (sizes.prompts, sizes.samples)).astype(np.float32),
    )


def write_model(directory: str) -> int:
    """The model's weights, as transformers draws and writes them. Returns how many parameters there are."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig.from_dict(MODEL)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
