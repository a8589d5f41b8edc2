"""Rows of a data set that tensorflow-datasets prepared as ArrayRecord, by index. TensorFlow is not imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdpo_jax.data.rows import DataError, Rows, first_line

INFO_FILE = "dataset_info.json"
"""A folder with this file was prepared by tensorflow-datasets."""


def find_prepared(path: Path) -> tuple[Path, str | None] | None:
    """The prepared folder, and the split that the path names behind it; None where there is no such folder."""
    if (path / INFO_FILE).is_file():
        return path, None
    if not path.exists() and (path.parent / INFO_FILE).is_file():
        return path.parent, path.name
    return None


class ArrayRecordRows(Rows):
    """The rows of one split, their images as files: nothing is decoded.

    Processes may get a copy: open files stay behind.

    Args:
        path: the prepared folder (its split "train"), or that folder and the name of a split behind it.
        columns: the features to read; those that the data lacks are left out of its rows.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]):
        self.path = Path(path)
        self._columns = tuple(columns)
        prepared = find_prepared(self.path)
        if prepared is None:
            raise DataError(f"{path} is not a folder that tensorflow-datasets prepared: it has no {INFO_FILE}")
        self._folder, split = prepared
        self._open(split or "train")
        if len(self) == 0:
            raise DataError(f"{self.path} holds no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            raw = self._parser.parse_example(self._records[index])
            return {name: _plain(self._features[name], raw[name]) for name in self._columns if name in self._features}
        except Exception as error:  # whatever a damaged record leads two readers into
            file, row = self.location(index)
            raise DataError(f"{self._folder / file} row {row} can not be read: {first_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_columns": self._columns, "_folder": self._folder, "_split": self._split}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._split)

    def location(self, index: int) -> tuple[str, int]:
        """The shard's file name and the row in it, counted from 0."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[shard], index - int(self._starts[shard])

    def missing(self, required: Sequence[str]) -> tuple[str, list[str], list[str]] | None:
        """The folder, those of the columns that its rows lack, those they have; None where they lack none."""
        lacks = [name for name in required if name not in self._features]
        return (str(self._folder), lacks, sorted(self._features)) if lacks else None

    def _open(self, split: str) -> None:
        # Half a second and two hundred modules, for those who have such data.
        import tensorflow_datasets as tfds

        try:
            builder: Any = tfds.builder_from_directory(str(self._folder))
            splits, kind = builder.info.splits, str(getattr(builder.info.file_format, "value", ""))
        except Exception as error:  # whatever a damaged description leads the library into
            raise DataError(f"{self._folder} can not be read as a prepared data set: {first_line(error)}") from error
        if kind != "array_record":
            raise DataError(f"{self._folder} holds {kind} files; expected array_record: prepare it in that format")
        if split not in splits:
            known = ", ".join(sorted(splits)) or "none"
            raise DataError(
                f"{self._folder} has no split {split} (it has {known}): name one, as in {self._folder}/test"
            )
        info = splits[split]
        missing = [name for name in info.filenames if not (self._folder / name).is_file()]
        if missing:
            raise DataError(f"{self._folder} has no {missing[0]}, which its description names: copy it whole")
        self._split = split
        self._files = sorted(info.filenames)
        self._starts = np.concatenate([[0], np.cumsum(info.shard_lengths, dtype=np.int64)])
        self._features: Any = builder.info.features
        self._parser: Any = _example_parser(self._features)
        try:
            self._records = builder.as_data_source(split).data_source
            found = len(self._records)
        except Exception as error:
            raise DataError(f"{self._folder} can not be read as ArrayRecord: {first_line(error)}") from error
        if found != len(self):
            raise DataError(f"{self._folder} holds {found} rows of {split}; its description says {len(self)}")


def _example_parser(features: Any) -> Any:
    """Records to raw features; the library's own reader would decode the images too."""
    from tensorflow_datasets.core import example_parser

    return example_parser.ExampleParserNp(features.get_serialized_info())


def _plain(feature: Any, value: Any) -> Any:
    """A parsed feature as a parquet reader gives it: lists, dicts, str, and image files as bytes."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {name: _plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, features.Sequence):
        inner = feature.feature
        if not isinstance(inner, features.FeaturesDict):
            return [_plain(inner, item) for item in value]
        # A sequence of structs is stored field by field.
        fields = {name: _plain(features.Sequence(inner[name]), value[name]) for name in inner}
        return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    if isinstance(feature, features.Text):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value
