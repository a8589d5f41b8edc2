"""Rows of parquet files by index: a few row groups are held at a time, never the whole data."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hdpo_jax.data.rows import DataError, Rows, first_line


class ParquetRows(Rows):
    """The rows of a parquet file, or of every `.parquet` file below a folder in the order of their paths.

    Threads may share it, and processes may get a copy: file handles and cached row groups stay behind.

    Args:
        path: file or folder.
        columns: the columns to read; those that a file lacks are left out of its rows.
        cache_bytes: row groups are kept up to this size together, the last one in any case.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], *, cache_bytes: int = 512 << 20):
        self.path = Path(path)
        self._columns = tuple(columns)
        self._cache_bytes = cache_bytes
        self._files = _find_files(self.path)
        self._groups: list[tuple[int, int, int]] = []
        """File, row group in the file, first row in the file."""
        starts = [0]
        for number in range(len(self._files)):
            metadata = self._open(number).metadata
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                self._groups.append((number, group, first))
                first += rows
                starts.append(starts[-1] + rows)
        self._starts = np.asarray(starts, np.int64)
        if len(self) == 0:
            raise DataError(f"{self.path} holds no rows")
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = self._group_of(index)
        return self._table(group).slice(index - int(self._starts[group]), 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def location(self, index: int) -> tuple[str, int]:
        """The file (below the folder) and the row in it, counted from 0."""
        group = self._group_of(index)
        number, _, first = self._groups[group]
        file = self._files[number]
        name = file.name if file == self.path else file.relative_to(self.path).as_posix()
        return name, first + index - int(self._starts[group])

    def missing(self, required: Sequence[str]) -> tuple[str, list[str], list[str]] | None:
        """A file that lacks some of these columns: its name, those it lacks, those it has. None: no such file."""
        for number, file in enumerate(self._files):
            names = self._open(number).schema_arrow.names
            lacks = [column for column in required if column not in names]
            if lacks:
                return str(file), lacks, names
        return None

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _open(self, number: int) -> pq.ParquetFile:
        file = self._files[number]
        try:
            return pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} can not be read as parquet: {first_line(error)}") from error

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._tables:
                self._tables.move_to_end(group)
                return self._tables[group]
            number, in_file, _ = self._groups[group]
            with self._open(number) as file:
                wanted = [column for column in self._columns if column in file.schema_arrow.names]
                try:
                    table = file.read_row_group(in_file, columns=wanted)
                except (pa.ArrowException, OSError) as error:
                    problem = f"row group {in_file} can not be read: {first_line(error)}"
                    raise DataError(f"{self._files[number]}: {problem}") from error
            self._tables[group] = table
            while len(self._tables) > 1 and sum(held.nbytes for held in self._tables.values()) > self._cache_bytes:
                self._tables.popitem(last=False)
            return table


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a parquet file or a folder of them")
    files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
    if not files:
        raise DataError(f"{path} holds no .parquet file")
    return files
