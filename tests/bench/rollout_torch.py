"""transformers' side of the rollout benchmark: one batch of all rollouts, each with its prompt."""

import functools
import time
from typing import Any

import numpy as np
import torch
import transformers

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.prompts import PromptEncoder
from models.qwen3_vl.processing import Processor
from tests.bench.chat_model import make_prompts
from tests.bench.rollout_sizes import FIXED


def fixed(directory: str) -> float:
    """Seconds."""
    return _generate(directory, FIXED.new_tokens)


def prefill(directory: str) -> float:
    """Seconds to the first token of all."""
    return _generate(directory, 1)


def _generate(directory: str, tokens: int) -> float:
    model, inputs = _model(directory), _inputs(directory)
    started = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
    assert found.shape == (FIXED.prompts * FIXED.samples, FIXED.prompt_tokens + tokens)
    return time.perf_counter() - started


@functools.cache
def _model(directory: str) -> Any:
    loaded = transformers.Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return loaded.eval()


@functools.cache
def _inputs(directory: str) -> dict[str, torch.Tensor]:
    processor = Processor.from_hf(directory)
    encode = PromptEncoder(processor, RolloutConfig())
    asked = make_prompts(processor, FIXED.prompts, FIXED.prompt_tokens, FIXED.image_side)
    questions = [encode(prompt) for prompt in asked for _ in range(FIXED.samples)]
    ids = torch.tensor(np.stack([question.token_ids for question in questions])).long()
    images = [image for question in questions for image in question.images]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.tensor(np.concatenate([image.patches for image in images])),
        "image_grid_thw": torch.tensor([image.grid for image in images]),
        "mm_token_type_ids": (ids == processor.config.image_token_id).int(),
    }
