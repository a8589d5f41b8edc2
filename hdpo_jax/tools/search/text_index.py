"""Documents on this machine, found by BM25: SQLite's FTS5, and bounds on what a query may cost."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hdpo_jax.data.rows import DataError
from hdpo_jax.tools.search.documents import Document, LeftOut, document_files, read_documents
from hdpo_jax.tools.search.index_file import IndexFile, writing
from hdpo_jax.tools.search.results import SNIPPET_CHARS, Result, SearchError, printable
from hdpo_jax.tools.search.snippets import snippet
from hdpo_jax.tools.search.words import Word, as_indexed, query_words

KIND = 0x48445458
"""SQLite's application id of these files: "HDTX"."""
TOKENIZER = "porter unicode61 remove_diacritics 2"
TITLE_WEIGHT = 3.0
"""A word in a title counts as so many in a text."""
FREQUENT = 500
"""Documents with a word, from which on the index says how many there are."""
RANKED = 20_000
"""Documents that one query ranks, at most."""
HASH_BYTES = 64 * 2**20
"""Of words that wait in memory while an index is written."""

SCHEMA = (
    "CREATE TABLE documents (id INTEGER PRIMARY KEY, title TEXT, link TEXT, text TEXT)",
    f"CREATE VIRTUAL TABLE words USING fts5(title, text, content = '', tokenize = '{TOKENIZER}')",
    f"INSERT INTO words (words, rank) VALUES ('hashsize', {HASH_BYTES})",
    "CREATE TABLE frequent (word TEXT PRIMARY KEY, documents INTEGER) WITHOUT ROWID",
)
COUNT = (
    "CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, words, row)",
    f"INSERT INTO frequent SELECT term, doc FROM temp.vocabulary WHERE doc >= {FREQUENT}",
    "DROP TABLE temp.vocabulary",
)
PREPARE = (
    "PRAGMA temp_store = MEMORY",
    f"CREATE VIRTUAL TABLE temp.query USING fts5(word, tokenize = '{TOKENIZER}')",
    "CREATE VIRTUAL TABLE temp.tokens USING fts5vocab(temp, query, instance)",
)
RANK = (
    # The inner LIMIT comes before the ranking: what all documents match would else take as long as there are documents.
    f"SELECT score, id FROM (SELECT rowid AS id, bm25(words, {TITLE_WEIGHT}, 1.0) AS score FROM words "
    "WHERE words MATCH ? LIMIT ?) ORDER BY score, id LIMIT ?"
)


def write_index(path: Path, documents: Iterable[Document]) -> int:
    """Writes the index of `documents` to `path`, whole or not at all; returns how many there are."""
    count = 0
    with writing(path, KIND) as connection:
        for statement in SCHEMA:
            connection.execute(statement)
        for count, document in enumerate(documents, 1):
            stored = (count, document.title, document.link, document.text)
            connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", stored)
            words = (count, as_indexed(document.title), as_indexed(document.text))
            connection.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", words)
        if count == 0:
            raise DataError("there are no documents to index")
        connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        for statement in COUNT:
            connection.execute(statement)
    return count


def index_documents(
    source: Path, output: Path, advance: Callable[[int], object] = lambda count: None
) -> tuple[int, LeftOut]:
    """Writes the index of a folder or file of JSON lines; returns how many documents it holds and what was left out.

    `advance` is told of bytes read. Raises DataError where nothing is left.
    """
    left_out = LeftOut()
    try:
        count = write_index(output, read_documents(document_files(source), left_out, advance))
    except DataError as error:
        raise DataError(f"{error} in {source}: {left_out}") from None if left_out.count else error
    return count, left_out


class TextIndex:
    """The documents of an index. Threads may share it."""

    def __init__(self, path: str, setting: str = "tools.text_search.index"):
        """Raises ConfigError, one line, where `path` is no index."""
        self._file = IndexFile(path, KIND, setting=setting, command="hdpo data index", prepare=_prepare)

    def search(self, query: str, count: int) -> list[Result]:
        """The best `count` documents by BM25, with what they say about the words of `query`.

        Exact while the words are in at most `RANKED` documents together. Beyond that the rarest words choose the
        documents; the others count in documents that hold all the words.
        """
        words = query_words(query)
        try:
            with self._file.connection() as connection:
                best = _best(connection, words, count)
                return [_result(connection, identity, words) for identity in best]
        except sqlite3.Error as error:
            raise SearchError(f"the index can not be read: {error}") from error

    def close(self) -> None:
        self._file.close()


def _prepare(connection: sqlite3.Connection) -> None:
    for statement in PREPARE:
        connection.execute(statement)


def _best(connection: sqlite3.Connection, words: Sequence[Word], count: int) -> list[int]:
    """The ids of the best documents."""
    rarest = _rarest_first(connection, words)
    if not rarest:
        return []
    leading, total = [], 0
    for documents, word in rarest:
        total += documents
        if leading and total > RANKED:
            break
        leading.append(word.expression)
    scored = connection.execute(RANK, (" OR ".join(leading), RANKED, count)).fetchall()
    if len(leading) < len(rarest):
        every = " AND ".join(word.expression for _, word in rarest)
        scored += connection.execute(RANK, (every, RANKED, count)).fetchall()
    # Lower is better. A document that both found counts with all its words.
    scores: dict[int, float] = {}
    for score, identity in scored:
        scores[identity] = min(score, scores.get(identity, score))
    return sorted(scores, key=lambda identity: (scores[identity], identity))[:count]


def _rarest_first(connection: sqlite3.Connection, words: Sequence[Word]) -> list[tuple[int, Word]]:
    """The words that the tokenizer takes for words, and how many documents hold them (`FREQUENT` stands for fewer)."""
    connection.execute("DELETE FROM temp.query")
    connection.executemany("INSERT INTO temp.query (rowid, word) VALUES (?, ?)", enumerate(word.text for word in words))
    found = connection.execute(
        f"SELECT doc, min(coalesce(documents, {FREQUENT})) "
        "FROM temp.tokens LEFT JOIN frequent ON word = term GROUP BY doc"
    )
    return sorted(((documents, words[place]) for place, documents in found), key=lambda pair: pair[0])


def _result(connection: sqlite3.Connection, identity: int, words: Sequence[Word]) -> Result:
    row = connection.execute("SELECT title, link, text FROM documents WHERE id = ?", (identity,)).fetchone()
    title, link, text = row
    return Result(title=title, link=link, snippet=printable(snippet(text, words, SNIPPET_CHARS), SNIPPET_CHARS + 2))
