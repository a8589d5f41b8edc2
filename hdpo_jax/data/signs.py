"""The built-in task: read the sign on a board. About half of the boards need the zoom tool.

Legible inscriptions are large enough to survive the policy's reduced view; illegible ones are not, but a crop at
full resolution shows them at the size that legible ones have in the reduced view, so one reading skill serves both.
"""

import base64
import functools
import io
import itertools
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hdpo_jax.data.schemas import COLD_START_SCHEMA, IMAGE_MARK, rl_schema
from hdpo_jax.data.signs_config import ColdStartPhase, SignsConfig, is_held_out
from hdpo_jax.data.signs_families import KNOWN_TOWNS, QUESTIONS, TOWN_HEADS, TOWN_TAILS
from hdpo_jax.data.signs_render import (
    PLATE_COLORS,
    Box,
    Sign,
    add_noise,
    jpeg,
    paint_background,
    paint_sign,
)
from hdpo_jax.files import replacing

SYSTEM_PROMPT = (
    "Answer the question accurately with as few tool calls as needed. "
    "The tool python runs code; image_1 is the full image. "
    "Write <reason>...</reason>, then either "
    '<tool_call>{"name": "python", "arguments": {"code": "..."}}</tool_call> or <answer>...</answer>.'
)
OBSERVATION_TEXT = ""
"""What the `python` tool prints for a crop: nothing; the image is the observation."""

READ_DIRECTLY = ("read it as it is", "no closer look is needed")
LOOK_CLOSER = ("zoom in on the sign", "take a closer look")
READ_CROP = ("read it from the crop", "the crop shows the text")
"""Reasons. None of them says whether the board is legible: that is for the policy to find out."""

RL_SIGNS_SCHEMA = rl_schema(extra={"legible": pa.bool_(), "family": pa.string(), "plate": pa.list_(pa.int32())})

_ROW_GROUP = 16  # readers pick rows at random and decode a whole group for each


@dataclass(frozen=True, kw_only=True)
class Board:
    """A picture with signs, a question about one of them, and the truth."""

    image: bytes
    """A JPEG file."""
    size: tuple[int, int]
    family: str
    question: str
    inscription: str
    """What the sign in question says: the right answer."""
    plate: Box
    """Where it is."""
    signs: tuple[Sign, ...]
    legible: bool
    """Whether the question can be answered without a tool: the inscription survives the policy's reduced view, or
    (family facts) can be known by heart."""


class SignsFiles(NamedTuple):
    """The files that `write_signs` wrote."""

    cold_start: tuple[Path, ...]
    train: Path
    test: Path


def draw_inscription(rng: np.random.Generator, config: SignsConfig, *, family: str, held_out: bool) -> str:
    alphabet = config.alphabet(family)
    while True:
        text = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=config.length))
        if is_held_out(text, config) == held_out:
            return text


def known_code(town: str, config: SignsConfig) -> str:
    """The code of one of KNOWN_TOWNS: the same for every seed, on training and on test boards."""
    rng = np.random.default_rng(zlib.crc32(town.encode()))
    return draw_inscription(rng, config, family="facts", held_out=False)


def places(size: tuple[int, int], config: SignsConfig) -> list[tuple[int, int]]:
    """The middles of the cells of a board of this size, x and y, row by row."""
    half = config.cell // 2
    columns, rows = size[0] // config.cell, size[1] // config.cell
    return [(half + config.cell * column, half + config.cell * row) for row in range(rows) for column in range(columns)]


