"""Parquet layouts that runs read: RL prompts as in Metis-RL, cold-start conversations as in Metis-ColdStart."""

from collections.abc import Mapping

import pyarrow as pa

IMAGE_MARK = "<image>"
"""Stands in a message's text where an image goes; the k-th mark of a row is the row's k-th image."""

VIDEO_MARK = "<video>"
"""The same for the row's videos."""

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary())])
"""An image file as it is (PNG, JPEG…), not pixels. Readers ignore further fields, such as `path`."""

VIDEO = pa.struct(
    [
        ("bytes", pa.binary()),
        ("path", pa.string()),
        ("frames", pa.list_(pa.binary())),
        ("fps", pa.float64()),
    ]
)
"""A video file as it is, or the path of one, or image files that are its frames; and how many frames a second to
sample (of `frames`, how many a second there are)."""

VIDEOS = pa.field("videos", pa.list_(VIDEO))
"""A column for either layout: `RL_SCHEMA.append(VIDEOS)`."""


def rl_schema(*, several_answers: bool = False, extra: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """The layout of RL prompts.

    Args:
        several_answers: the ground truth is a list of strings, any of which may match; else one string.
        extra: fields of `extra_info` beside `index`. They reach `Prompt.extra`.
    """
    answer = pa.list_(pa.string()) if several_answers else pa.string()
    fields = {"index": pa.int64()} | dict(extra or {})
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(MESSAGE)),
            ("images", pa.list_(IMAGE)),
            ("reward_model", pa.struct([("ground_truth", answer)])),
            ("extra_info", pa.struct(list(fields.items()))),
        ]
    )


RL_SCHEMA = rl_schema()

COLD_START_SCHEMA = pa.schema([("messages", pa.string()), ("images", pa.list_(pa.string()))])
"""`messages` is JSON: a list of {"role", "content"}; `images` are base64 strings of image files."""

RL_COLUMNS = ("prompt", "reward_model")
"""Columns without which a row is no RL prompt; `images`, `videos`, `data_source`, `extra_info` may be missing."""

COLD_START_COLUMNS = ("messages",)
"""Columns without which a row is no conversation; `images` and `videos` may be missing."""
