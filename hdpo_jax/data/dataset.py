"""Checked rows by index: what can not be used is left out, counted and listed, and too much of it stops the run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from hdpo_jax.data.array_record import ArrayRecordRows, find_prepared
from hdpo_jax.data.images import ImageError, check_file, check_pixels, file_in_cell
from hdpo_jax.data.parquet import ParquetRows
from hdpo_jax.data.rows import DataError, Rows
from hdpo_jax.data.videos import VideoError, video_in_cell
from models.qwen3_vl.video import Video

LISTED = 3
"""Bad rows that an error names."""


class RowError(ValueError):
    """Why a row can not be used, in words that go behind its file and number."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    file: str
    row: int
    """Counted from 0 in its file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


class BadRowError(DataError):
    """A row that was good when the dataset was opened can not be read; says which, and why."""

    def __init__(self, bad: BadRow):
        super().__init__(str(bad))
        self.bad = bad

    def __reduce__(self) -> tuple[type["BadRowError"], tuple[BadRow]]:
        return type(self), (self.bad,)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the rows of a path are good for."""

    path: str
    rows: int
    bad: Sequence[BadRow]

    def with_more(self, bad: Iterable[BadRow]) -> "Report":
        """The same, and these rows found bad later."""
        return replace(self, bad=(*self.bad, *bad))

    def check(self, max_bad_rows: float) -> None:
        """Raises DataError where more than this share of the rows is bad, or no row is left."""
        if len(self.bad) <= max_bad_rows * self.rows and len(self.bad) < self.rows:
            return
        named = "; ".join(str(bad) for bad in self.bad[:LISTED])
        more = f"; and {len(self.bad) - LISTED:,} more" if len(self.bad) > LISTED else ""
        raise DataError(
            f"{self.path}: {len(self.bad):,} of {self.rows:,} rows can not be used, "
            f"and data.max_bad_rows allows a share of {max_bad_rows:g}: {named}{more}"
        )


class Example(Protocol):
    """What a row becomes."""

    @property
    def images(self) -> Sequence[bytes]:
        """Image files."""
        ...


T = TypeVar("T", bound=Example)


class Dataset(Generic[T]):
    """The usable rows of parquet or ArrayRecord files, as examples, by index.

    Every row is parsed once when the dataset is opened, and its image files are checked to their end without
    decoding them. Reading an example for the first time decodes its images: what is given out is known to be good.

    Args:
        rows: where the rows are.
        parse: row and id to an example; raises RowError.
        max_bad_rows: share of bad rows that is put up with. More raise DataError.
        progress: called with the rows checked so far and all rows, about 200 times.
        problem: why an example can not be used, in words, or None; asked when it is first read.
    """

    def __init__(
        self,
        rows: Rows,
        parse: Callable[[Mapping[str, Any], str], T],
        *,
        max_bad_rows: float,
        progress: Callable[[int, int], None] | None,
        problem: Callable[[T], str | None] | None = None,
    ):
        self._rows = rows
        self._parse = parse
        self._problem = problem
        self.max_bad_rows = max_bad_rows
        bad, usable = [], []
        every = max(1, len(rows) // 200)
        for index, row in enumerate(rows):
            try:
                _check_images(self._example(index, row), check_file)
                usable.append(index)
            except RowError as error:
                bad.append(self._bad_row(index, str(error)))
            if progress and ((index + 1) % every == 0 or index + 1 == len(rows)):
                progress(index + 1, len(rows))
        self._usable = np.asarray(usable, np.int64)
        self._known_good: set[int] = set()
        """Rows that were read, and their images decoded, once: later epochs need not do it again."""
        self.report = Report(path=str(rows.path), rows=len(rows), bad=tuple(bad))
        self.report.check(max_bad_rows)

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> T:
        """The example; raises BadRowError where an image turns out not to be decodable."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = int(self._usable[index])
        try:
            example = self._example(row, self._rows[row])
            if row not in self._known_good:
                self._check_on_first_read(example)
                self._known_good.add(row)
        except RowError as error:
            raise BadRowError(self._bad_row(row, str(error))) from error
        return example

    def _check_on_first_read(self, example: T) -> None:
        _check_images(example, check_pixels)
        problem = self._problem(example) if self._problem else None
        if problem:
            raise RowError(problem)

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def _example(self, index: int, row: Mapping[str, Any]) -> T:
        file, in_file = self._rows.location(index)
        return self._parse(row, f"{file.removesuffix('.parquet')}:{in_file}")

    def _bad_row(self, index: int, reason: str) -> BadRow:
        file, in_file = self._rows.location(index)
        return BadRow(file=file, row=in_file, reason=reason)


def open_rows(path: str | Path, columns: Sequence[str], required: Sequence[str], what: str) -> Rows:
    """The rows of a path whose files all have the required columns. Raises DataError."""
    rows = ArrayRecordRows(path, columns) if find_prepared(Path(path)) else ParquetRows(path, columns)
    missing = rows.missing(required)
    if missing is not None:
        file, lacks, names = missing
        raise DataError(
            f"{file} has no column {' and no '.join(lacks)} (it has {', '.join(names)}): it holds no {what}"
        )
    return rows


def row_images(row: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The image files of a row; none where it has no such column. Raises RowError."""
    images = []
    for number, value in enumerate(row.get("images") or (), start=1):
        try:
            images.append(file_in_cell(value))
        except ImageError as error:
            raise RowError(f"image {number} {error}") from error
    return tuple(images)


def row_videos(row: Mapping[str, Any]) -> tuple[Video, ...]:
    """The videos of a row; none where it has no such column. Raises RowError."""
    videos = []
    for number, value in enumerate(row.get("videos") or (), start=1):
        try:
            videos.append(video_in_cell(value))
        except VideoError as error:
            raise RowError(f"video {number} {error}") from error
    return tuple(videos)


def _check_images(example: Example, check: Callable[[bytes], None]) -> None:
    for number, data in enumerate(example.images, start=1):
        try:
            check(data)
        except ImageError as error:
            raise RowError(f"image {number} {error}") from error
