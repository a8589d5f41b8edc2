"""Endless, resumable batches (Grain): shuffled anew each epoch, each host its slice of every global batch.

The order is a function of the seed alone. Global batch k is examples k B … (k + 1) B - 1 of the endless sequence of
shuffled epochs. Host h of H gets the h-th of its H equal slices, or of each of its parts where it is to be learned in
several: the hosts' batches in order are the global batch, or the part.
The state is a position in that sequence, so a run may resume with another number of hosts or workers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from hdpo_jax.data.dataset import BadRow, BadRowError, Dataset, Example, Report
from hdpo_jax.data.rows import DataError

PREFETCH = 2
"""Batches that are read ahead."""

T = TypeVar("T", bound=Example)


class _Batch(NamedTuple, Generic[T]):
    examples: Sequence[T]
    bad: Sequence[BadRow]
    """Rows that could not be read on the way."""


class _Reader(Generic[T]):
    """Indices of a global batch to this host's examples. Travels to worker processes."""

    def __init__(self, dataset: Dataset[T], mine: Int[np.ndarray, " examples"]):
        self._dataset = dataset
        self._mine = mine

    def __call__(self, indices: Int[np.ndarray, " batch"]) -> _Batch[T]:
        indices = indices[self._mine]
        examples: dict[int, T] = {}
        bad: dict[BadRow, None] = {}
        # In the order of the file: each row group is read once a batch at most.
        for place in np.argsort(indices, kind="stable").tolist():
            example = self._next_good(int(indices[place]), bad)
            if example is None:
                return _Batch((), tuple(bad))
            examples[place] = example
        return _Batch([examples[place] for place in range(len(indices))], tuple(bad))

    def _next_good(self, index: int, bad: dict[BadRow, None]) -> T | None:
        """The example, or the first good one after it; None where more are bad than the run puts up with."""
        dataset = self._dataset
        for step in range(len(dataset)):
            try:
                return dataset[(index + step) % len(dataset)]
            except BadRowError as error:
                bad[error.bad] = None
                if len(dataset.report.bad) + len(bad) > dataset.max_bad_rows * dataset.report.rows:
                    return None
        return None


class Batches(Generic[T]):
    """An endless iterator of lists of examples; see `batches`."""

    def __init__(
        self,
        dataset: Dataset[T],
        indices: grain.MapDataset,
        places: Int[np.ndarray, " examples"],
        workers: int,
        key: dict[str, int],
    ):
        self.places: list[int] = places.tolist()
        """Where this host's examples stand in the global batch."""
        self._dataset = dataset
        self._indices = indices
        self._reader = _Reader(dataset, places)
        self._workers = workers
        self._key = key
        self._position = 0
        self._bad: dict[BadRow, None] = {}
        self._source: grain.DatasetIterator | None = None
        self._peeked: _Batch[T] | None = None

    def __iter__(self) -> "Batches[T]":
        return self

    def __next__(self) -> list[T]:
        """This host's next batch. Raises DataError once more rows are bad than `max_bad_rows` allows."""
        batch, self._peeked = self._peek(), None
        self._bad |= dict.fromkeys(batch.bad)
        if batch.bad:
            self.report.check(self._dataset.max_bad_rows)
        self._position += 1
        return list(batch.examples)

    def peek(self) -> list[T]:
        """What `next` returns, the place in the data still before it; nothing where `next` raises for bad rows."""
        return list(self._peek().examples)

    def _peek(self) -> _Batch[T]:
        if self._source is None:
            self._source = self._start()
        batch: _Batch[T] = self._peeked or next(self._source)
        self._peeked = batch
        return batch

    @property
    def report(self) -> Report:
        """All rows known to be bad: those found at the start, and those found while reading."""
        return self._dataset.report.with_more(self._bad)

    def get_state(self) -> dict[str, Any]:
        """The place in the data, as JSON: how many batches were handed out, of which sequence; bad rows on the way."""
        bad = [[row.file, row.row, row.reason] for row in self._bad]
        return {"batches": self._position, "bad": bad, **self._key}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `get_state()` of a run on the same data. Raises DataError where the sequence is another."""
        for name, value in self._key.items():
            if state.get(name) != value:
                raise DataError(
                    f"the place in the data was saved with {name} {state.get(name)}; this run has {value}: "
                    "resume with the same data and settings, or start in another folder"
                )
        self.close()
        self._position = int(state["batches"])
        self._bad = {BadRow(file=file, row=row, reason=reason): None for file, row, reason in state["bad"]}

    def close(self) -> None:
        """Ends worker processes and what was read ahead; the iterator may go on."""
        if self._source is not None:
            self._source.close()
            self._source, self._peeked = None, None

    def _start(self) -> grain.DatasetIterator:
        ahead = self._indices.slice(slice(self._position, None)).map(self._reader)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        source = ahead.to_iter_dataset(options)
        if self._workers:
            # Grain reads flags of its own when it starts processes, and absl refuses before main() parsed them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            source = source.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(source)


def batches(
    dataset: Dataset[T],
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    parts: int = 1,
    workers: int = 0,
) -> Batches[T]:
    """Endless batches of a dataset's examples, shuffled anew each epoch; `get_state` and `set_state` resume them.

    An epoch gives every example once; a batch may reach into the next epoch. A row that turns out to be unreadable is
    replaced by the next good one in the file, counted and listed in `report`.

    Args:
        batch_size: examples over all hosts.
        seed: decides the order, alone.
        shard_index, shard_count: this host, and how many there are.
        parts: a batch's equal parts, in order, of each of which every host gets as much.
        workers: processes that read and check rows; 0 reads in a thread of this one.
    """
    if batch_size < 1 or batch_size % (shard_count * parts):
        each = f" times {parts} mini-batches" if parts > 1 else ""
        raise DataError(f"the batch size is {batch_size}; expected a multiple of the {shard_count} hosts{each}")
    if not 0 <= shard_index < shard_count:
        raise DataError(f"the shard index is {shard_index}; expected 0 to {shard_count - 1}")
    places = share(batch_size, shard_index, shard_count, parts=parts)
    indices = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat().batch(batch_size)
    key = {"examples": len(dataset), "batch_size": batch_size, "seed": seed}
    return Batches(dataset, indices, places, workers, key)


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for every host, however many there are now: the place that all saved, the bad rows that any knew.

    Raises DataError where they were saved at different places.
    """
    first, *others = states
    for state in others:
        if any(state.get(name) != value for name, value in first.items() if name != "bad"):
            raise DataError(f"hosts saved different places in the data: {first} and {state}; expected one place")
    bad = {tuple(row): None for state in states for row in state.get("bad", ())}
    return {**first, "bad": [list(row) for row in bad]}


def share(size: int, index: int, count: int, *, parts: int = 1) -> Int[np.ndarray, " share"]:
    """Which places of a batch are those of host `index` of `count`: its slice of each of the batch's parts."""
    return np.arange(size).reshape(parts, count, -1)[:, index].ravel()
