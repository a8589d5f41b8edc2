"""The index of images: what still counts as the same image, what does not, and files that are no images."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdpo_jax.config import ConfigError, ImageSearchConfig, ToolsConfig
from hdpo_jax.data.rows import DataError
from hdpo_jax.tools import Subject, ToolBox
from hdpo_jax.tools.search.fingerprints import NEAR, WHOLE, distances, fingerprints
from hdpo_jax.tools.search.image_index import ImageIndex, index_images
from hdpo_jax.tools.search.results import SearchError
from hdpo_jax.tools.search.text_index import write_index
from hdpo_jax.types import Observation, ToolCall
from tests.tools.search.pictures import cut, file_of, picture
from tests.tools.search.test_text_index import LIBRARY

Change = Callable[[Image.Image], bytes]

COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(COUNT):
        (folder / f"the_picture-{seed}.png").write_bytes(file_of(picture(seed)))
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file": "the_picture-3.png", "title": "Third\n\u202epicture", "url": "https://example.org/3"})
        + "\n\nnonsense\n"
        + json.dumps({"file_name": "the_picture-4.png", "text": "Fourth picture"})
    )
    return folder


@pytest.fixture(scope="module")
def index_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "images.sqlite"
    count, left_out = index_images(folder, path)
    assert count == COUNT and left_out.count == 1 and "metadata.jsonl:3: names no file and title" in left_out.named[0]
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda image: file_of(image, "JPEG", quality=30),
        lambda image: file_of(image.resize((image.width // 2, image.height // 2))),
        lambda image: file_of(image.resize((3 * image.width, 3 * image.height)), "JPEG"),
        lambda image: file_of(image.resize((image.width, int(0.8 * image.height)))),
        lambda image: file_of(image.convert("L")),
        lambda image: file_of(image.point([min(255, int(1.2 * level + 10)) for level in range(256)] * 3)),
        lambda image: file_of(cut(image, 0.03, 0.03, 0.03, 0.03)),
        lambda image: file_of(cut(image, 0.08, 0.08, 0.08, 0.08), "JPEG", quality=40),
        lambda image: file_of(cut(image, 0.1, 0, 0, 0)),
        lambda image: file_of(cut(image, 0, 0, 0, 0.07)),
        lambda image: file_of(cut(image, 0.05, 0.05, 0, 0)),
    ],
    ids=[
        "jpeg",
        "half",
        "thrice",
        "stretched",
        "grey",
        "brighter",
        "cut3",
        "cut8+jpeg",
        "left10",
        "bottom7",
        "corner5",
    ],
)
def test_the_same_image_in_another_file_is_found(index_path: Path, change: Change):
    index = ImageIndex(str(index_path))
    found = [index.search(Subject(images=[change(picture(seed))]), 10) for seed in range(0, COUNT, 3)]
    # Nothing else is ever near enough: one match each.
    assert [[match.title for match in matches] for matches in found] == [
        ["Third picture" if seed == 3 else f"the picture {seed}"] for seed in range(0, COUNT, 3)
    ]
    index.close()


def test_another_image_is_not_found(index_path: Path):
    index = ImageIndex(str(index_path))
    assert all(index.search(Subject(images=[file_of(picture(seed))]), 10) == [] for seed in range(COUNT, 2 * COUNT))
    index.close()


def test_the_nearest_comes_first(tmp_path: Path):
    (tmp_path / "images").mkdir()
    original = picture(0)
    (tmp_path / "images" / "a cut.png").write_bytes(file_of(cut(original, 0.02, 0, 0.02, 0)))
    (tmp_path / "images" / "b same.png").write_bytes(file_of(original))
    index_images(tmp_path / "images", tmp_path / "i.sqlite")
    index = ImageIndex(str(tmp_path / "i.sqlite"))
    subject = Subject(images=[file_of(original, "JPEG")])
    assert [match.title for match in index.search(subject, 10)] == ["b same", "a cut"]
    assert [match.title for match in index.search(subject, 1)] == ["b same"]
    index.close()


def test_an_image_of_one_colour_is_like_nothing(tmp_path: Path):
    white = Image.new("RGB", (100, 100), "white")
    assert fingerprints(white) is None
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "white.png").write_bytes(file_of(white))
    (tmp_path / "images" / "picture.png").write_bytes(file_of(picture(0)))
    count, left_out = index_images(tmp_path / "images", tmp_path / "i.sqlite")
    assert count == 1 and "white.png: all of one brightness" in left_out.named[0]
    index = ImageIndex(str(tmp_path / "i.sqlite"))
    assert index.search(Subject(images=[file_of(white)]), 10) == []
    index.close()


def test_distances_count_bits():
    kept = np.array([[[0, 0], [7, 0]], [[2**63, 1], [0, 2**64 - 1]]], np.uint64)
    # The nearest of a row's fingerprints: 3 bits from (7, 0), 2 from (2^63, 1).
    assert distances(kept, np.array([0, 0], np.uint64)).tolist() == [0, 2]
    assert distances(kept, np.array([7, 7], np.uint64)).tolist() == [3, 6]


def test_fingerprints_of_different_images_are_far_apart():
    prints = [fingerprints(picture(seed), [WHOLE]) for seed in range(40)]
    kept = np.stack([each for each in prints if each is not None])
    apart = np.stack([distances(kept, each[0]) for each in kept])
    assert (apart + 128 * np.eye(40)).min() > NEAR + 5


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1_000)) + chunk(b"IEND", b"")


def test_files_that_are_no_images_are_named(tmp_path: Path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "bomb.png").write_bytes(bomb())
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.webp").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (images / "half.png").write_bytes(file_of(picture(1))[:5_000])
    (images / "deep" / "fine.PNG").write_bytes(file_of(picture(0)))
    (images / "notes.txt").write_text("none of these")
    advanced: list[int] = []
    count, left_out = index_images(images, tmp_path / "i.sqlite", advanced.append)
    assert (count, left_out.count, sum(advanced)) == (1, 4, 5)
    assert "bomb.png: the file is too large" in str(left_out)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "holds no images; expected files that end in .bmp, .gif"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"x")), "can be indexed: .*a.png: the file is"),
    ],
)
def test_nothing_to_index_writes_nothing(make: Callable[[Path], object], line: str, tmp_path: Path):
    make(tmp_path / "images")
    with pytest.raises(DataError, match=line):
        index_images(tmp_path / "images", tmp_path / "i.sqlite")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".sqlite"]


def ask(subject: Subject, path: Path, thumbnail: int = 256) -> Observation:
    config = ToolsConfig(names=("image_search",), image_search=ImageSearchConfig(path=str(path), thumbnail=thumbnail))
    with ToolBox(config) as box, box.session(subject.images, subject.keys) as session:
        return session.call(ToolCall(name="image_search", arguments={}))


def test_the_tool_shows_titles_and_thumbnails(index_path: Path):
    observation = ask(Subject(images=[file_of(picture(3), "JPEG")]), index_path, thumbnail=64)
    assert observation.ok and observation.text == "1. Third picture [image 1]\nhttps://example.org/3"
    (thumbnail,) = observation.images
    assert max(thumbnail.size) == 64 and thumbnail.mode == "RGB"


def test_of_several_images_the_first_is_looked_up_and_the_policy_is_told(index_path: Path):
    observation = ask(Subject(images=[file_of(picture(4)), file_of(picture(3))]), index_path)
    assert observation.text == "The first of the prompt's 2 images was looked up.\n\n1. Fourth picture [image 1]"


def test_nothing_alike_is_not_a_failure(index_path: Path):
    observation = ask(Subject(images=[file_of(picture(999))]), index_path)
    assert observation == Observation(text="No results: nothing is known that looks like the image.")


@pytest.mark.parametrize("images", [[], [b"no image"], [bomb()]])
def test_an_image_that_can_not_be_looked_up_is_a_failure(index_path: Path, images: list[bytes]):
    observation = ask(Subject(images=images), index_path)
    assert observation == Observation(
        text="The image search failed. This does not mean that there are no results.", ok=False
    )
    with pytest.raises(SearchError, match="the prompt"):
        ImageIndex(str(index_path)).search(Subject(images=images), 10)


def test_an_index_of_texts_is_none_of_images(tmp_path: Path):
    write_index(tmp_path / "texts.sqlite", LIBRARY)
    with pytest.raises(ConfigError, match="another kind of file; expected one that `hdpo data index-images` wrote"):
        ask(Subject(), tmp_path / "texts.sqlite")
