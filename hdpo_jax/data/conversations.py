"""Cold-start conversations out of rows in the Metis-ColdStart layout."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo_jax.data.dataset import Dataset, RowError, open_rows, row_images, row_videos
from hdpo_jax.data.prompts import resolve_marks
from hdpo_jax.data.schemas import COLD_START_COLUMNS
from models.qwen3_vl.video import Video


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation to learn from, tool results as user turns."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    """Roles and contents as a chat template takes them; image parts are `{"type": "image"}`, in order."""
    images: Sequence[bytes]
    """Image files, in the order of the image parts."""
    videos: Sequence[Video]
    """In the order of the video parts."""
    learned: Sequence[bool]
    """Which messages are learned: the assistant's."""


class ConversationDataset(Dataset[Conversation]):
    """The conversations of a path, checked; `report` lists the rows that can not be used.

    Args:
        path: a parquet file, a folder of them, or a folder that tensorflow-datasets prepared as ArrayRecord.
        max_bad_rows: share of unusable rows past which DataError is raised.
        progress: called with the rows checked so far and all rows.
        problem: why an example can not be used, in words, or None; asked when it is first read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bad_rows: float = 0.01,
        progress: Callable[[int, int], None] | None = None,
        problem: Callable[[Conversation], str | None] | None = None,
    ):
        rows = open_rows(path, ("messages", "images", "videos"), COLD_START_COLUMNS, "cold-start conversations")
        super().__init__(rows, parse_conversation, max_bad_rows=max_bad_rows, progress=progress, problem=problem)


def parse_conversation(row: Mapping[str, Any], id: str) -> Conversation:
    """The conversation in a row. Raises RowError that says why there is none."""
    messages = row["messages"]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise RowError(f"messages is not JSON: {error}") from error
    images, videos = row_images(row), row_videos(row)
    resolved = resolve_marks(messages, images, videos)
    roles = [message["role"] for message in resolved]
    if "assistant" not in roles:
        raise RowError("no message is the assistant's: there is nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("the assistant speaks before the user")
    for number, message in enumerate(resolved, start=1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise RowError(f"message {number}, the assistant's, is empty")
    learned = tuple(role == "assistant" for role in roles)
    return Conversation(id=id, messages=resolved, images=images, videos=videos, learned=learned)
