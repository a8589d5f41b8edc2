"""Image searches that come with a data set: their results, by the names that the data set gives its questions.

Two layouts:
    FILE.json           {KEY: {"tool_returned_web_title": [title], "cached_images_path": [path or null]}}; paths are
                        relative to the file's folder
    FOLDER/KEY/         meta.json: {"search_results": [{"title", "image_url"}]} or {"title_list", "image_urls"};
                        and img_000.jpg (or .jpeg, .png, .webp), img_001…: what the result of that number shows
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdpo_jax.config import ConfigError
from hdpo_jax.tools.protocol import Subject
from hdpo_jax.tools.search.results import TITLE_CHARS, ImageMatch, SearchError, printable

MAX_IMAGE = 32 * 2**20
"""Bytes of an image file."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SETTING = "tools.image_search.path"


def open_cache(path: str) -> "JsonCache | FolderCache":
    """The cache at `path`, whichever layout it has. Raises ConfigError, one line."""
    if not path:
        raise ConfigError(f"{SETTING} is ''; expected the image search cache of the data set: a JSON file, or a folder")
    place = Path(path)
    if place.is_dir():
        return FolderCache(place)
    if place.is_file():
        return JsonCache(place)
    raise ConfigError(f"{SETTING}: there is no file or folder {path}; expected an image search cache")


class JsonCache:
    """One JSON file for all questions."""

    def __init__(self, path: Path):
        """Raises ConfigError, one line, for what is no such file."""
        try:
            entries = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{SETTING}: {path} can not be read as JSON: {error}") from error
        if not isinstance(entries, dict):
            raise ConfigError(f"{SETTING}: {path} holds {type(entries).__name__}; expected an object: key -> results")
        self._entries: dict[str, Any] = entries
        self._folder = path.parent.resolve()

    def search(self, subject: Subject, count: int) -> list[ImageMatch]:
        entry = next((self._entries[key] for key in subject.keys if key in self._entries), None)
        if not isinstance(entry, dict):
            raise _unknown(subject)
        titles, paths = _list(entry, "tool_returned_web_title"), _list(entry, "cached_images_path")
        paths += [None] * (len(titles) - len(paths))
        return [
            ImageMatch(title=printable(title, TITLE_CHARS), thumbnail=_inside(self._folder, path))
            for title, path in zip(titles[:count], paths, strict=False)
        ]

    def close(self) -> None: ...


class FolderCache:
    """A folder for each question."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()

    def search(self, subject: Subject, count: int) -> list[ImageMatch]:
        for key in subject.keys:
            meta = _inside(self._folder, f"{key}/meta.json")
            if meta is not None:
                return self._matches(self._folder / key, meta, count)
        raise _unknown(subject)

    def close(self) -> None: ...

    def _matches(self, folder: Path, meta: bytes, count: int) -> list[ImageMatch]:
        try:
            entry = json.loads(meta)
        except (ValueError, RecursionError) as error:
            raise SearchError(f"{folder / 'meta.json'} can not be read as JSON: {error}") from error
        if not isinstance(entry, dict):
            raise SearchError(f"{folder / 'meta.json'} holds {type(entry).__name__}; expected an object")
        results = _list(entry, "search_results")
        titles = [result.get("title") for result in results if isinstance(result, dict)] or _list(entry, "title_list")
        return [
            ImageMatch(title=printable(title, TITLE_CHARS), thumbnail=self._image(folder, number))
            for number, title in enumerate(titles[:count])
        ]

    def _image(self, folder: Path, number: int) -> bytes | None:
        names = (str(folder / f"img_{number:03d}{suffix}") for suffix in SUFFIXES)
        return next((data for name in names if (data := _inside(self._folder, name)) is not None), None)


def _unknown(subject: Subject) -> SearchError:
    tried = ", ".join(map(repr, subject.keys)) or "none"
    return SearchError(f"the cache holds nothing for this prompt; its names, all tried: {printable(tried, 300)}")


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    found = entry.get(name)
    return list(found) if isinstance(found, list) else []


def _inside(folder: Path, path: object) -> bytes | None:
    """The bytes of a file in `folder`; None for one that is not there, is too large, or lies elsewhere.

    Data sets come from others: no path of theirs leads out, by "..", from the root or through a link.
    """
    if not isinstance(path, str):
        return None
    try:
        place = (folder / path).resolve()
        if not place.is_relative_to(folder) or not place.is_file() or place.stat().st_size > MAX_IMAGE:
            return None
        return place.read_bytes()
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return None
