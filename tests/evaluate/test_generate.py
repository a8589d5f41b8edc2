"""`hdpo generate` against transformers' own generate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from hdpo_jax.config import ToolsConfig
from hdpo_jax.evaluate.generate import generate_file
from hdpo_jax.evaluate.messages import MessagesError
from models.qwen3_vl.processing import Processor
from tests.evaluate.test_score import data_uri, picture, user

CONVERSATIONS = [
    [{"role": "user", "content": "What does the sign say?"}],
    [user("Which is wider?", data_uri(picture(96, 32, 0)), data_uri(picture(40, 64, 1)))],
    [user("Read the sign.", data_uri(picture(64, 64, 2)))],
]


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation}) + "\n" for conversation in CONVERSATIONS))
    return path


def test_greedy_generation_is_that_of_transformers(tiny_model: Path, messages: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    generate_file(tiny_model, messages, output, max_new_tokens=12, temperature=0.0, dtype="float32")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    processor = Processor.from_hf(tiny_model)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    forbidden = [[token] for token in np.flatnonzero(processor.forbidden).tolist()]
    for record, conversation in zip(found, CONVERSATIONS, strict=True):
        encoded = processor.encode_messages(conversation)
        ids = torch.tensor(encoded.token_ids[None].astype(np.int64))
        vision = {}
        if encoded.images:
            vision["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in encoded.images]))
            vision["image_grid_thw"] = torch.tensor([image.grid for image in encoded.images])
            vision["mm_token_type_ids"] = (ids == processor.config.image_token_id).int()
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            bad_words_ids=forbidden,
            **vision,
        )
        expected = generated[0, ids.shape[1] :].tolist()
        assert record["token_ids"] == expected
        assert len(record["logprobs"]) == len(expected)
        assert record["stop_reason"] in ("end_of_turn", "token_budget")
        assert record["text"] == processor.decode(expected)


def test_a_line_that_is_no_conversation_is_named(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n{"messages": []}\n')
    with pytest.raises(MessagesError, match=r"in.jsonl:2: no 'messages'"):
        generate_file(tiny_model, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.requires_bwrap
def test_bfloat16_and_tools(tiny_model: Path, messages: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    generate_file(tiny_model, messages, output, max_new_tokens=8, tools=ToolsConfig(workers=1))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(CONVERSATIONS)
    assert all(set(record) == {"text", "token_ids", "logprobs", "stop_reason", "tool_calls"} for record in records)
