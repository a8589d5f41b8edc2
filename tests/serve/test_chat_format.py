"""What requests may hold, and how tool calls are told from text."""

import json

import pytest
from pydantic import ValidationError

from hdpo_jax.serve.chat_format import ChatRequest, RequestError, split_calls

OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def request(content, **more) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": content}], **more})


def test_parts_become_those_of_the_chat_template():
    parts = [{"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "text", "text": "what is it?"}]
    prompt = request(parts).prompt()
    assert prompt.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    ]
    assert prompt.images[0].startswith(b"GIF89a")


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", "DATA:x"])
def test_nothing_of_this_machine_or_its_network_is_opened_for_a_stranger(url):
    with pytest.raises(RequestError, match="expected a data URI"):
        request([{"type": "image_url", "image_url": {"url": url}}]).prompt()
    with pytest.raises(RequestError, match="expected a data URI"):
        request([{"type": "video_url", "video_url": url}]).prompt()


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"n": 10_000},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(more):
    with pytest.raises(ValidationError):
        request("x", **more)


@pytest.mark.parametrize(
    "more",
    [
        {"top_logprobs": 5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"1": 2}},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"stop": [""]},
        {"stop": ["x"] * 100},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_would_be_answered_otherwise_than_asked_is_refused(more):
    with pytest.raises(RequestError):
        request("x", **more).check()
    request("x", frequency_penalty=0, logit_bias={}, top_logprobs=0, response_format={"type": "text"}).check()


def test_sound_calls_of_offered_tools_are_taken_out_of_the_text():
    text = 'Let me see.<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
    said, calls = split_calls(text + text, OFFERED)
    assert said == "Let me see.Let me see."
    assert [call["function"]["name"] for call in calls] == ["weather"] * 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"town": "Zürich"}] * 2
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        '<tool_call>{"name": "weather", "arguments": {}}',
        '<tool_call>{"name": "launch", "arguments": {}}</tool_call>',
        "<tool_call>{broken</tool_call> and more",
        "a </tool_call> b <tool_call> c",
    ],
)
def test_what_is_no_sound_call_stays_text(text):
    assert split_calls(text, OFFERED) == (text, [])


def test_tool_turns_are_kept():
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    prompt = ChatRequest.model_validate({"messages": messages, "tools": OFFERED}).prompt()
    assert prompt.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
    ]
    assert prompt.messages[2] == {"role": "tool", "content": "sunny"} and prompt.tools == OFFERED
