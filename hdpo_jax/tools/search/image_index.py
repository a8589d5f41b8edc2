"""Images on this machine, found by what they look like; thumbnails are kept inside the index."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdpo_jax.data.rows import DataError
from hdpo_jax.tools.protocol import Subject
from hdpo_jax.tools.search.documents import LeftOut
from hdpo_jax.tools.search.fingerprints import CUTS, NEAR, WHOLE, WORDS, distances, fingerprints
from hdpo_jax.tools.search.index_file import IndexFile, writing
from hdpo_jax.tools.search.results import LINK_CHARS, TITLE_CHARS, ImageMatch, SearchError, printable
from hdpo_jax.tools.search.thumbnails import as_jpeg, picture, shrunk

KIND = 0x4844494D
"""SQLite's application id of these files: "HDIM"."""
THUMBNAIL = 512
"""Longest side of what is kept of an image."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
METADATA = "metadata.jsonl"
TITLE, FILE, LINK = ("title", "text", "caption"), ("file", "file_name"), ("url", "link")
SCHEMA = "CREATE TABLE images (id INTEGER PRIMARY KEY, title TEXT, link TEXT, fingerprints BLOB, thumbnail BLOB)"
AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class Described:
    title: str
    link: str = ""


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, by name. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; expected one of image files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no images; expected files that end in {', '.join(sorted(SUFFIXES))}")
    return found


def index_images(
    folder: Path, output: Path, advance: Callable[[int], object] = lambda count: None
) -> tuple[int, LeftOut]:
    """Writes the index of a folder's images; returns how many it holds and what was left out.

    `advance` is told of images read. Raises DataError where nothing is left.
    """
    left_out, files = LeftOut(), image_files(folder)
    described = _described(folder / METADATA, left_out)
    count = 0
    with writing(output, KIND) as connection, ThreadPoolExecutor(os.cpu_count()) as pool:
        connection.execute(SCHEMA)
        for path, outcome in _prepared(pool, files):
            advance(1)
            if isinstance(outcome, str):
                left_out.add(str(path), outcome)
                continue
            count += 1
            about = described.get(path.relative_to(folder).as_posix()) or Described(title=_from_name(path))
            connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (count, about.title, about.link, *outcome))
        if count == 0:
            raise DataError(f"no image in {folder} can be indexed: {left_out}")
    return count, left_out


class ImageIndex:
    """The images of an index. Threads may share it."""

    def __init__(self, path: str, setting: str = "tools.image_search.path"):
        """Raises ConfigError, one line, where `path` is no such index."""
        self._file = IndexFile(path, KIND, setting=setting, command="hdpo data index-images")
        with self._file.connection() as connection:
            rows = connection.execute("SELECT id, fingerprints FROM images ORDER BY id").fetchall()
        self._ids = [identity for identity, _ in rows]
        kept = np.frombuffer(b"".join(blob for _, blob in rows), "<u8")
        self._fingerprints = kept.reshape(-1, len(CUTS), WORDS)

    def search(self, subject: Subject, count: int) -> list[ImageMatch]:
        """The images that look like the prompt's first, the nearest first; none where none does."""
        if not subject.images:
            raise SearchError("the prompt has no image")
        try:
            looked_up = fingerprints(picture(subject.images[0]), [WHOLE])
        except ValueError as error:
            raise SearchError(f"the prompt's image can not be read: {error}") from error
        if looked_up is None:
            return []
        apart = distances(self._fingerprints, looked_up[0])
        nearest = [place for place in np.argsort(apart, kind="stable")[:count] if apart[place] <= NEAR]
        try:
            with self._file.connection() as connection:
                return [_match(connection, self._ids[place]) for place in nearest]
        except sqlite3.Error as error:
            raise SearchError(f"the index can not be read: {error}") from error

    def close(self) -> None:
        self._file.close()


def _match(connection: sqlite3.Connection, identity: int) -> ImageMatch:
    row = connection.execute("SELECT title, link, thumbnail FROM images WHERE id = ?", (identity,)).fetchone()
    title, link, thumbnail = row
    return ImageMatch(title=title, link=link, thumbnail=thumbnail)


def _prepared(pool: ThreadPoolExecutor, files: list[Path]) -> Iterator[tuple[Path, tuple[bytes, bytes] | str]]:
    """Each file with its fingerprints and thumbnail, or why it has none; a few at a time are in memory."""
    for start in range(0, len(files), AT_A_TIME):
        part = files[start : start + AT_A_TIME]
        yield from zip(part, pool.map(_prepare, part), strict=True)


def _prepare(path: Path) -> tuple[bytes, bytes] | str:
    try:
        image = picture(path.read_bytes())
    except (OSError, ValueError) as error:
        return str(error)
    found = fingerprints(image)
    if found is None:
        return "all of one brightness: nothing to find it by"
    return found.tobytes(), as_jpeg(shrunk(image, THUMBNAIL))


def _described(path: Path, left_out: LeftOut) -> dict[str, Described]:
    """Titles and addresses by file name, from a folder's metadata.jsonl where there is one."""
    if not path.is_file():
        return {}
    found: dict[str, Described] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = _row(line)
            file, title = (next((row[name] for name in names if row.get(name)), None) for names in (FILE, TITLE))
            if isinstance(file, str) and isinstance(title, str):
                link = next((row[name] for name in LINK if row.get(name)), None)
                found[file] = Described(title=printable(title, TITLE_CHARS), link=printable(link, LINK_CHARS))
            elif line.strip():
                expected = '{"file": …, "title": …, "url": …}, url optional'
                left_out.add(f"{path}:{number}", f"names no file and title; expected {expected}")
    return found


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _from_name(path: Path) -> str:
    """A file's name as a title: "eiffel_tower-2.jpg" is "eiffel tower 2"."""
    words = "".join(" " if c in "_-." else c for c in path.stem)
    return printable(words, TITLE_CHARS) or "image"
