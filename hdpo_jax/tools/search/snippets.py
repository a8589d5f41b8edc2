"""The part of a text that a query's words stand in."""

import re
import unicodedata
from collections.abc import Sequence

from hdpo_jax.tools.search.words import Word

READ_CHARS = 200_000
"""Of a text; words that only come later are not shown."""
MAX_HITS = 2_000
LEAD = 0.25
"""Share of a snippet that stands before the first word of the query."""


def snippet(text: str, words: Sequence[Word], chars: int) -> str:
    """About `chars` characters, where the most different words of a query stand; the beginning where none does."""
    text = " ".join(text[:READ_CHARS].split())
    if len(text) <= chars:
        return text
    start = max(0, int(_densest(text, words, round((1 - LEAD) * chars)) - LEAD * chars))
    start = min(start, len(text) - chars)
    if start > 0:
        # From the beginning of a word on, where there are spaces.
        space = text.find(" ", start, start + chars // 8)
        start = start if space < 0 else space + 1
    end = start + chars
    if end < len(text):
        space = text.rfind(" ", end - chars // 8, end)
        end = end if space < 0 else space
    return "…" * (start > 0) + text[start:end].strip() + "…" * (end < len(text))


def _densest(text: str, words: Sequence[Word], width: int) -> int:
    """Where the stretch of `width` characters begins that holds the most different words; 0 without any."""
    stems = sorted({_stem(_folded(word.text)) for word in words}, key=len, reverse=True)
    if not stems:
        return 0
    pattern = "|".join(stem if not stem.isascii() else rf"\b{stem}" for stem in map(re.escape, stems))
    hits: list[tuple[int, str]] = []
    for match in re.finditer(pattern, _folded(text)):
        hits.append((match.start(), match[0]))
        if len(hits) == MAX_HITS:
            break
    best, most, first = 0, 0, 0
    inside: dict[str, int] = {}
    for position, found in hits:
        inside[found] = inside.get(found, 0) + 1
        while hits[first][0] < position - width:
            left = hits[first][1]
            inside[left] -= 1
            if not inside[left]:
                del inside[left]
            first += 1
        if len(inside) > most:
            best, most = hits[first][0], len(inside)
    return best


def _stem(word: str) -> str:
    """How a word begins in most of its forms: the index finds "cities" by "city"."""
    return word[: max(3, len(word) - 2)] if word.isascii() and word.isalpha() else word


def _folded(text: str) -> str:
    """Lower case without accents, as many characters as before."""
    if text.isascii():
        return text.lower()
    return "".join((unicodedata.normalize("NFD", c)[0].lower() or c)[:1] for c in text)
