"""A Qwen3-VL directory in HF format without weights: a small tokenizer, Qwen's special tokens and turns."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from models.qwen3_vl import Qwen3VLConfig, TextConfig, VisionConfig

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = ("<tool_call>", "</tool_call>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = """\
{%- set image_count = namespace(value=0) %}
{%- macro render(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set image_count.value = image_count.value + 1 %}
                {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif part.type == 'video' or 'video' in part -%}
                <|vision_start|><|video_pad|><|vision_end|>
            {%- elif 'text' in part %}{{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}{{- render(message.content) }}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

CORPUS = (
    "What does the sign say? The sign says 42. <reason>I look at the picture again.</reason> Ça va déjà",
    'system user assistant {"name": "python", "arguments": {"code": "image_1.crop((0, 0, 64, 64))"}}',
)

IMAGES = {
    "size": {"longest_edge": 16384, "shortest_edge": 1024},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def byte_level_tokenizer() -> Tokenizer:
    """Trained with the real pre-tokenizer and normalizer; special tokens come last, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return tokenizer


def write_hf_directory(directory: Path, *, hub_layout: bool = False) -> Path:
    """As transformers writes one, or with `hub_layout` as the published Qwen3-VL repositories are."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    number = {token: tokenizer.get_vocab()[token] for token in SPECIAL + PLAIN}
    config = Qwen3VLConfig(
        text=TextConfig(
            vocab_size=tokenizer.get_vocab_size() + 7,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        ),
        vision=VisionConfig(patch_size=8, hidden_size=16, num_heads=1, out_hidden_size=16),
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if hub_layout:
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        settings["chat_template"] = "{{ 'the processor has one of its own' }}"
        settings["added_tokens_decoder"] = {
            str(number[token]): {"content": token, "special": token in SPECIAL, "normalized": False}
            for token in SPECIAL + PLAIN
        }
        vocabulary = json.loads(tokenizer.to_str())["model"]
        (directory / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        merges = "\n".join(" ".join(merge) for merge in vocabulary["merges"])
        (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    (directory / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    ends = [number["<|im_end|>"], number["<|endoftext|>"]]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory
