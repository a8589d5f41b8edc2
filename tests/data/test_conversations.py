"""Cold-start conversations: messages out of JSON, images out of base64, and which turns are learned."""

import base64
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo_jax.data.conversations import ConversationDataset
from hdpo_jax.data.rows import DataError
from hdpo_jax.data.schemas import COLD_START_SCHEMA


def picture(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = picture("red"), picture("blue")
MESSAGES = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "<image>What is it?"},
    {"role": "assistant", "content": "<reason>I look at <image>.</reason><tool_call>{}</tool_call>"},
    {"role": "user", "content": "Result: <image>"},
    {"role": "assistant", "content": "<reason>r</reason><answer>blue</answer>"},
]


def row(messages=MESSAGES, images=(RED, BLUE)):
    text = messages if isinstance(messages, str) else json.dumps(messages)
    return {"messages": text, "images": [base64.b64encode(data).decode() for data in images]}


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, COLD_START_SCHEMA), path)
    return path


def test_a_row_becomes_a_conversation(tmp_path):
    conversation = ConversationDataset(write(tmp_path / "a.parquet", [row()]))[0]
    assert conversation.id == "a:0"
    assert conversation.images == (RED, BLUE)
    assert conversation.learned == (False, False, True, False, True)
    assert conversation.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert conversation.messages[3]["content"] == [{"type": "text", "text": "Result: "}, {"type": "image"}]
    # What the assistant wrote is text, a mark in it too: it takes no image.
    assert conversation.messages[2] == MESSAGES[2]


def test_images_are_optional(tmp_path):
    text = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<answer>2</answer>"}]
    pq.write_table(pa.Table.from_pylist([{"messages": json.dumps(text)}]), tmp_path / "a.parquet")
    assert ConversationDataset(tmp_path)[0].images == ()


def test_every_bad_row_is_named_with_its_reason(tmp_path):
    user, assistant = MESSAGES[1], MESSAGES[4]
    rows = [
        row(),
        row("[{"),
        row("3"),
        row("[]"),
        row(["text"]),
        row(images=[RED]),
        row([user], [RED]),
        row([assistant, user], [RED]),
        row([user, {"role": "assistant", "content": " "}], [RED]),
        row(images=[RED, b"no image"]),
        row() | {"images": ["?", "?"]},
        row([user, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], [RED]),
        {"messages": None, "images": []},
    ]
    dataset = ConversationDataset(write(tmp_path / "a.parquet", rows), max_bad_rows=1.0)
    found = {bad.row: bad.reason for bad in dataset.report.bad}
    expected = {
        1: "messages is not JSON",
        2: "there are no messages",
        3: "there are no messages",
        4: "message 1 has role None",
        5: "2 <image> marks and 1 images",
        6: "nothing to learn",
        7: "the assistant speaks before the user",
        8: "message 2, the assistant's, is empty",
        9: "image 2 is no image",
        10: "image 1 is text, but not base64",
        11: "content of type list",
        12: "there are no messages",
    }
    assert sorted(found) == sorted(expected)
    for number, words in expected.items():
        assert words in found[number] and "\n" not in found[number]


def test_prompts_are_not_conversations(tmp_path):
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column messages .it has prompt.: it holds no cold-start conversations"):
        ConversationDataset(tmp_path)
