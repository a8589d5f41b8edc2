"""Batches: exact epochs, disjoint shards, resuming at any step, and rows that turn out to be bad."""

import collections
import itertools
import json
import pickle
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hdpo_jax.data.dataset import BadRowError
from hdpo_jax.data.pipeline import batches, joined
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.rows import DataError

ROWS = 61


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def picture(pixels: bytes) -> bytes:
    """A 1 x 1 PNG whose marks and checksums are right, whatever its pixels are."""
    header = (1).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD, BROKEN = picture(zlib.compress(b"\0\7")), picture(b"no pixels")


def write(path, broken=(), rows=ROWS):
    table = [
        {
            "prompt": [{"role": "user", "content": "<image>What?"}],
            "images": [{"bytes": BROKEN if i in broken else GOOD}],
            "reward_model": {"ground_truth": str(i)},
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=5)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PromptDataset(write(tmp_path_factory.mktemp("data") / "a.parquet"))


def take(iterator, count):
    return [[int(prompt.ground_truth) for prompt in batch] for batch in itertools.islice(iterator, count)]


def test_an_epoch_holds_every_row_once_and_each_epoch_has_its_own_order(dataset):
    iterator = batches(dataset, batch_size=8, seed=3)
    rows = list(itertools.chain(*take(iterator, 23)))
    epochs = [rows[first : first + ROWS] for first in (0, ROWS, 2 * ROWS)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in [*epochs, list(range(ROWS))]}) == 4
    iterator.close()


