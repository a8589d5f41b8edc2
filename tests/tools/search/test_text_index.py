"""The embedded index: what is found, what a query can not do, what becomes of files that are not as expected."""

import gzip
import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hdpo_jax.config import ConfigError, TextSearchConfig, ToolsConfig
from hdpo_jax.data.rows import DataError
from hdpo_jax.tools import ToolBox
from hdpo_jax.tools.search import documents, text_index
from hdpo_jax.tools.search.documents import Document
from hdpo_jax.tools.search.results import SearchError
from hdpo_jax.tools.search.snippets import snippet
from hdpo_jax.tools.search.text_index import TextIndex, index_documents, write_index
from hdpo_jax.tools.search.words import query_words
from hdpo_jax.types import Observation, ToolCall

LIBRARY = [
    Document(title="Paris", link="https://example.org/paris", text="The capital of France, on the Seine."),
    Document(title="Lyon", link="", text="A city in France, between Paris and Marseille. Paris is north of it."),
    Document(title="Zürich", link="", text="The largest city of Switzerland; cities around it are small."),
    Document(title="東京", link="", text="東京都は日本の首都である。世界最大級の都市の一つ。"),
    Document(title="Beijing", link="", text="北京市,中華人民共和國首都。黑貓在城裡。"),
    Document(title="서울", link="", text="서울특별시는 대한민국의 수도이다."),
    Document(title="Hindi", link="", text="हिन्दी भारत की भाषा है"),
]

Open = Callable[..., TextIndex]


@pytest.fixture
def index(tmp_path: Path):
    opened: list[TextIndex] = []

    def open_index(library: list[Document] = LIBRARY) -> TextIndex:
        write_index(tmp_path / "index.sqlite", library)
        opened.append(TextIndex(str(tmp_path / "index.sqlite")))
        return opened[-1]

    yield open_index
    for one in opened:
        one.close()


def titles(index: TextIndex, query: str, count: int = 10) -> list[str]:
    return [result.title for result in index.search(query, count)]


def test_a_title_counts_more_than_a_text(index: Open):
    # Lyon's text says Paris twice, its title not at all: by texts alone it would come first.
    assert titles(index(), "paris") == ["Paris", "Lyon"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("Zurich", "Zürich"),
        ("ZÜRICH", "Zürich"),
        ("zu\u0308rich", "Zürich"),
        ("largest cities", "Zürich"),
        ("Who lives on the Seine?", "Paris"),
        ("東京", "東京"),
        ("首都 日本", "東京"),
        ("日本の首都はどこですか", "東京"),
        ("北京", "Beijing"),
        ("黑貓", "Beijing"),
        ("貓", "Beijing"),
        ("中", "Beijing"),
        ("수도", "서울"),
        ("हिन्दी", "Hindi"),
    ],
)
def test_found_in_any_script(index: Open, query: str, found: str):
    assert titles(index(), query)[0] == found


def test_other_characters_next_to_each_other_are_not_found(index: Open):
    # 京 and 北 both occur, 京北 does not.
    assert titles(index(), "京北") == []


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '"paris',
        "paris NEAR seine",
        "NEAR(paris seine, 3)",
        "title: paris",
        "{title text} : paris",
        "- title : paris",
        "^paris",
        "paris*",
        "(paris OR",
        "paris AND NOT",
        "'; DROP TABLE documents; --",
        "paris\x00seine",
        "paris 🗼",
        "paris\ud800",
        "paris\n\t\v\u2028",
        "%s {} \\ paris",
    ],
)
def test_queries_are_data(index: Open, query: str):
    found = titles(index(), query)
    assert ("Paris" in found) == ("paris" in query) and found[2:] == []


@pytest.mark.parametrize("query", ["", " ", "🗼🗼", "\x00", "* ^ : ( )", "\u0301", "_"])
def test_a_query_without_words_finds_nothing(index: Open, query: str):
    assert titles(index(), query) == []


