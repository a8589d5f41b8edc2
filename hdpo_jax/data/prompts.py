"""RL prompts out of rows in the Metis-RL layout."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpo_jax.data.dataset import Dataset, RowError, open_rows, row_images, row_videos
from hdpo_jax.data.schemas import IMAGE_MARK, RL_COLUMNS, VIDEO_MARK
from hdpo_jax.types import Prompt
from models.qwen3_vl.video import Video

PARTS = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
_MARKS = re.compile(f"({'|'.join(PARTS)})")
ROLES = ("system", "user", "assistant")
_COLUMNS = ("data_source", "prompt", "images", "videos", "reward_model", "extra_info", "ability", "use_tool")


class PromptDataset(Dataset[Prompt]):
    """The prompts of a path, checked; `report` lists the rows that can not be used.

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
        problem: Callable[[Prompt], str | None] | None = None,
    ):
        rows = open_rows(path, _COLUMNS, RL_COLUMNS, "RL prompts")
        super().__init__(rows, parse_prompt, max_bad_rows=max_bad_rows, progress=progress, problem=problem)


def parse_prompt(row: Mapping[str, Any], id: str) -> Prompt:
    """The prompt in a row. Raises RowError that says why there is none."""
    images, videos = row_images(row), row_videos(row)
    messages = resolve_marks(row["prompt"], images, videos)
    if messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's: nothing is asked")
    extra = _extra_info(row.get("extra_info"))
    extra |= {name: row[name] for name in ("ability", "use_tool") if row.get(name) is not None}
    return Prompt(
        id=id,
        messages=messages,
        images=images,
        videos=videos,
        ground_truth=_ground_truth(row["reward_model"]),
        data_source=row.get("data_source") or "unknown",
        extra=extra,
    )


def resolve_marks(messages: Any, images: Sequence[bytes], videos: Sequence[Video] = ()) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: a content with `<image>` or `<video>` marks becomes parts, in order.

    Marks count in system and user messages; what an assistant wrote is text. Raises RowError for anything but
    a list of {"role", "content"} with something from the user, and where marks do not match images and videos.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError("there are no messages")
    resolved, asked = [], False
    marks = dict.fromkeys(PARTS, 0)
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            raise RowError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RowError(f"message {number} has content of type {type(content).__name__}; expected text")
        asked |= role == "user" and bool(content.strip())
        pieces = [content] if role == "assistant" else _MARKS.split(content)
        for mark in pieces[1::2]:
            marks[mark] += 1
        resolved.append({"role": role, "content": _parts(pieces) if len(pieces) > 1 else content})
    if not asked:
        raise RowError("no user message says anything")
    for mark, given in ((IMAGE_MARK, images), (VIDEO_MARK, videos)):
        if marks[mark] != len(given):
            raise RowError(f"there are {marks[mark]} {mark} marks and {len(given)} {PARTS[mark]}s; expected as many")
    return resolved


def _parts(pieces: Sequence[str]) -> list[dict[str, str]]:
    parts = [{"type": PARTS[piece]} if piece in PARTS else {"type": "text", "text": piece} for piece in pieces]
    return [part for part in parts if part.get("text") != ""]


def _ground_truth(reward_model: Any) -> str | tuple[str, ...]:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    several = isinstance(truth, list)
    answers = tuple(filter(None, map(_answer, truth if isinstance(truth, list) else [truth])))
    if not answers:
        raise RowError("there is no ground truth")
    return answers if several else answers[0]


def _answer(value: Any) -> str | None:
    """An answer as text; None for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _extra_info(value: Any) -> dict[str, Any]:
    """A struct, or the same as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise RowError(f"extra_info is not JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"extra_info is {type(value).__name__}; expected a struct")
    return dict(value)
