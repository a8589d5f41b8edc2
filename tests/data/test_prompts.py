"""RL prompts: what a row becomes, and that a bad one is named, left out and counted."""

import base64
import io
import pickle
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo_jax.data.dataset import BadRowError
from hdpo_jax.data.images import ImageError, check_file, check_pixels, file_in_cell
from hdpo_jax.data.parquet import ParquetRows
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.rows import DataError
from hdpo_jax.data.schemas import RL_SCHEMA, rl_schema


def picture(kind="PNG", size=(40, 30), seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNG, JPEG = picture("PNG"), picture("JPEG")


def row(content="<image>\nWhat is it?", images=(PNG,), truth: Any = "cat", **fields) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "Answer."}, {"role": "user", "content": content}]
    files = [{"bytes": data} for data in images]
    defaults = {"data_source": "test", "extra_info": {"index": 7}}
    return {"prompt": prompt, "images": files, "reward_model": {"ground_truth": truth}, **defaults, **fields}


def write(path, rows, schema=None, **options):
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def bad_rows(path):
    return [(bad.row, bad.reason) for bad in PromptDataset(path, max_bad_rows=1.0).report.bad]


def test_a_row_becomes_a_prompt(tmp_path):
    rows = [row("Compare <image> with <image>.", [PNG, JPEG], ability="perception")]
    prompt = PromptDataset(write(tmp_path / "a.parquet", rows))[0]
    assert prompt.id == "a:0"
    assert prompt.messages == [
        {"role": "system", "content": "Answer."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare "},
                {"type": "image"},
                {"type": "text", "text": " with "},
                {"type": "image"},
                {"type": "text", "text": "."},
            ],
        },
    ]
    assert prompt.images == (PNG, JPEG)
    assert (prompt.ground_truth, prompt.data_source) == ("cat", "test")
    assert prompt.extra == {"index": 7, "ability": "perception"}


def test_extra_info_may_be_json(tmp_path):
    rows = [row(extra_info=text) for text in ('{"index": 7}', "", "{", "[1]")]
    path = write(tmp_path / "a.parquet", rows)
    dataset = PromptDataset(path, max_bad_rows=1.0)
    assert [prompt.extra for prompt in dataset] == [{"index": 7}, {}]
    assert [(bad.row, bad.reason.partition(":")[0]) for bad in dataset.report.bad] == [
        (2, "extra_info is not JSON"),
        (3, "extra_info is list; expected a struct"),
    ]


def test_numbers_are_answers(tmp_path):
    for truth, expected in ((12, "12"), ([12, 13], ("12", "13"))):
        assert PromptDataset(write(tmp_path / "a.parquet", [row(truth=truth)]))[0].ground_truth == expected


def test_text_around_marks_is_kept_to_the_letter(tmp_path):
    dataset = PromptDataset(write(tmp_path / "a.parquet", [row(), row("no image", [])]))
    assert dataset[0].messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    assert dataset[1].messages[1]["content"] == "no image"


