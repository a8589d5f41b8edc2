"""A checkpoint that says one text, whatever it is asked: each token is followed by the next one of that text."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from hdpo_jax.data.tiny_checkpoint import TINY, write_tiny_checkpoint
from hdpo_jax.data.tiny_tokenizer import TURN_END
from models.families import read_processor

CERTAIN = 100.0
"""Logit of the next token; that of others is a tenth of it."""


def write_parrot(directory: Path, text: str) -> Path:
    """Writes it; the text must not hold a token twice, for the last token is all that the parrot goes by."""
    write_tiny_checkpoint(directory, seed=0, corpus=[text] * 50, config=replace(TINY, tie_word_embeddings=False))
    processor = read_processor(directory)
    prompt = processor.encode_messages([{"role": "user", "content": "hello"}])
    end = processor.stop_ids[0]
    chain = [int(prompt.token_ids[-1]), *processor.encode_text(text).tolist(), end]
    assert len(set(chain)) == len(chain), f"a token stands twice in {text!r}: {TURN_END} could not be reached"
    file = directory / "model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight", "lm_head.weight")):
            weights[name] = np.zeros_like(tensor)
    embeddings, head = weights["model.language_model.embed_tokens.weight"], weights["lm_head.weight"]
    for token, following in zip(chain, chain[1:], strict=False):
        seen = embeddings[token]
        head[following] += CERTAIN * seen / np.linalg.norm(seen) / np.sqrt(len(seen))
    save_file(weights, file, metadata={"format": "pt"})
    return directory
