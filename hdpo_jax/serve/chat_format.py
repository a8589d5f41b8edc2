"""The OpenAI chat format: what is asked, checked and as this package knows it, and what is answered.

What a request holds is not trusted: images and videos come inside it as data URIs, never as paths or addresses that
this machine would open for a stranger.
"""

import base64
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hdpo_jax.tools.protocol import TOOL_CALL_END, TOOL_CALL_START, parse_tool_call
from hdpo_jax.types import Prompt
from models.qwen3_vl.sources import read_file
from models.qwen3_vl.video import Video

SOURCES = {"image_url": "image", "video_url": "video"}
MOST_CHOICES = 128
MOST_STOPS = 16


class RequestError(ValueError):
    """A request that can not be answered; the message is one line for whoever sent it."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class _Lenient(BaseModel):
    """Fields that are not known here are passed over, as clients send many."""

    model_config = ConfigDict(extra="ignore")


class Url(_Lenient):
    url: str


class Part(_Lenient):
    type: str
    text: str | None = None
    image_url: Url | str | None = None
    video_url: Url | str | None = None


class Function(_Lenient):
    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(_Lenient):
    function: Function


class Message(_Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None


class StreamOptions(_Lenient):
    include_usage: bool = False


class ChatRequest(_Lenient):
    """What `/v1/chat/completions` takes. `top_k` and `min_p` are not OpenAI's, but widely known."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, lt=1)] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def check(self) -> None:
        """Raises RequestError for what would be answered in another way than asked."""
        asked = {
            "top_logprobs": self.top_logprobs,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
        }
        for name, value in asked.items():
            if value:
                raise RequestError(f"{name} is {value}; this server does not know it: leave it out", name)
        if self.response_format and self.response_format.get("type") != "text":
            raise RequestError(
                "response_format is not text; this server knows no other: leave it out", "response_format"
            )
        if self.tool_choice not in (None, "auto", "none"):
            raise RequestError(f"tool_choice is {self.tool_choice!r}; expected auto or none", "tool_choice")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise RequestError(f"stop holds {len(self.stops)} texts; expected {MOST_STOPS} at most, none empty", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that the answer may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def prompt(self) -> Prompt:
        """Raises RequestError where a message can not be understood."""
        images: list[bytes] = []
        videos: list[Video] = []
        messages = [_message(place, message, images, videos) for place, message in enumerate(self.messages)]
        for place, tool in enumerate(self.offered):
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise RequestError(
                    "a tool without function.name; expected {'type': 'function', 'function'}", f"tools.{place}"
                )
        return Prompt(
            id="",
            messages=messages,
            images=images,
            videos=videos,
            ground_truth="",
            data_source="",
            tools=self.offered,
        )


def _message(place: int, message: Message, images: list[bytes], videos: list[Video]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content or ""
    if not isinstance(content, str):
        content = [_part(f"messages.{place}.content.{at}", part, images, videos) for at, part in enumerate(content)]
    converted: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        functions = [call.function for call in message.tool_calls]
        converted["tool_calls"] = [
            {"type": "function", "function": {"name": function.name, "arguments": _arguments(function.arguments)}}
            for function in functions
        ]
    return converted


def _arguments(arguments: str | dict[str, Any]) -> Any:
    """As the chat template writes them: JSON, once."""
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _part(place: str, part: Part, images: list[bytes], videos: list[Video]) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text or ""}
    kind = SOURCES.get(part.type)
    given = getattr(part, part.type) if kind else None
    if kind is None or given is None:
        raise RequestError(f"a content part of type {part.type[:40]!r}; expected text, image_url or video_url", place)
    url = given if isinstance(given, str) else given.url
    if not url.startswith("data:"):
        raise RequestError(f"{part.type} is {url[:60]!r}; expected a data URI: nothing is fetched from here", place)
    try:
        file = read_file(url, kind)
    except ValueError as error:
        raise RequestError(str(error), place) from error
    if kind == "image":
        images.append(file)
    else:
        videos.append(Video(source=file))
    return {"type": kind}


def image_part(file: bytes, kind: str = "png") -> dict[str, Any]:
    """A content part that carries an image file."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(file).decode()}"}}


# Answers


def split_calls(text: str, offered: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The text outside of tool calls, and the calls as OpenAI has them.

    What is no sound call of a tool that was offered stays text, so that nothing the policy wrote is lost.
    """
    names = {tool["function"]["name"] for tool in offered}
    outside, calls = [], []
    head, *rest = text.split(TOOL_CALL_START)
    outside.append(head)
    for piece in rest:
        body, closed, after = piece.partition(TOOL_CALL_END)
        call = parse_tool_call(f"{TOOL_CALL_START}{body}{TOOL_CALL_END}") if closed else None
        if call is None or call.error or call.name not in names:
            outside.append(TOOL_CALL_START + piece)
            continue
        outside.append(after)
        arguments = json.dumps(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    said = "".join(outside)
    return said.strip() if calls else said, calls


LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


def token_record(text: str, logprob: float) -> dict[str, Any]:
    """One entry of `logprobs.content`."""
    partial = "\ufffd" in text
    logprob = max(logprob, LEAST_LOGPROB)
    return {"token": text, "logprob": logprob, "bytes": None if partial else list(text.encode()), "top_logprobs": []}


class Reply:
    """The frame of all that is said to one request: the same id, model and time."""

    def __init__(self, model: str):
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = model
        self._created = int(time.time())

    def whole(self, choices: Iterable[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        return self._framed("chat.completion", choices) | {"usage": usage}

    def part(self, choices: Iterable[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> dict[str, Any]:
        return self._framed("chat.completion.chunk", choices) | ({"usage": usage} if usage else {})

    def _framed(self, kind: str, choices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        frame = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return frame | {"choices": list(choices), "system_fingerprint": None}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_record(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
