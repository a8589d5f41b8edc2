"""JSON lines of conversations, as `hdpo generate` and `hdpo score` take them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.qwen3_vl.pixels import image_bytes


class MessagesError(ValueError):
    """A line is no conversation; the message names file, line and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One line: chat messages, and the image files of their image parts in order."""

    line: int
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[bytes]


def read_conversations(path: Path | str) -> list[Conversation]:
    """All conversations of a file; empty lines are passed over. Image paths are relative to where the command runs."""
    path = Path(path)
    if not path.is_file():
        raise MessagesError(f"there is no file {path}; expected JSON lines of {{'messages': […]}}")
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = _checked(json.loads(line))
            conversations.append(Conversation(line=number, messages=messages, images=_images(messages)))
        except ValueError as error:
            raise MessagesError(f"{path}:{number}: {error}") from error
    if not conversations:
        raise MessagesError(f"{path} holds no conversation; expected JSON lines of {{'messages': […]}}")
    return conversations


def _checked(record: Any) -> list[dict[str, Any]]:
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
            known = isinstance(part.get("text" if part.get("type") == "text" else "image"), str)
            if part.get("type") not in ("text", "image") or not known:
                raise ValueError(
                    f"part {str(part)[:60]!r}; expected {{'type': 'text', 'text'}} or {{'type': 'image', 'image'}}"
                )
    return messages


def _images(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [image_bytes(part["image"]) for content in contents for part in content if part["type"] == "image"]