def render_board(rng: np.random.Generator, config: SignsConfig, legible: bool, *, held_out: bool = False) -> Board:
    """Draws a board, its inscriptions from the held-out or from the training set, but for the codes of known towns."""
    size = config.shapes[rng.integers(len(config.shapes))]
    family = config.families[rng.integers(len(config.families))]
    image = paint_background(rng, size)

    count = 2 if family == "which" else 1
    colors = rng.permutation(list(PLATE_COLORS))[:count].tolist()
    large = legible and family != "facts"
    town = _draw_town(rng, known=legible) if family == "facts" else ""
    reduction = np.mean(config.legible_height) / np.mean(config.illegible_height) if large else 1.0
    draw = functools.partial(draw_inscription, config=config, family=family, held_out=held_out)
    signs = []
    for color, place in zip(colors, _spread_places(rng, size, config, count, large), strict=True):
        x, y = np.rint(place + reduction * rng.uniform(-config.jitter, config.jitter, 2)).astype(int).tolist()
        sign = paint_sign(
            image,
            rng,
            text=known_code(town, config) if town in KNOWN_TOWNS else draw(rng),
            dots=family == "count",
            color=color,
            center=(x, y),
            height=rng.uniform(*(config.legible_height if large else config.illegible_height)),
            plate=None if large else config.plate,
            contrast=rng.uniform(*config.contrast),
        )
        signs.append(sign)
    image = add_noise(image, rng, config.noise)

    asked = signs[0]
    question = QUESTIONS[family][rng.integers(len(QUESTIONS[family]))].format(color=asked.color, town=town)
    return Board(
        image=jpeg(image, config.quality),
        size=size,
        family=family,
        question=question,
        inscription=asked.inscription,
        plate=asked.box,
        signs=tuple(signs),
        legible=legible,
    )


def _draw_town(rng: np.random.Generator, *, known: bool) -> str:
    if known:
        return KNOWN_TOWNS[rng.integers(len(KNOWN_TOWNS))]
    return TOWN_HEADS[rng.integers(len(TOWN_HEADS))] + TOWN_TAILS[rng.integers(len(TOWN_TAILS))]


def _spread_places(
    rng: np.random.Generator, size: tuple[int, int], config: SignsConfig, count: int, large: bool
) -> list[tuple[int, int]]:
    """`count` places whose signs can not touch: large plates are wider than a cell, and nearly as high."""
    spots = places(size, config)
    if large:  # the outer columns have no room for large plates
        outer = (spots[0][0], spots[-1][0])
        spots = [spot for spot in spots if spot[0] not in outer]
    while True:
        chosen = [spots[index] for index in rng.choice(len(spots), size=count, replace=False)]
        if all(abs(one[1] - other[1]) > config.cell for one, other in itertools.combinations(chosen, 2)):
            return chosen


def crop_box(center: tuple[float, float], size: tuple[int, int], config: SignsConfig) -> Box:
    """The crop in the middle of the cell that is nearest to a point of a board of this size."""
    x, y = min(places(size, config), key=lambda place: (place[0] - center[0]) ** 2 + (place[1] - center[1]) ** 2)
    left, top = x - config.crop[0] // 2, y - config.crop[1] // 2
    return (left, top, left + config.crop[0], top + config.crop[1])


def _misplaced_box(rng: np.random.Generator, board: Board, config: SignsConfig) -> Box:
    """A crop somewhere that shows nothing of the sign in question."""
    left, top, right, bottom = board.plate
    boxes = [crop_box(place, board.size, config) for place in places(board.size, config)]
    apart = [box for box in boxes if box[0] >= right or box[2] <= left or box[1] >= bottom or box[3] <= top]
    return apart[rng.integers(len(apart))]


