"""Documents to index: JSON lines, one document each, read one after another however large the files are."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpo_jax.data.rows import DataError
from hdpo_jax.tools.results import encodable
from hdpo_jax.tools.search.results import LINK_CHARS, TITLE_CHARS, printable

TEXT, TITLE, LINK = ("text", "contents", "content", "body"), ("title", "name"), ("url", "link")
"""Names that a document's parts may have, in the order in which they are looked for."""
EXPECTED = '{"title": …, "text": …, "url": …} (text may be called contents, content or body, url also link)'
SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE = 64 * 2**20
"""Bytes; a longer line is left out without being held in memory."""
NAMED = 5
"""Lines left out of which the place and the reason are told."""


@dataclass(frozen=True, kw_only=True)
class Document:
    title: str
    link: str
    text: str


@dataclass(kw_only=True)
class LeftOut:
    """What could not be used: how much, and where the first of it stands."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{place}: {reason}")

    def __str__(self) -> str:
        more = self.count - len(self.named)
        return "; ".join([*self.named, *([f"and {more:,} more"] if more else [])])


def document_files(path: Path) -> list[Path]:
    """The file itself, or the JSON lines files of a folder and its subfolders, by name. Raises DataError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}; expected JSON lines: {EXPECTED}")
    found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if not found:
        raise DataError(f"{path} holds no {' and no '.join(SUFFIXES)} files; expected JSON lines: {EXPECTED}")
    return found


def read_documents(
    files: Sequence[Path], left_out: LeftOut, advance: Callable[[int], object] = lambda count: None
) -> Iterator[Document]:
    """The documents of all files; lines that hold none are added to `left_out`.

    `advance` is told how many bytes of the files (as they are on disk) were read since it was last told.
    """
    for path in files:
        with path.open("rb") as raw:
            told = 0
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            number = 0
            try:
                while line := lines.readline(MAX_LINE):
                    number += 1
                    place = f"{path}:{number}"
                    if not line.endswith(b"\n") and len(line) == MAX_LINE:
                        left_out.add(place, f"a line of more than {MAX_LINE:,} bytes")
                        while (rest := lines.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                            pass
                    elif line.strip():
                        parsed = _document(line)
                        if isinstance(parsed, Document):
                            yield parsed
                        else:
                            left_out.add(place, parsed)
                    if number % 64 == 0:
                        advance(raw.tell() - told)
                        told = raw.tell()
            except (gzip.BadGzipFile, EOFError, OSError) as error:
                raise DataError(f"{path} can not be read behind line {number:,}: {error}") from error
            advance(raw.tell() - told)


def _document(line: bytes) -> Document | str:
    """What a line holds, or why it holds no document."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({str(error).splitlines()[0][:100]}); expected {EXPECTED}"
    if not isinstance(row, dict):
        return f"{type(row).__name__}, not an object; expected {EXPECTED}"
    text, title = _first(row, TEXT), printable(_first(row, TITLE), TITLE_CHARS)
    if not isinstance(text, str) or not (text.strip() or title):
        names = ", ".join(str(name)[:40] for name in list(row)[:8]) or "nothing"
        return f"no text, found {names}; expected {EXPECTED}"
    # JSON may spell half a character (a lone surrogate), which no file can hold.
    text = encodable(text).replace("\0", " ")
    if not title:
        # Collections of passages put the title into the text: its first line, in quotes.
        first, _, rest = text.partition("\n")
        title, text = printable(first.strip().strip('"'), TITLE_CHARS), rest if rest.strip() else text
    return Document(title=title, link=printable(_first(row, LINK), LINK_CHARS), text=text)


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
