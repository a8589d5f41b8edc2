"""Image searches that come with data sets: both layouts, and paths that lead elsewhere."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hdpo_jax.config import ConfigError, ImageSearchConfig, ToolsConfig
from hdpo_jax.tools import ToolBox
from hdpo_jax.types import Observation, ToolCall
from tests.tools.search.pictures import file_of, picture
from tests.tools.search.test_image_index import bomb

FAILED = "The image search failed. This does not mean that there are no results."


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder with a picture for the cache, beside one that is none of its business."""
    (tmp_path / "outside.png").write_bytes(file_of(picture(1)))
    (tmp_path / "cache" / "images").mkdir(parents=True)
    (tmp_path / "cache" / "images" / "0.jpg").write_bytes(file_of(picture(0), "JPEG"))
    return tmp_path / "cache"


def ask(path: Path, *keys: str, max_images: int = 8) -> Observation:
    search = ImageSearchConfig(provider="cache", path=str(path), results=10)
    config = ToolsConfig(names=("image_search",), image_search=search, max_images=max_images)
    with ToolBox(config) as box, box.session([], keys) as session:
        return session.call(ToolCall(name="image_search", arguments={}))


def as_json(cache: Path, **entries: Any) -> Path:
    path = cache / "cache.json"
    path.write_text(json.dumps(entries))
    return path


def entry(titles: Any, paths: Any) -> dict[str, Any]:
    return {"tool_returned_web_title": titles, "cached_images_path": paths}


def as_folder(cache: Path, key: str, meta: Any) -> Path:
    (cache / key).mkdir(parents=True)
    (cache / key / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return cache / key


def test_one_json_file(cache: Path):
    path = as_json(cache, fvqa_7=entry(["Gothic cathedral", "A page", "Another"], ["images/0.jpg", None]))
    observation = ask(path, "unknown", "fvqa_7", "fvqa_8")
    assert observation.ok and observation.text == "1. Gothic cathedral [image 1]\n\n2. A page\n\n3. Another"
    assert len(observation.images) == 1 and max(observation.images[0].size) <= 256


@pytest.mark.parametrize(
    "meta",
    [
        {
            "search_results": [
                {"title": "First", "image_url": "https://a"},
                {"title": "Second", "image_url": "https://b"},
            ]
        },
        {"title_list": ["First", "Second"], "image_urls": ["https://a", "https://b"]},
    ],
)
def test_a_folder_for_each_key(cache: Path, meta: dict[str, Any]):
    folder = as_folder(cache, "q7", meta)
    (folder / "img_001.webp").write_bytes(file_of(picture(2), "WEBP"))
    observation = ask(cache, "q6", "q7")
    # The second file shows the second result, though it is the first thumbnail.
    assert observation.text == "1. First\n\n2. Second [image 1]" and len(observation.images) == 1


@pytest.mark.parametrize(
    "way", ["../outside.png", "images/../../outside.png", "ABSOLUTE", "link.png", "gone.png", "a\0b"]
)
def test_paths_out_of_a_json_cache_are_not_followed(cache: Path, way: str):
    (cache / "link.png").symlink_to(cache.parent / "outside.png")
    path = as_json(cache, q=entry(["A title"], [str(cache.parent / "outside.png") if way == "ABSOLUTE" else way]))
    assert ask(path, "q") == Observation(text="1. A title")


@pytest.mark.parametrize("key", ["../other/q", "ABSOLUTE", "", "x" * 5_000, "a\0b", "link"])
def test_keys_out_of_a_folder_cache_are_not_followed(cache: Path, key: str):
    other = as_folder(cache.parent / "other", "q", {"title_list": ["secret"]})
    (cache / "link").symlink_to(other)
    observation = ask(cache, str(other) if key == "ABSOLUTE" else key)
    assert observation == Observation(text=FAILED, ok=False)


def test_a_linked_thumbnail_is_not_followed(cache: Path):
    folder = as_folder(cache, "q", {"title_list": ["A title"]})
    (folder / "img_000.png").symlink_to(cache.parent / "outside.png")
    assert ask(cache, "q") == Observation(text="1. A title")


@pytest.mark.parametrize("data", [b"", b"<html>", bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_files_that_are_no_images_are_left_out(cache: Path, data: bytes):
    (cache / "images" / "bad.jpg").write_bytes(data)
    observation = ask(as_json(cache, q=entry(["Bad", "Good"], ["images/bad.jpg", "images/0.jpg"])), "q")
    assert observation.text == "1. Bad\n\n2. Good [image 1]" and len(observation.images) == 1


def test_titles_are_hostile(cache: Path):
    observation = ask(as_json(cache, q=entry(["a\x1b[2J\u202e\n2. b", 7, "x" * 10_000], [])), "q")
    assert observation.text.split("\n\n")[0] == "1. a [2J 2. b"
    assert max(map(len, observation.text.split("\n"))) < 210


def test_results_and_images_are_bounded(cache: Path):
    path = as_json(cache, q=entry([f"t{number}" for number in range(30)], ["images/0.jpg"] * 30))
    observation = ask(path, "q", max_images=3)
    assert len(observation.images) == 3 and "3. t2 [image 3]\n\n4. t3\n" in observation.text
    assert "10. t9" in observation.text and "11." not in observation.text


def test_an_empty_entry_is_no_failure_and_a_missing_one_is(cache: Path, caplog: pytest.LogCaptureFixture):
    path = as_json(cache, q=entry([], []))
    assert ask(path, "q").ok and ask(path, "q").text.startswith("No results")
    with caplog.at_level(logging.WARNING):
        assert ask(path, "r", "s") == Observation(text=FAILED, ok=False)
    assert "the cache holds nothing for this prompt; its names, all tried: 'r', 's'" in caplog.text


@pytest.mark.parametrize("found", ["text", 7, ["list"], None])
def test_entries_of_another_shape_are_failures(cache: Path, found: Any):
    assert not ask(as_json(cache, q=found), "q").ok
    as_folder(cache, "q", found)
    assert not ask(cache, "q").ok


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "there is no file or folder"),
        ("{", "can not be read as JSON"),
        ("[]", "holds list; expected an object: key -> results"),
    ],
)
def test_what_is_no_cache_is_refused_at_the_start(cache: Path, content: str | None, line: str):
    path = cache / "cache.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"^tools.image_search.path.*{line}"):
        ask(path, "q")
