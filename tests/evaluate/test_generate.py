"""`hdpo generate` against transformers' own generate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from hdpo_jax.config import ToolsConfig
from hdpo_jax.evaluate.generate import _calls, _told_of_tools, generate_file
from hdpo_jax.evaluate.messages import GivenMessages, MessagesError
from hdpo_jax.tools import SCHEMAS
from models.qwen3_vl.processing import Processor
from tests.evaluate.oracle import data_uri, model_inputs, picture, user, user_with_videos, write_lines

CONVERSATIONS = [
    [{"role": "user", "content": "What does the sign say?"}],
    [user("Which is wider?", data_uri(picture(96, 32, 0)), data_uri(picture(40, 64, 1)))],
    [user("Read the sign.", data_uri(picture(64, 64, 2)))],
    [user_with_videos()],
]


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", CONVERSATIONS)


def test_greedy_generation_is_that_of_transformers(tiny_model: Path, messages: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    generate_file(tiny_model, messages, output, max_new_tokens=12, temperature=0.0, dtype="float32")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    processor = Processor.from_hf(tiny_model)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    forbidden = [[token] for token in np.flatnonzero(processor.forbidden).tolist()]
    for record, conversation in zip(found, CONVERSATIONS, strict=True):
        inputs: Any = model_inputs(processor, conversation, processor.encode_messages(conversation).token_ids)
        length = inputs["input_ids"].shape[1]
        generated = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=12,
            do_sample=False,
            bad_words_ids=forbidden,
        )
        expected = generated[0, length:].tolist()
        assert record["token_ids"] == expected
        assert len(record["logprobs"]) == len(expected)
        assert record["stop_reason"] in ("end_of_turn", "token_budget")
        assert record["text"] == processor.decode(expected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": []}', "no 'messages'"),
        ("hello", r"not JSON \(Expecting value at character 1\); expected {'messages'"),
        ('{"messages": [{"role": "user", "content": "<image>?"}], "images": ["a.png"]}', "'images' beside 'messages'"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tiny_model: Path, tmp_path: Path, line, said):
    path = tmp_path / "in.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n' + line + "\n")
    with pytest.raises(MessagesError, match=rf"in.jsonl:2: {said}"):
        generate_file(tiny_model, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_defaults_work(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATIONS[0]}))
    generate_file(tiny_model, path, tmp_path / "out.jsonl")
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(record["token_ids"]) == len(record["logprobs"]) > 0


def test_every_call_of_a_turn_is_reported():
    call = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
    found = _calls(f"<reason>a</reason>{call}<reason>b</reason>{call}<tool_call>{{")
    assert [(one.name, dict(one.arguments), one.error) for one in found] == [("python", {"code": "1"}, None)] * 2


def test_a_conversation_that_says_nothing_of_tools_is_told_of_them():
    plain = GivenMessages(line=1, place="", messages=[{"role": "user", "content": "?"}], images=[], videos=[])
    told = _told_of_tools(plain, [SCHEMAS["python"]]).messages
    assert told[1:] == plain.messages and told[0]["role"] == "system"
    for word in ('"name": "python"', '"code"', "<reason>", "<tool_call>", "<answer>", "as few tool calls as needed"):
        assert word in told[0]["content"]
    own = replace(plain, messages=[{"role": "system", "content": "mine"}, *plain.messages])
    assert _told_of_tools(own, [SCHEMAS["python"]]) == own


@pytest.mark.slow
@pytest.mark.requires_bwrap
def test_bfloat16_and_tools(tiny_model: Path, messages: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    generate_file(tiny_model, messages, output, max_new_tokens=8, tools=ToolsConfig(workers=1))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(CONVERSATIONS)
    assert all(set(record) == {"text", "token_ids", "logprobs", "stop_reason", "tool_calls"} for record in records)
