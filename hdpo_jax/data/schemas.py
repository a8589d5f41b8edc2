"""Parquet layouts that runs read: RL prompts as in Metis-RL, cold-start conversations as in Metis-ColdStart."""

from collections.abc import Mapping

import pyarrow as pa

IMAGE_MARK = "<image>"
"""Stands in a message's text where an image goes; the k-th mark of a row is the row's k-th image."""

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary())])
"""An image file as it is (PNG, JPEG…), not pixels. Readers ignore further fields, such as `path`."""


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
"""Columns without which a row is no RL prompt; `images`, `data_source` and `extra_info` may be missing."""

COLD_START_COLUMNS = ("messages",)
"""Columns without which a row is no conversation; `images` may be missing."""