def test_only_prompt_and_ground_truth_are_needed(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": "2"}}]
    prompt = PromptDataset(write(tmp_path / "a.parquet", rows))[0]
    assert (prompt.images, prompt.extra, prompt.data_source) == ((), {}, "unknown")


def test_the_published_schema_reads_back(tmp_path):
    several = rl_schema(several_answers=True, extra={"legible": pa.bool_()})
    one = PromptDataset(write(tmp_path / "one.parquet", [row()], RL_SCHEMA))[0]
    many_row = row(truth=["NYC", "New York City"], extra_info={"index": 1, "legible": True})
    many = PromptDataset(write(tmp_path / "many.parquet", [many_row], several))[0]
    assert one.ground_truth == "cat" and one.extra == {"index": 7}
    assert many.ground_truth == ("NYC", "New York City") and many.extra == {"index": 1, "legible": True}


def test_bytes_may_come_as_lists_of_numbers_or_plain(tmp_path):
    listed = write(tmp_path / "a.parquet", [row() | {"images": [{"bytes": list(PNG)}]}])
    plain = write(tmp_path / "b.parquet", [row() | {"images": [PNG]}])
    assert PromptDataset(listed)[0].images == PromptDataset(plain)[0].images == (PNG,)


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train-1.parquet", [row(truth=f"c{i}") for i in range(3)], row_group_size=2)
    write(tmp_path / "data/train-0.parquet", [row(truth=f"a{i}") for i in range(2)])
    dataset = PromptDataset(tmp_path)
    assert [prompt.ground_truth for prompt in dataset] == ["a0", "a1", "c0", "c1", "c2"]
    assert [prompt.id for prompt in dataset][2:4] == ["data/train-1:0", "data/train-1:1"]


def test_every_bad_row_is_named_with_its_reason(tmp_path):
    question = row()["prompt"]
    rows = [
        row(),
        row(truth=""),
        row(truth=None),
        row("two <image><image>"),
        row("none"),
        row(images=[b"not an image"]),
        row(images=[PNG[:-20]]),
        row(images=[JPEG[:-200]]),
        row(images=[b""]),
        row(images=[None]),
        row("   ", []),
        row(prompt=[]),
        row(prompt=[{"role": "tool", "content": "x"}]),
        row(prompt=[{"role": "user", "content": None}]),
        row(prompt=[*question, {"role": "assistant", "content": "a cat"}]),
        row(images=[picture("BMP", (300, 1))]),
        row(images=[JPEG]),
    ]
    write(tmp_path / "a.parquet", rows, row_group_size=4)
    reasons = dict(bad_rows(tmp_path / "a.parquet"))
    assert {number: reasons[number] for number in (1, 2, 3, 4, 8, 9)} == {
        1: "there is no ground truth",
        2: "there is no ground truth",
        3: "there are 2 <image> marks and 1 images; expected as many",
        4: "there are 0 <image> marks and 1 images; expected as many",
        8: "image 1 is empty",
        9: "image 1 is NoneType, not the bytes of a file",
    }
    for number, words in [
        (5, "is no image"),
        (6, "damaged"),
        (7, "truncated"),
        (10, "no user message"),
        (11, "no mess"),
    ]:
        assert words in reasons[number]
    for number, words in [(12, "role 'tool'"), (13, "NoneType"), (14, "nothing is asked"), (15, "300 x 1 pixels")]:
        assert words in reasons[number]
    assert sorted(reasons) == list(range(1, 16))
    dataset = PromptDataset(tmp_path / "a.parquet", max_bad_rows=0.9)
    assert [prompt.id for prompt in dataset] == ["a:0", "a:16"]
    assert dataset.report.rows == 17 and str(dataset.report.bad[0]) == "a.parquet row 1: there is no ground truth"


def test_too_many_bad_rows_stop_the_run_in_one_line(tmp_path):
    path = write(tmp_path / "a.parquet", [row(truth="" if i % 2 else "cat") for i in range(10)])
    with pytest.raises(DataError) as error:
        PromptDataset(path, max_bad_rows=0.4)
    assert str(error.value) == (
        f"{path}: 5 of 10 rows can not be used, and data.max_bad_rows allows a share of 0.4: a.parquet row 1: there is "
        "no ground truth; a.parquet row 3: there is no ground truth; a.parquet row 5: there is no ground truth; "
        "and 2 more"
    )
    assert len(PromptDataset(path, max_bad_rows=0.5)) == 5


def test_nothing_usable_is_an_error_at_any_share(tmp_path):
    with pytest.raises(DataError, match="1 of 1 rows"):
        PromptDataset(write(tmp_path / "a.parquet", [row(truth="")]), max_bad_rows=1.0)


@pytest.mark.parametrize("kind", ["missing", "empty folder", "no rows", "cold start", "no parquet", "cut"])
def test_unreadable_paths_are_one_line(tmp_path, kind):
    path = tmp_path / "a.parquet"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "no rows":
        write(path, [], RL_SCHEMA)
    elif kind == "cold start":
        write(path, [{"messages": "[]", "images": ["x"]}])
    elif kind == "no parquet":
        path.write_text("text")
    elif kind == "cut":
        write(path, [row()])
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError) as error:
        PromptDataset(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_image_that_breaks_in_the_middle_is_found_when_it_is_read(tmp_path):
    # Checksums and end are right, so opening does not see it; its pixels can not be unpacked.
    start = PNG.index(b"IDAT")
    length = int.from_bytes(PNG[start - 4 : start], "big")
    body = b"IDAT" + bytes(length)
    broken = PNG[:start] + body + zlib.crc32(body).to_bytes(4, "big") + PNG[start + 8 + length :]
    check_file(broken)
    dataset = PromptDataset(write(tmp_path / "a.parquet", [row(), row(images=[broken])]))
    assert len(dataset) == 2 and not dataset.report.bad
    with pytest.raises(BadRowError, match="a.parquet row 1: image 1 can not be decoded") as error:
        dataset[1]
    assert pickle.loads(pickle.dumps(error.value)).bad == error.value.bad


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_found_without_decoding_the_whole_data(kind):
    whole = picture(kind, (64, 48))
    check_file(whole)
    check_pixels(whole)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            check_file(whole[: int(len(whole) * share)])


def test_bytes_behind_the_end_do_no_harm():
    for data in (JPEG + b"\0" * 64, PNG + b"tail"):
        check_file(data)
        check_pixels(data)


def test_image_cells():
    text = base64.b64encode(PNG).decode()
    for cell in (PNG, {"bytes": PNG, "path": None}, text, f"data:image/png;base64,{text}", list(PNG)):
        assert file_in_cell(cell) == PNG
    for cell in (None, 3, {"path": "a.png"}, "not base64!", [300], ["x"], b"", ""):
        with pytest.raises(ImageError):
            file_in_cell(cell)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr("hdpo_jax.data.images.MAX_PIXELS", 1_000)
    with pytest.raises(ImageError, match="40 x 30 pixels; at most 1,000"):
        check_file(PNG)


def test_programs_are_not_started_for_an_image():
    # Pillow would hand this to Ghostscript.
    with pytest.raises(ImageError, match="no image that can be read"):
        check_file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_rows_are_held_a_few_groups_at_a_time(tmp_path):
    path = write(tmp_path / "a.parquet", [{"n": i, "data": bytes(10_000)} for i in range(40)], row_group_size=4)
    rows = ParquetRows(path, ("n", "data"), cache_bytes=100_000)
    order = np.random.default_rng(0).permutation(40).tolist()
    assert [rows[i]["n"] for i in order] == order
    assert len(rows._tables) == 2
    with pytest.raises(IndexError):
        rows[40]


def test_a_copy_for_another_process_carries_no_data(tmp_path):
    path = write(tmp_path / "a.parquet", [row(images=[picture(size=(200, 200))]) for _ in range(4)])
    dataset = PromptDataset(path)
    copy = pickle.dumps(dataset)
    assert len(copy) < 5_000
    assert pickle.loads(copy)[2] == dataset[2]


def test_progress_is_told(tmp_path):
    seen = []
    PromptDataset(write(tmp_path / "a.parquet", [row()] * 5), progress=lambda done, all: seen.append((done, all)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_opening_checks_images_without_decoding_them(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [row(images=[picture("JPEG", (1_200, 900))])] * 3)
    decoded = []
    monkeypatch.setattr("hdpo_jax.data.dataset.check_pixels", decoded.append)
    monkeypatch.setattr("hdpo_jax.data.images.check_pixels", decoded.append)
    dataset = PromptDataset(path)
    assert len(decoded) == 0
    assert dataset[0].images == dataset[0].images
    assert len(decoded) == 1  # on the first read, and only then
