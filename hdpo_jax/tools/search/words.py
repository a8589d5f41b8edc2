"""Words of texts and of queries, as the index has them.

SQLite's tokenizer knows words by the spaces and marks around them. Chinese, Japanese and Korean are written without
spaces (or with few): runs of their characters become overlapping pairs, so that 東京 is found in 東京都 and in
大東京. Trigrams, SQLite's own way, do not find words of two characters, which most Chinese words are, and make an index
2.6 times as large.
"""

import re
import unicodedata
from dataclasses import dataclass

QUERY_CHARS, QUERY_WORDS = 1_000, 32
"""What is read of a query."""

_RUN = re.compile("[\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\U00020000-\U000323af]+")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Word:
    """Something to look for."""

    text: str
    starts: bool = False
    """Whether it is enough that a word of the index starts with it."""

    @property
    def expression(self) -> str:
        """FTS5's expression for it: a string, in which nothing is syntax."""
        return '"{}"{}'.format(self.text.replace('"', '""'), "*" * self.starts)


def as_indexed(text: str) -> str:
    """What of a text the tokenizer is given."""
    if text.isascii():
        return text
    return _RUN.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", unicodedata.normalize("NFKC", text))


def query_words(query: str) -> list[Word]:
    """The distinct words of a query, in its order. Whatever else it holds, operators of a query language too, is no
    word."""
    text = unicodedata.normalize("NFKC", query[:QUERY_CHARS]).lower()
    # Vowel signs (Hindi) and accents are marks: parts of words.
    text = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    found: dict[Word, None] = {}
    for piece in text.split():
        end = 0
        for run in _RUN.finditer(piece):
            found |= dict.fromkeys(_other(piece[end : run.start()]))
            characters, end = run[0], run.end()
            # A pair for each two neighbours; a lone character is the beginning of a pair, or one that ends a run.
            pairs = _pairs(characters)[:-1]
            found |= dict.fromkeys(map(_word, pairs)) if pairs else {Word(text=characters, starts=True): None}
        found |= dict.fromkeys(_other(piece[end:]))
    return list(found)[:QUERY_WORDS]


def _word(text: str) -> Word:
    return Word(text=text)


def _other(text: str) -> list[Word]:
    return [Word(text=text)] if text else []


def _pairs(run: str) -> list[str]:
    """Neighbouring characters, and the last one by itself: so the beginnings of all of these are all characters."""
    return [run[index : index + 2] for index in range(len(run))]