def test_the_seed_decides_the_order(dataset):
    first, same, other = (take(batches(dataset, batch_size=4, seed=seed), 6) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_slices_in_order_are_the_global_batch(dataset, hosts):
    whole = take(batches(dataset, batch_size=8, seed=5), 7)
    slices = [
        take(batches(dataset, batch_size=8, seed=5, shard_index=host, shard_count=hosts), 7) for host in range(hosts)
    ]
    assert all(len(batch) == 8 // hosts for host in slices for batch in host)
    assert [list(itertools.chain(*parts)) for parts in zip(*slices, strict=True)] == whole


@pytest.mark.parametrize("step", [0, 1, 5, 6, 11])
def test_resuming_goes_on_as_if_nothing_had_happened(dataset, step):
    uninterrupted = take(batches(dataset, batch_size=4, seed=9), 20)
    iterator = batches(dataset, batch_size=4, seed=9)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    assert take(iterator, 2) == uninterrupted[step : step + 2]
    resumed = batches(dataset, batch_size=4, seed=9)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert take(resumed, 20 - step) == uninterrupted[step:]
    # An iterator that already ran goes back too.
    iterator.set_state(state)
    assert take(iterator, 3) == uninterrupted[step : step + 3]


def test_a_look_ahead_moves_nothing(dataset):
    uninterrupted = take(batches(dataset, batch_size=4, seed=9), 4)
    iterator = batches(dataset, batch_size=4, seed=9)
    take(iterator, 1)
    state = iterator.get_state()
    seen = [[int(prompt.ground_truth) for prompt in iterator.peek()] for _ in range(2)]
    assert seen == [uninterrupted[1]] * 2
    assert iterator.get_state() == state
    # A run that ends here goes on with the batch that was looked at: it was not learned.
    iterator.set_state(state)
    assert take(iterator, 2) == uninterrupted[1:3]
    iterator.peek()
    iterator.close()
    assert take(iterator, 1) == uninterrupted[3:]


def test_the_hosts_share_each_part_of_a_batch(dataset):
    """Host 0 of 2 with the first half would instead have the whole first mini-batch, and none of the second."""
    (whole,) = take(batches(dataset, batch_size=8, seed=5), 1)
    halves = [batches(dataset, batch_size=8, seed=5, shard_index=host, shard_count=2, parts=2) for host in range(2)]
    assert [half.places for half in halves] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for half in halves:
        assert take(half, 1) == [[whole[place] for place in half.places]]


def test_a_run_may_resume_on_another_number_of_hosts(dataset):
    whole = take(batches(dataset, batch_size=8, seed=1), 6)
    one = batches(dataset, batch_size=8, seed=1, shard_index=1, shard_count=2)
    take(one, 3)
    all_hosts = batches(dataset, batch_size=8, seed=1)
    all_hosts.set_state(one.get_state())
    assert take(all_hosts, 3) == whole[3:]


def test_four_hosts_go_on_as_one_that_knows_what_each_found_bad(dataset):
    """No example is skipped or given out twice: were each host's own batches counted, one would begin anew."""
    whole = take(batches(dataset, batch_size=8, seed=1), 6)
    hosts = [batches(dataset, batch_size=8, seed=1, shard_index=host, shard_count=4) for host in range(4)]
    for host in hosts:
        take(host, 3)
    states = [host.get_state() for host in hosts]
    torn = [["a", 1, "torn"], ["a", 2, "torn"]]
    states[0], states[3] = states[0] | {"bad": torn[:1]}, states[3] | {"bad": torn}
    one = batches(dataset, batch_size=8, seed=1)
    one.set_state(joined(json.loads(json.dumps(states))))
    assert take(one, 3) == whole[3:]
    assert one.get_state()["bad"] == torn
    with pytest.raises(DataError, match="hosts saved different places in the data: .* expected one place"):
        joined([states[0], states[1] | {"batches": 2}])


def test_a_state_of_other_data_or_settings_is_refused(dataset):
    state = batches(dataset, batch_size=4, seed=1).get_state()
    for other, words in [
        (batches(dataset, batch_size=8, seed=1), "batch_size 4; this run has 8"),
        (batches(dataset, batch_size=4, seed=2), "seed 1; this run has 2"),
    ]:
        with pytest.raises(DataError, match=words):
            other.set_state(state)
    with pytest.raises(DataError, match="examples 60; this run has 61"):
        batches(dataset, batch_size=4, seed=1).set_state(state | {"examples": 60})


def test_impossible_settings_are_refused(dataset):
    with pytest.raises(DataError, match="batch size is 6; expected a multiple of the 4 hosts"):
        batches(dataset, batch_size=6, seed=0, shard_count=4)
    with pytest.raises(DataError, match="batch size is 6; expected a multiple of the 3 hosts times 4 mini-batches"):
        batches(dataset, batch_size=6, seed=0, shard_count=3, parts=4)
    with pytest.raises(DataError, match="shard index is 2; expected 0 to 1"):
        batches(dataset, batch_size=4, seed=0, shard_index=2, shard_count=2)


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    small = PromptDataset(write(tmp_path / "a.parquet", rows=3))
    (batch,) = take(batches(small, batch_size=8, seed=0), 1)
    assert sorted(collections.Counter(batch).values()) == [2, 3, 3]


def test_an_unreadable_row_gives_its_place_to_the_next_good_one(dataset, tmp_path):
    broken = PromptDataset(write(tmp_path / "a.parquet", broken=(4, 5, 60)), max_bad_rows=0.05)
    with pytest.raises(BadRowError):
        broken[4]
    iterator = batches(broken, batch_size=12, seed=3)
    replaced = {4: 6, 5: 6, 60: 0}
    whole = take(batches(dataset, batch_size=12, seed=3), 11)
    assert take(iterator, 11) == [[replaced.get(row, row) for row in batch] for batch in whole]
    # Two epochs saw each of them, and each counts once.
    found = sorted(iterator.report.bad, key=lambda bad: bad.row)
    assert [bad.row for bad in found] == [4, 5, 60] and iterator.report.rows == ROWS
    assert str(found[2]).startswith("a.parquet row 60: image 1 can not be decoded")


def test_more_unreadable_rows_than_allowed_stop_the_run_in_one_line(tmp_path):
    broken = PromptDataset(write(tmp_path / "a.parquet", broken=(4, 5, 60)), max_bad_rows=0.04)
    iterator = batches(broken, batch_size=12, seed=3)
    with pytest.raises(DataError, match="a.parquet: 3 of 61 rows can not be used") as error:
        take(iterator, 11)
    assert "\n" not in str(error.value)


def test_data_without_a_readable_row_ends(tmp_path):
    broken = PromptDataset(write(tmp_path / "a.parquet", broken=range(ROWS)), max_bad_rows=1.0)
    with pytest.raises(DataError, match="61 of 61 rows"):
        next(batches(broken, batch_size=4, seed=3))


def test_a_file_that_disappears_is_one_line(tmp_path):
    path = write(tmp_path / "a.parquet")
    gone = pickle.loads(pickle.dumps(PromptDataset(path)))  # a copy holds no row group that was read before
    path.unlink()
    with pytest.raises(DataError, match="a.parquet can not be read as parquet"):
        next(batches(gone, batch_size=4, seed=3))


def test_bad_rows_found_on_the_way_survive_a_resume(tmp_path):
    path = write(tmp_path / "a.parquet", broken=(4, 9))
    first = batches(PromptDataset(path, max_bad_rows=0.1), batch_size=16, seed=3)
    take(first, 4)
    resumed = batches(PromptDataset(path, max_bad_rows=0.1), batch_size=16, seed=3)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    assert {bad.row for bad in first.report.bad} == {4, 9}
    assert resumed.report.bad == first.report.bad


def test_a_worker_process_changes_nothing(tmp_path):
    broken = PromptDataset(write(tmp_path / "a.parquet", broken=(4,)), max_bad_rows=0.1)
    alone, elsewhere = (batches(broken, batch_size=16, seed=3, workers=workers) for workers in (0, 1))
    assert take(elsewhere, 4) == take(alone, 4)
    # What the worker found reaches this process.
    assert [bad.row for bad in elsewhere.report.bad] == [4]
    state = elsewhere.get_state()
    elsewhere.close()
    expected = take(alone, 2)
    alone.set_state(state)
    assert take(alone, 2) == expected