def prompt_messages(board: Board) -> list[dict[str, str]]:
    """The system and the user message of a board."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": IMAGE_MARK + board.question},
    ]


def conversation(
    rng: np.random.Generator, board: Board, phase: ColdStartPhase, config: SignsConfig
) -> tuple[list[dict[str, str]], list[bytes]]:
    """A cold-start conversation about a board: messages, and the image files in the order of their marks.

    The crop is what the code in the call returns for the decoded JPEG, as the sandbox would.
    """
    messages, images = prompt_messages(board), [board.image]
    called = rng.random() < (phase.tool_share_legible if board.legible else phase.tool_share_illegible)
    misplaced = called and rng.random() < phase.misplaced_share
    if called:
        middle = ((board.plate[0] + board.plate[2]) / 2, (board.plate[1] + board.plate[3]) / 2)
        box = _misplaced_box(rng, board, config) if misplaced else crop_box(middle, board.size, config)
        call = json.dumps({"name": "python", "arguments": {"code": f"image_1.crop({box})"}})
        text = f"<reason>{_pick(rng, LOOK_CLOSER)}</reason><tool_call>{call}</tool_call>"
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": IMAGE_MARK + OBSERVATION_TEXT})
        images.append(_png(Image.open(io.BytesIO(board.image)).crop(box)))
    guessed = misplaced or not (board.legible or called)
    answer = draw_inscription(rng, config, family=board.family, held_out=False) if guessed else board.inscription
    reason = _pick(rng, READ_CROP if called else READ_DIRECTLY)
    messages.append({"role": "assistant", "content": f"<reason>{reason}</reason><answer>{answer}</answer>"})
    return messages, images


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_signs(
    directory: str | Path,
    config: SignsConfig,
    *,
    seed: int,
    workers: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> SignsFiles:
    """Writes the cold-start phases, the training prompts and the test prompts as parquet files.

    The same seed gives the same rows, whatever `workers` is: processes that draw boards, 0 for this one.
    `advance` hears how many rows were written since it was last called.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    cold_start = tuple(directory / f"cold_start_{index}.parquet" for index in range(len(config.cold_start)))
    files = SignsFiles(cold_start, directory / "train.parquet", directory / "test.parquet")
    jobs: list[tuple[Path, int, ColdStartPhase | None]] = [
        *((path, phase.conversations, phase) for path, phase in zip(cold_start, config.cold_start, strict=True)),
        (files.train, config.train_boards, None),
        (files.test, config.test_boards, None),
    ]
    # Fresh interpreters: forking a process that holds JAX's threads can deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers else None
    try:
        for path, count, phase in jobs:
            rows = functools.partial(_rows, config, seed, path.stem, phase)
            starts = range(0, count, _ROW_GROUP)
            groups = (range(start, min(start + _ROW_GROUP, count)) for start in starts)
            tables = pool.map(rows, groups) if pool else map(rows, groups)
            schema = COLD_START_SCHEMA if phase else RL_SIGNS_SCHEMA
            _write_parquet(path, schema, tables, advance)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return files


def _write_parquet(
    path: Path, schema: pa.Schema, groups: Iterable[list[dict[str, Any]]], advance: Callable[[int], None]
) -> None:
    with replacing(path) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            advance(len(rows))


def _rows(
    config: SignsConfig, seed: int, name: str, phase: ColdStartPhase | None, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of the file called `name`. Each has its own generator, so rows do not depend on who draws them."""
    rows = []
    for index in indices:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
        # Exactly the share of legible boards, evenly spread over the file.
        legible = int((index + 1) * config.legible_share) > int(index * config.legible_share)
        board = render_board(rng, config, legible, held_out=name == "test")
        if phase is None:
            rows.append(_prompt_row(index, board))
        else:
            messages, images = conversation(rng, board, phase, config)
            encoded = [base64.b64encode(image).decode() for image in images]
            rows.append({"messages": json.dumps(messages), "images": encoded})
    return rows


def _prompt_row(index: int, board: Board) -> dict[str, Any]:
    extra = {"index": index, "legible": board.legible, "family": board.family, "plate": list(board.plate)}
    return {
        "data_source": "signs",
        "prompt": prompt_messages(board),
        "images": [{"bytes": board.image}],
        "reward_model": {"ground_truth": board.inscription},
        "extra_info": extra,
    }


def cold_start_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Every message of cold-start files, without its image marks: what a tokenizer for the task is trained on."""
    for path in paths:
        for messages in pq.read_table(path, columns=["messages"])["messages"].to_pylist():
            for message in json.loads(messages):
                yield message["content"].replace(IMAGE_MARK, "")