@pytest.mark.parametrize("query", ["paris " * 20_000, "x" * 100_000, "東" * 100_000, '"' * 100_000, "a b c " * 20_000])
def test_long_queries_are_cut(index: Open, query: str):
    one = index()
    start = time.perf_counter()
    one.search(query, 10)
    assert time.perf_counter() - start < 5
    assert len(query_words(query)) <= 32


def test_a_snippet_shows_where_the_words_are():
    text = "Nothing here. " * 200 + "The old lighthouse of Genoa was built by prisoners. " + "Nothing there. " * 200
    shown = snippet(text, query_words("who built the lighthouses in Genoa"), 200)
    assert "lighthouse of Genoa was built" in shown
    assert shown.startswith("…") and shown.endswith("…") and len(shown) <= 202
    # Where most of the words are, not where the first is.
    assert "Genoa" in snippet("lighthouse " + text, query_words("lighthouse Genoa"), 200)
    assert snippet("short  text", query_words("x"), 200) == "short text"
    assert "首都" in snippet("あ" * 1_000 + "日本の首都" + "い" * 1_000, query_words("首都"), 100)


def test_what_one_query_ranks_is_bounded(index: Open, monkeypatch: pytest.MonkeyPatch):
    library = [Document(title=f"{number}", link="", text=f"common often filler{number}") for number in range(3_000)]
    library += [
        Document(title="best", link="", text="common common"),
        Document(title="rare", link="", text="rare common"),
    ]
    one = index(library)
    assert titles(one, "common", 1) == ["best"]
    monkeypatch.setattr(text_index, "RANKED", 1_000)
    # The best stands behind those that are looked at. Without a bound it is found, in a time that grows with the index.
    assert titles(one, "common", 3) == ["0", "1", "2"]
    # Rare words choose, however common the others are; what has all the words counts with all of them.
    assert titles(one, "common rare often", 1) == ["rare"]
    assert titles(one, "common filler2999 often", 1) == ["2999"]


def test_past_the_bound_documents_with_all_words_come_first(index: Open, monkeypatch: pytest.MonkeyPatch):
    def text(number: int) -> str:
        return " ".join(["early"] * (number < 900) + ["late"] * (600 <= number < 1_500) + ["other"])

    one = index([Document(title=f"{number}", link="", text=text(number)) for number in range(1_500)])
    monkeypatch.setattr(text_index, "RANKED", 1_000)
    # "early" leads, and "late" is too common to lead as well: by "early" alone, 0 would be the best of equals.
    assert titles(one, "early late", 2) == ["600", "601"]


def test_ties_have_one_order(index: Open):
    one = index([Document(title=f"same {number}", link="", text="the same words") for number in range(50)])
    assert titles(one, "words", 5) == [f"same {number}" for number in range(5)]


def test_threads_search_at_the_same_time(index: Open):
    one = index()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: titles(one, "capital of france"), range(200)))
    assert all(entry == found[0] for entry in found) and found[0][0] == "Paris"


def test_nobody_can_write(index: Open):
    one = index()
    with one._file.connection() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM documents")


def test_an_index_that_is_replaced_meanwhile_stays_readable(index: Open, tmp_path: Path):
    one = index()
    write_index(tmp_path / "index.sqlite", LIBRARY[2:])
    assert titles(one, "paris") == ["Paris", "Lyon"]


