"""Videos in data: what a cell of a column may hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdpo_jax.data.images import ImageError, file_in_cell
from models.qwen3_vl.video import Video

SOURCES = ("bytes", "path", "frames", "video")
"""Fields of a struct that hold the video; one of them is filled in."""


class VideoError(ValueError):
    """What is wrong with a video, in words that go behind "video 2"."""


def video_in_cell(value: Any) -> Video:
    """A file's bytes, a path, a data URI, a list of frames, or a struct of one of these and what to sample.

    Frames are image files as `file_in_cell` takes them. Nothing is decoded. Raises VideoError.
    """
    options: dict[str, Any] = {}
    if isinstance(value, Mapping):
        filled = {name: field for name, field in value.items() if field}  # ArrayRecord has no nulls
        given = [filled.pop(name) for name in SOURCES if name in filled]
        if len(given) != 1:
            raise VideoError(f"has {len(given)} of the fields {', '.join(SOURCES)}; expected one of them")
        value, options = given[0], filled
    try:
        if isinstance(value, list):
            value = [file_in_cell(frame) for frame in value]
        video = Video.from_part({"type": "video", "video": value, **options})
    except ImageError as error:
        raise VideoError(f"has a frame that {error}") from error
    except ValueError as error:
        raise VideoError(f"can not be used: {error}") from error
    if isinstance(value, str) and not value.startswith(("data:", "file://")) and not Path(value).is_file():
        raise VideoError(f"is to be in {value[:80]!r}, where no file is")
    return video
