"""JSON lines of conversations, as `hdpo generate` and `hdpo score` take them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.policy import PolicyProcessor
from models.qwen3_vl.pixels import load_image
from models.qwen3_vl.processing import EncodedPrompt
from models.qwen3_vl.sources import read_file
from models.qwen3_vl.video import Video

PART_TYPES = ("text", "image", "video")


class MessagesError(ValueError):
    """A line is no conversation; the message names file, line and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class GivenMessages:
    """One line: chat messages, and the image files and videos of their parts in order."""

    line: int
    place: str
    """File and line, as errors name them."""
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[bytes]
    videos: Sequence[Video]


def read_conversations(path: Path | str) -> list[GivenMessages]:
    """All conversations of a file; empty lines are passed over. Paths are relative to where the command runs."""
    path = Path(path)
    if not path.is_file():
        raise MessagesError(f"there is no file {path}; expected JSON lines of {{'messages': […]}}")
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            messages = _checked(_record(line))
            images = [read_file(part["image"], "image") for part in _parts(messages, "image")]
            videos = [Video.from_part(part) for part in _parts(messages, "video")]
        except ValueError as error:
            raise MessagesError(f"{place}: {error}") from error
        given = GivenMessages(line=number, place=place, messages=messages, images=images, videos=videos)
        conversations.append(given)
    if not conversations:
        raise MessagesError(f"{path} holds no conversation; expected JSON lines of {{'messages': […]}}")
    return conversations


def encode_given(
    processor: PolicyProcessor, given: GivenMessages, *, add_generation_prompt: bool = True
) -> EncodedPrompt:
    """One conversation as the model gets it. Raises MessagesError that names its place."""
    try:
        images = [load_image(image) for image in given.images]
        return processor.encode_messages(
            given.messages, images, given.videos, add_generation_prompt=add_generation_prompt
        )
    except ValueError as error:
        raise MessagesError(f"{given.place}: {error}") from error


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"not JSON ({reason}); expected {{'messages': […]}}") from error


def _checked(record: Any) -> list[dict[str, Any]]:
    if isinstance(record, dict) and "images" in record:
        raise ValueError("'images' beside 'messages'; expected them as parts {'type': 'image', 'image'} of a content")
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no 'messages'; expected a list of {'role', 'content'}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {str(message)[:60]!r} has no role; expected {{'role', 'content'}}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise ValueError(f"content {str(content)[:60]!r}; expected a string or a list of parts")
        for part in content:
            kind = part.get("type")
            # What a video may be, its own reader knows.
            if kind not in PART_TYPES or (kind != "video" and not isinstance(part.get(kind), str)):
                expected = " or ".join(f"{{'type': '{name}', '{name}'}}" for name in PART_TYPES)
                raise ValueError(f"part {str(part)[:60]!r}; expected {expected}")
    return messages


def _parts(messages: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == kind]


def power_of_two(size: int, least: int = 64) -> int:
    """The static size, a power of two like `least`, that holds `size`: few sizes, few compilations."""
    return max(least, 1 << (size - 1).bit_length())
