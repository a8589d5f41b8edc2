import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from hdpo_jax.data.signs import SYSTEM_PROMPT, ColdStartPhase, SignsConfig, cold_start_texts, write_signs
from hdpo_jax.data.signs_families import QUESTIONS
from hdpo_jax.data.tiny_checkpoint import TINY, write_tiny_checkpoint
from hdpo_jax.data.tiny_tokenizer import PLAIN_TOKENS, SPECIAL_TOKENS, train_tokenizer
from models.qwen3_vl.config import Qwen3VLConfig

CALL = (
    '<reason>zoom in on the sign</reason><tool_call>{"name": "python", "arguments": '
    '{"code": "image_1.crop((168, 184, 216, 200))"}}</tool_call>'
)
ANSWER = "<reason>read it as it is</reason><answer>GTX</answer>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    phase = ColdStartPhase(conversations=160, tool_share_legible=0.7, tool_share_illegible=0.9)
    config = SignsConfig(cold_start=(phase,), train_boards=1, test_boards=1)
    return list(cold_start_texts(write_signs(tmp_path_factory.mktemp("signs"), config, seed=0).cold_start))


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(directory, seed=0, corpus=corpus)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_text(tokenizer, question):
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": parts}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_turns_take_few_tokens(tokenizer):
    # Every token is a decode step: these counts set the price of the built-in run.
    assert len(ids(tokenizer, CALL)) <= 20
    assert len(ids(tokenizer, ANSWER)) <= 8
    for question in QUESTIONS["read"]:
        assert len(ids(tokenizer, prompt_text(tokenizer, question))) - 1 + 16 <= 50


def test_capitals_and_coordinates_are_single_tokens(tokenizer, corpus):
    pieces = tokenizer.convert_ids_to_tokens(ids(tokenizer, ANSWER))
    assert pieces[1:4] == ["G", "T", "X"]
    seen = Counter(number for text in corpus for number in re.findall(r"\d+", text))
    common = [number for number, count in seen.items() if count > 1]
    assert len(common) > 10
    assert all(len(ids(tokenizer, number)) == 1 for number in common)


def test_special_tokens_are_special_and_tool_marks_are_text(tokenizer):
    for token in (*SPECIAL_TOKENS, *PLAIN_TOKENS):
        assert len(ids(tokenizer, token)) == 1
    everything = ids(tokenizer, "a" + "".join(SPECIAL_TOKENS) + "".join(PLAIN_TOKENS))
    assert tokenizer.decode(everything, skip_special_tokens=True) == "a" + "".join(PLAIN_TOKENS)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x7f\u200b",
        "e\u0301 \u212b \u00c5",
        "漢字 العربية ٣٤٥٦",
        "\U0001f600" * 3,
        "\r\n\t \n\n x",
        "ẞ Ω Ǆ ²½",
        CALL,
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_random_text_round_trips(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.integers(0, 0x11_0000, size=20)
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(ids(tokenizer, text)) == text


def test_a_prompt_is_a_prefix_of_its_conversation(tokenizer):
    # A token that spanned the header and the policy's first word would make rollouts differ from cold-start rows.
    prompt = prompt_text(tokenizer, "Read the sign.")
    for turn in (CALL, ANSWER):
        assert ids(tokenizer, prompt + turn) == ids(tokenizer, prompt) + ids(tokenizer, turn)


def test_chat_template_is_qwens_layout(tokenizer):
    call = {"function": {"name": "python", "arguments": {"code": "1"}}}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi {{ x }}"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi {{ x }}<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    )
    with_tools = tokenizer.apply_chat_template(messages[:1], tools=[{"name": "python"}], tokenize=False)
    assert with_tools.startswith('<|im_start|>system\n{"name": "python"}<|im_end|>\n<|im_start|>user\n')


def test_config_names_the_tokenizers_ids(checkpoint, tokenizer):
    config = Qwen3VLConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.text.vocab_size % 64 == 0
    assert len(tokenizer) <= config.text.vocab_size < len(tokenizer) + 64
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize(("size", "grid"), [((512, 512), [1, 8, 8]), ((640, 384), [1, 6, 10]), ((48, 16), [1, 2, 6])])
def test_image_settings_show_boards_at_an_eighth_and_crops_as_they_are(checkpoint, size, grid):
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    encoded = processor(images=[Image.new("RGB", size)], return_tensors="np")
    assert encoded["image_grid_thw"].tolist() == [grid]


def test_transformers_loads_every_tensor(checkpoint):
    pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 1e6 < model.num_parameters() < 1.5e6


def test_an_untied_model_with_biases_loads_too(corpus, tmp_path):
    pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    text = replace(TINY.text, attention_bias=True, num_hidden_layers=1)
    vision = replace(TINY.vision, deepstack_visual_indexes=(0, 1))
    config = replace(TINY, text=text, vision=vision, tie_word_embeddings=False)
    write_tiny_checkpoint(tmp_path, seed=0, corpus=corpus, config=config)
    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    _, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_weights_follow_the_seed_and_are_scaled_by_fan_in(checkpoint, corpus, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    write_tiny_checkpoint(tmp_path / "again", seed=0, corpus=corpus)
    write_tiny_checkpoint(tmp_path / "other", seed=1, corpus=corpus)
    again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    name = "model.language_model.layers.1.mlp.gate_proj.weight"
    assert all(np.array_equal(weights[key], again[key]) for key in weights)
    assert not np.array_equal(weights[name], other[name])
    np.testing.assert_allclose(weights[name].std(), 128**-0.5, rtol=0.02)
    assert (weights["model.language_model.norm.weight"] == 1).all()
    assert not weights["model.visual.merger.norm.bias"].any()


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 200 can not hold all bytes; it takes at least 265"):
        train_tokenizer(["text"], vocabulary=200)
