import base64
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo_jax.config import ConfigError
from hdpo_jax.data.schemas import COLD_START_SCHEMA, IMAGE_MARK
from hdpo_jax.data.signs import (
    RL_SIGNS_SCHEMA,
    ColdStartPhase,
    SignsConfig,
    cold_start_texts,
    conversation,
    crop_box,
    is_held_out,
    known_code,
    places,
    render_board,
    write_signs,
)
from hdpo_jax.data.signs_families import DOTS, KNOWN_TOWNS, QUESTIONS, TOWN_HEADS, TOWN_TAILS
from hdpo_jax.data.signs_render import FONTS, dots_mask, text_mask

TOWNS = {*KNOWN_TOWNS, *(head + tail for head in TOWN_HEADS for tail in TOWN_TAILS)}

ALWAYS = ColdStartPhase(conversations=20, tool_share_legible=1.0, tool_share_illegible=1.0)
NEVER = ColdStartPhase(conversations=20, tool_share_legible=0.0, tool_share_illegible=0.0)
CONFIG = SignsConfig(cold_start=(ALWAYS, NEVER), train_boards=24, test_boards=20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_signs(tmp_path_factory.mktemp("signs"), CONFIG, seed=3)


def generator(index: int) -> np.random.Generator:
    return np.random.default_rng([7, index])


def center(plate):
    return ((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2)


@pytest.mark.parametrize("legible", [True, False])
def test_board_is_a_jpeg_of_a_configured_shape_with_its_plate_inside(legible):
    for index in range(12):
        board = render_board(generator(index), CONFIG, legible)
        image = Image.open(io.BytesIO(board.image))
        assert image.format == "JPEG" and image.size == board.size and board.size in CONFIG.shapes
        left, top, right, bottom = board.plate
        assert 0 <= left < right <= board.size[0] and 0 <= top < bottom <= board.size[1]
        assert board.legible is legible and len(board.inscription) == CONFIG.length
        if not legible:
            assert (right - left, bottom - top) == CONFIG.plate


def test_a_small_plate_stands_out_at_an_eighth_of_the_size():
    # The policy must find the plate on illegible boards too: darker than everything around it.
    for index in range(24):
        board = render_board(generator(index), CONFIG, False)
        image = Image.open(io.BytesIO(board.image)).convert("L")
        seen = np.asarray(image.resize((image.width // 8, image.height // 8), Image.Resampling.BICUBIC), float)
        left, top, right, bottom = (round(side / 8) for side in board.plate)
        plate = seen[top + 1 : bottom - 1, left + 1 : right - 1].mean()
        around = np.median(seen)
        assert around - plate > 20


def centered(mask: Image.Image, size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Image.Image:
    canvas = Image.new("L", size)
    canvas.paste(mask, ((size[0] - mask.width) // 2 + shift[0], (size[1] - mask.height) // 2 + shift[1]))
    return canvas


@pytest.mark.parametrize("font", FONTS)
def test_a_crop_shows_small_letters_as_the_reduced_view_shows_large_ones(font):
    small = np.asarray(centered(text_mask("AGX", font, 54 / 8), (32, 16)), float)
    large = text_mask("AGX", font, 54)
    likeness = [
        np.corrcoef(small.ravel(), np.asarray(reduced, float).ravel())[0, 1]
        for x in range(-8, 9, 2)
        for y in range(-8, 9, 2)
        for reduced in [centered(large, (256, 128), (x, y)).resize((32, 16), Image.Resampling.BICUBIC)]
    ]
    assert max(likeness) > 0.95


def test_small_letters_vanish_in_the_reduced_view():
    # Three letters shrink to about three grey pixels: different inscriptions differ by little of the full contrast.
    def reduced(text: str) -> np.ndarray:
        canvas = centered(text_mask(text, FONTS[0], 7.5), (64, 32))
        return np.asarray(canvas.resize((8, 4), Image.Resampling.BICUBIC), float) / 255

    assert max(np.abs(reduced(text) - reduced("AGX")).max() for text in ("MWZ", "XAG", "USE", "TTT")) < 0.25


def test_same_generator_same_board_and_different_ones_differ():
    first, again, other = (render_board(generator(index), CONFIG, True) for index in (0, 0, 1))
    assert first == again
    assert first.image != other.image


def test_crops_lie_in_the_middle_of_cells_and_hold_the_letters():
    for size in CONFIG.shapes:
        spots = places(size, CONFIG)
        assert len(spots) == (size[0] // 128) * (size[1] // 128)
        for x, y in spots:
            for off in (-CONFIG.jitter, CONFIG.jitter):
                left, top, right, bottom = crop_box((x + off, y + off), size, CONFIG)
                assert (left, top, right, bottom) == (x - 24, y - 8, x + 24, y + 8)
                assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
                # Three letters of 8 px take 38 x 8 px in the widest face.
                assert left <= x + off - 19 and x + off + 19 <= right
                assert top <= y + off - 4 and y + off + 4 <= bottom


def test_crops_of_small_signs_show_plate_and_letters_only():
    for index in range(12):
        board = render_board(generator(index), CONFIG, False)
        left, top, right, bottom = crop_box(center(board.plate), board.size, CONFIG)
        plate = board.plate
        assert plate[0] <= left and plate[1] <= top and right <= plate[2] and bottom <= plate[3]


def test_the_crop_shown_is_what_the_code_returns():
    for index in range(8):
        board = render_board(generator(index), CONFIG, False)
        messages, images = conversation(generator(index), board, ALWAYS, CONFIG)
        call = json.loads(messages[2]["content"].partition("<tool_call>")[2].removesuffix("</tool_call>"))
        assert call["name"] == "python"
        expected = eval(call["arguments"]["code"], {"image_1": Image.open(io.BytesIO(board.image))})
        shown = Image.open(io.BytesIO(images[1]))
        assert shown.format == "PNG"
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))
        assert sum(message["content"].count(IMAGE_MARK) for message in messages) == len(images) == 2
        assert messages[-1]["content"].endswith(f"<answer>{board.inscription}</answer>")


def test_direct_answers_are_right_on_legible_boards_and_guesses_on_illegible_ones():
    right = {True: 0, False: 0}
    for index in range(30):
        board = render_board(generator(index), CONFIG, index % 2 == 0)
        messages, images = conversation(generator(index), board, NEVER, CONFIG)
        assert len(messages) == 3 and len(images) == 1
        right[board.legible] += messages[-1]["content"].endswith(f"<answer>{board.inscription}</answer>")
    assert right == {True: 15, False: 0}


def test_misplaced_crops_miss_the_plate_and_a_guess_follows():
    phase = replace(ALWAYS, misplaced_share=1.0)
    for index in range(20):
        board = render_board(generator(index), CONFIG, index % 2 == 0)
        messages, _ = conversation(generator(index), board, phase, CONFIG)
        numbers = messages[2]["content"].partition("((")[2].partition("))")[0].split(", ")
        left, top, right, bottom = map(int, numbers)
        plate = board.plate
        assert left >= plate[2] or right <= plate[0] or top >= plate[3] or bottom <= plate[1]
        assert not messages[-1]["content"].endswith(f"<answer>{board.inscription}</answer>")


def test_which_asks_for_one_of_two_signs_by_its_color():
    config = replace(CONFIG, families=("which",))
    for index in range(16):
        board = render_board(generator(index), config, index % 2 == 0)
        asked, other = board.signs
        assert asked.color in board.question and other.color not in board.question
        assert board.inscription == asked.inscription and board.plate == asked.box
        assert asked.box[3] <= other.box[1] or other.box[3] <= asked.box[1]


def test_count_asks_for_the_dots_of_every_field():
    config = replace(CONFIG, families=("count",))
    seen = set()
    for index in range(16):
        board = render_board(generator(index), config, index % 2 == 0)
        assert len(board.inscription) == config.length and set(board.inscription) <= set(DOTS)
        seen |= set(board.inscription)
    assert seen == set(DOTS)


@pytest.mark.parametrize("height", [8.0, 54.0])
def test_a_field_holds_as_many_dots_as_it_says(height):
    # Equal discs that do not touch: the light that each digit adds is that digit times one dot's.
    def light(counts):
        return np.asarray(dots_mask(counts, height, generator(0)), float).sum() / 255

    one = light("1")
    assert one == pytest.approx(np.pi * (0.42 * height / 3) ** 2, rel=0.2)
    for counts in ("2", "6", "35", "416"):
        assert light(counts) == pytest.approx(one * sum(map(int, counts)), rel=0.05)
    for counts, ways in (("1", 1), ("2", 2), ("3", 2), ("4", 1), ("5", 1), ("6", 2)):
        masks = {dots_mask(counts, height, generator(index)).tobytes() for index in range(12)}
        assert len(masks) == ways


def test_facts_of_known_towns_never_change_and_others_can_not_be_known():
    config = replace(CONFIG, families=("facts",))
    codes: dict[bool, dict[str, set[str]]] = {True: {}, False: {}}
    for index in range(300):
        known = index % 2 == 0
        board = render_board(generator(index), replace(config, shapes=((384, 384),)), known, held_out=index % 4 == 1)
        (town,) = [
            word.strip("?.") for word in board.question.split() if word[0].isupper() and word.strip("?.") in TOWNS
        ]
        codes[known].setdefault(town, set()).add(board.inscription)
        assert (town in KNOWN_TOWNS) is known
        assert board.plate[2] - board.plate[0] == config.plate[0]  # small for all: it is knowledge that differs
    assert codes[True] == {town: {known_code(town, config)} for town in KNOWN_TOWNS}
    assert not any(is_held_out(code, config) for found in codes[True].values() for code in found)
    assert any(len(found) > 1 for found in codes[False].values())


def test_families_mix():
    families = {render_board(generator(i), replace(CONFIG, families=tuple(QUESTIONS)), True).family for i in range(40)}
    assert families == set(QUESTIONS)


def test_files_hold_the_schemas_and_the_configured_rows(files):
    assert [path.name for path in files.cold_start] == ["cold_start_0.parquet", "cold_start_1.parquet"]
    for path in files.cold_start:
        table = pq.read_table(path)
        assert table.schema.equals(COLD_START_SCHEMA) and table.num_rows == 20
    for path, count in ((files.train, 24), (files.test, 20)):
        table = pq.read_table(path)
        assert table.schema.equals(RL_SIGNS_SCHEMA) and table.num_rows == count
        rows = table.to_pylist()
        assert sum(row["extra_info"]["legible"] for row in rows) == count // 2
        assert [row["extra_info"]["index"] for row in rows] == list(range(count))
        assert all(row["prompt"][1]["content"].startswith(IMAGE_MARK) for row in rows)


def test_only_test_boards_show_held_out_inscriptions(files):
    for path, held_out in ((files.train, False), (files.test, True)):
        for row in pq.read_table(path).to_pylist():
            assert is_held_out(row["reward_model"]["ground_truth"], CONFIG) is held_out
    for path in files.cold_start:
        for row in pq.read_table(path).to_pylist():
            answer = json.loads(row["messages"])[-1]["content"].partition("<answer>")[2].removesuffix("</answer>")
            assert not is_held_out(answer, CONFIG)


def test_cold_start_images_are_base64_files(files):
    for row in pq.read_table(files.cold_start[0]).to_pylist():
        formats = [Image.open(io.BytesIO(base64.b64decode(image))).format for image in row["images"]]
        assert formats == ["JPEG", "PNG"]
    texts = list(cold_start_texts(files.cold_start))
    assert len(texts) == 20 * 5 + 20 * 3
    assert not any(IMAGE_MARK in text for text in texts)


def test_worker_processes_do_not_change_the_rows(files, tmp_path):
    heard = []
    config = replace(CONFIG, cold_start=(ALWAYS,))
    again = write_signs(tmp_path, config, seed=3, workers=1, advance=heard.append)
    assert sum(heard) == 20 + 24 + 20
    assert pq.read_table(again.cold_start[0]).equals(pq.read_table(files.cold_start[0]))
    assert pq.read_table(again.test).equals(pq.read_table(files.test))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cold_start_0.parquet", "test.parquet", "train.parquet"]


def test_another_seed_gives_other_boards(files, tmp_path):
    config = replace(CONFIG, cold_start=(replace(NEVER, conversations=1),), train_boards=8, test_boards=1)
    other = pq.read_table(write_signs(tmp_path, config, seed=4).train).to_pylist()
    known = {row["images"][0]["bytes"] for row in pq.read_table(files.train).to_pylist()}
    assert not known & {row["images"][0]["bytes"] for row in other}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("families", ("guess",), "read, which, count, facts"),
        ("letters", "AAB", "different capitals"),
        ("letters", "AB1", "different capitals"),
        ("shapes", ((256, 512),), "three cells"),
        ("held_out_share", 0.0, "between 0 and 1"),
        ("held_out_share", 1e-9, "both sides"),
        ("train_boards", 0, "at least 1"),
        ("legible_height", (60.0, 90.0), "3 letters fit"),
        ("illegible_height", (7.0, 11.0), "at most 9.8 px"),
    ],
)
def test_settings_that_make_no_task_are_refused(field, value, said):
    with pytest.raises(ConfigError, match=f"signs.{field} is .*{said}"):
        replace(CONFIG, **{field: value})
