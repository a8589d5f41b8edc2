"""The benchmarks' model as an HF directory that chats: with tokenizer, processor files, and prompts for it."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from hdpo_jax.data.tiny_checkpoint import initial_weights
from hdpo_jax.types import Prompt
from models.policy import PolicyProcessor
from models.qwen3_vl import Qwen3VLConfig
from tests.bench.workload import MODEL, PATCH
from tests.models.hf_directory import IMAGES, write_hf_directory


def write_chat_model(directory: Path, longest_edge: int) -> None:
    """The 55M model with random weights. Its vocabulary is larger than its tokenizer's: what is never sampled.

    `longest_edge` squared is the most pixels that an image keeps.
    """
    write_hf_directory(directory)
    tokens = json.loads((directory / "config.json").read_text())
    own = {name: value for name, value in tokens.items() if name == "model_type" or name.endswith("token_id")}
    config = Qwen3VLConfig.from_hf({**MODEL, **own})
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", **config.to_hf()}))
    size = {"shortest_edge": 1_024, "longest_edge": longest_edge**2}
    (directory / "preprocessor_config.json").write_text(json.dumps({**IMAGES, "patch_size": PATCH, "size": size}))
    save_file(initial_weights(config, seed=0), directory / "model.safetensors", metadata={"format": "pt"})


def make_prompts(processor: PolicyProcessor, count: int, tokens: int, side: int) -> list[Prompt]:
    """Prompts of exactly so many tokens, each with a square image of noise, `side` pixels wide."""
    return [_prompt(processor, number, tokens, side) for number in range(count)]


def _prompt(processor: PolicyProcessor, number: int, tokens: int, side: int) -> Prompt:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")

    def messages(digits: int) -> list[dict]:
        text = f"Which of these? {number}" + "7" * digits
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def length(digits: int) -> int:
        return len(processor.encode_messages(messages(digits), [image]).token_ids)

    asked = messages(tokens - length(0))  # a digit is a token
    assert len(processor.encode_messages(asked, [image]).token_ids) == tokens
    return Prompt(id=str(number), messages=asked, images=[file.getvalue()], ground_truth="", data_source="bench")
