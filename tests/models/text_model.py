"""transformers' own Qwen3 with random weights and a small tokenizer: a text-only directory in HF format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from hdpo_jax.data.tiny_tokenizer import END_OF_TEXT, TURN_END, train_tokenizer

TEMPLATE = """\
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
    {{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Qwen3's in what matters here: a content that is no string is left out, the last answer gets a thought."""


def write_qwen3(directory: Path, corpus: Iterable[str], **config: Any) -> Any:
    """Writes a Qwen3 that knows the corpus's words, and returns transformers' model of it."""
    tokenizer = train_tokenizer(corpus, vocabulary=400)
    sizes = {
        "vocab_size": tokenizer.get_vocab_size() + 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    ends = [tokenizer.token_to_id(token) for token in (TURN_END, END_OF_TEXT)]
    hf = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**sizes, **config})).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    hf.generation_config.eos_token_id = ends
    hf.save_pretrained(directory)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, chat_template=TEMPLATE
    )
    wrapped.save_pretrained(directory)
    return hf
