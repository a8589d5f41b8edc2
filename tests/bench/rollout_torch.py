"""transformers' side of the rollout benchmark: one batch of all rollouts, each with its prompt."""

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.bench.rollout_sizes import FIXED, INPUTS


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
    with np.load(Path(directory) / INPUTS) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
