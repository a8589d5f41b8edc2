"""What a search finds. It is the web's text, which may hold anything: here it becomes short, printable lines."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from hdpo_jax.tools.protocol import Subject

TITLE_CHARS, LINK_CHARS, SNIPPET_CHARS = 200, 500, 500
JOINERS = {"\u200c", "\u200d"}
"""Not printable in Python's eyes, but parts of words and of emoji."""


class SearchError(Exception):
    """A search failed, which is not the same as finding nothing. The message is for the log; it holds no key."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A page or a document."""

    title: str
    link: str = ""
    snippet: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageMatch:
    """A page that shows an image."""

    title: str
    link: str = ""
    thumbnail: bytes | None = None
    """An image file that nobody has looked into yet."""


class TextSearch(Protocol):
    """Somewhere to look words up."""

    def search(self, query: str, count: int) -> list[Result]:
        """At most `count` results, the best first. Raises SearchError."""
        ...

    def close(self) -> None: ...


class ImageSearch(Protocol):
    """Somewhere to look a prompt's image up."""

    def search(self, subject: Subject, count: int) -> list[ImageMatch]:
        """At most `count` matches, the best first. Raises SearchError."""
        ...

    def close(self) -> None: ...


def printable(text: object, limit: int) -> str:
    """One line of at most `limit` characters, nothing in it but what can be printed; "" for what is no string."""
    if not isinstance(text, str):
        return ""
    # More is never shown; the rest of a megabyte needs no cleaning.
    text = text[: 8 * limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in JOINERS else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def numbered(entries: Iterable[Iterable[str]]) -> str:
    """Entries of a few lines each as a numbered list; empty lines are left out."""
    kept = ([line for line in entry if line] for entry in entries)
    return "\n\n".join(f"{number}. " + "\n".join(lines) for number, lines in enumerate(kept, 1))
