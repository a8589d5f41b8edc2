"""What the readers of stored rows have in common."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class DataError(ValueError):
    """Data that a run can not go on with; one line that names the file and says what to do."""


class Rows(Protocol):
    """Rows by index, as dicts of plain values, wherever they are stored."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def location(self, index: int) -> tuple[str, int]:
        """The file and the row in it, counted from 0."""
        ...

    def missing(self, required: Sequence[str]) -> tuple[str, list[str], list[str]] | None:
        """What lacks some of these columns, those it lacks, those it has. None: nothing lacks any."""
        ...


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough to stand in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