def test_a_damaged_index_is_a_failure(index: Open, tmp_path: Path):
    one = index([Document(title=f"t{number}", link="", text="word " * 500) for number in range(200)])
    path = tmp_path / "index.sqlite"
    with path.open("r+b") as file:
        file.seek(8_192)
        file.write(b"\xff" * (path.stat().st_size - 8_192))
    with pytest.raises(SearchError, match="the index can not be read"):
        one.search("word", 10)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (None, "tools.text_search.index is ''; expected the file that `hdpo data index` wrote"),
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "there is no file"),
        (lambda path: path.write_bytes(b"x" * 5_000), "is another kind of file; expected one that `hdpo data index`"),
        (lambda path: path.write_bytes(b""), "is another kind of file"),
        (lambda path: sqlite3.connect(path).executescript("CREATE TABLE words (x)"), "is another kind of file"),
    ],
)
def test_what_is_no_index_is_refused_at_the_start(make: Callable[[Path], object] | None, line: str, tmp_path: Path):
    path = tmp_path / "with ? and #.sqlite"
    if make is not None:
        make(path)
    config = TextSearchConfig(index=str(path) if make else "")
    with pytest.raises(ConfigError) as refusal:
        ToolBox(ToolsConfig(names=("text_search",), text_search=config))
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_tool(tmp_path: Path):
    path = tmp_path / "with ? and #.sqlite"
    write_index(path, LIBRARY)
    config = ToolsConfig(names=("text_search",), text_search=TextSearchConfig(index=str(path), results=1))
    with ToolBox(config) as box, box.session([]) as session:
        found = session.call(ToolCall(name="text_search", arguments={"query": "paris"}))
        nothing = session.call(ToolCall(name="text_search", arguments={"query": "xylophone"}))
        empty = session.call(ToolCall(name="text_search", arguments={"query": " "}))
    shown = "1. Paris\nhttps://example.org/paris\nThe capital of France, on the Seine."
    assert found == Observation(text=shown) and nothing == Observation(text="No results.")
    assert not empty.ok and "`query` is empty" in empty.text


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def test_folders_names_and_compression(tmp_path: Path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "a.jsonl").write_bytes(lines({"id": 1, "title": "A", "text": "alpha", "url": "https://a"}))
    (tmp_path / "docs" / "deep" / "b.jsonl.gz").write_bytes(
        gzip.compress(lines({"contents": '"Title of B"\nbeta text', "link": "https://b"}))
    )
    (tmp_path / "docs" / "notes.txt").write_text("not a document")
    advanced: list[int] = []
    count, left_out = index_documents(tmp_path / "docs", tmp_path / "out" / "i.sqlite", advanced.append)
    assert count == 2 and left_out.count == 0
    size = sum(path.stat().st_size for path in (tmp_path / "docs").rglob("*.jsonl*"))
    assert sum(advanced) == size
    one = TextIndex(str(tmp_path / "out" / "i.sqlite"))
    (found,) = one.search("beta", 10)
    assert (found.title, found.link, found.snippet) == ("Title of B", "https://b", "beta text")
    one.close()


def test_bad_lines_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "MAX_LINE", 10_000)
    path = tmp_path / "docs.jsonl"
    bad = [
        b"{",
        b"[1]",
        {"title": 3},
        {"text": ["a"]},
        b"\xff\xfe",
        {"words": "x"},
        b'{"text": "' + b"x" * 30_000,
        b"[" * 9_000,
    ]
    good = [{"text": "fine \ud800 \x00 one"}, {"title": "only a title", "text": ""}, {"text": "last"}]
    path.write_bytes(lines(good[0], *bad, b"", good[1], good[2]))
    count, left_out = index_documents(path, tmp_path / "i.sqlite")
    assert (count, left_out.count) == (3, len(bad))
    assert left_out.named[0].startswith(f"{path}:2: not JSON") and '{"title": …, "text": …' in left_out.named[0]
    assert f"{path}:4: no text, found title" in left_out.named[2]
    assert str(left_out).endswith("and 3 more")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "there are no documents to index"),
        (b"{}\n{}\n", "docs.jsonl:1: no text, found nothing"),
    ],
)
def test_nothing_to_index_writes_nothing(content: bytes, line: str, tmp_path: Path):
    path, output = tmp_path / "docs.jsonl", tmp_path / "i.sqlite"
    path.write_bytes(content)
    output.write_bytes(b"what was there before")
    with pytest.raises(DataError, match=line):
        index_documents(path, output)
    assert output.read_bytes() == b"what was there before" and len(list(tmp_path.iterdir())) == 2


def test_broken_compression_is_named_and_writes_nothing(tmp_path: Path):
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*({"text": f"text {number} " * 50} for number in range(500))))[:-500])
    with pytest.raises(DataError, match=r"docs.jsonl.gz can not be read behind line \d+"):
        index_documents(path, tmp_path / "i.sqlite")
    assert [file.name for file in tmp_path.iterdir()] == ["docs.jsonl.gz"]
