"""What `make bench` writes: rows as Markdown, one section replaced, the README's table between its marks."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bench import __main__ as runner
from tests.bench.child import measure, take_turns
from tests.bench.table import Row, Section, last_table, markdown, read_sections, with_summary, write_sections

ROWS = [
    Row("an update", 1.23456, 12.3456, ratio=10.0001, target=">= 2x", unit="s"),
    Row("tokens/s", 31_847.2, 0.04217),
    Row("compiled", "yes", unit="s"),
]
TABLE = """\
| what | ours | peer | ratio | target |
|---|---|---|---|---|
| an update | 1.23 s | 12.3 s | 10.0x | >= 2x |
| tokens/s | 31,847 | 0.0422 |  |  |
| compiled | yes |  |  |  |"""
SECTIONS = {
    "update": Section("update", "Our step\nand theirs.", "1 May, a machine.", TABLE),
    "signs": Section("signs", "Stages.", "2 May, a machine.", markdown([Row("learn", 3, unit="s")])),
}


def test_rows_are_markdown():
    assert markdown(ROWS) == TABLE


def test_the_last_table_counts():
    printed = f"warm-up 3 s\n{markdown([Row('draft', 1)])}\nround 1 | 2 s\n{TABLE}\n"
    assert last_table(printed) == TABLE
    with pytest.raises(ValueError, match="no table"):
        last_table("round 1 | 2 s\n")


def test_the_document_reads_back():
    assert read_sections(write_sections(SECTIONS)) == SECTIONS


def test_one_section_is_replaced():
    text = write_sections(SECTIONS)
    changed = read_sections(text)
    changed["update"] = changed["update"]._replace(table=markdown([Row("an update", 1.0, unit="s")]))
    assert write_sections(changed) == text.replace(TABLE, markdown([Row("an update", 1.0, unit="s")]))


def test_the_readme_takes_the_rows_with_a_target_and_keeps_the_rest():
    readme = "# A\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nend | of it\n"
    written = with_summary(readme, SECTIONS)
    assert written.startswith("# A\n\n<!-- bench -->\n| what |") and written.endswith(
        "<!-- /bench -->\n\nend | of it\n"
    )
    assert "| an update |" in written and "old" not in written
    assert "tokens/s" not in written and "learn" not in written  # no target
    assert "Measured (update): 1 May, a machine." in written and "2 May" not in written
    assert with_summary(written, SECTIONS) == written
    with pytest.raises(ValueError, match="once each"):
        with_summary("# A\n", SECTIONS)


def test_a_run_rewrites_its_section_and_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document, readme = tmp_path / "bench.md", tmp_path / "README.md"
    document.write_text(write_sections(SECTIONS))
    readme.write_text("<!-- bench --><!-- /bench -->")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "DOCUMENT", document)
    monkeypatch.setattr(runner, "README", readme)
    monkeypatch.setattr(runner, "BENCHMARKS", ("signs", "update"))
    monkeypatch.setattr(runner, "about", lambda name: "Now.")
    monkeypatch.setattr(runner, "where_and_when", lambda: "3 May, a machine.")
    monkeypatch.setattr(runner, "run", lambda name, arguments: (0, f"{arguments}\n{markdown(ROWS[:1])}\n"))
    assert runner.main(["update", "fast"]) == 0
    found = read_sections(document.read_text())
    assert list(found) == ["signs", "update"] and found["signs"] == SECTIONS["signs"]
    assert found["update"] == Section("update", "Now.", "3 May, a machine.", markdown(ROWS[:1]))
    assert "3 May" in readme.read_text() and "1 May" not in readme.read_text()

    monkeypatch.setattr(runner, "run", lambda name, arguments: (1, "it broke\n"))
    assert runner.main([]) == 1 and read_sections(document.read_text()) == found
    assert runner.main(["nothing"]) == 2


def test_benchmarks_are_found_and_say_what_they_measure():
    assert all(runner.about(name) for name in runner.BENCHMARKS)


def loaded(size: int) -> Mapping[str, Any]:
    """What a fresh interpreter holds, after it has held `size` bytes."""
    return {"jax": "jax" in sys.modules, "bytes": len(bytearray(size))}


def test_a_child_is_fresh_and_tells_its_own_peak():
    """This process has held 300 MB; getrusage would say so of a child as well."""
    held = bytearray(300_000_000)
    small, large = measure(loaded, {"size": 1}), measure(loaded, {"size": 200_000_000})
    assert len(held) == 300_000_000 and not small["jax"]
    assert large["bytes"] == 200_000_000
    assert small["peak_bytes"] < 150_000_000 < 200_000_000 < large["peak_bytes"] < 350_000_000


def test_sides_take_turns():
    order: list[str] = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    times = take_turns({"ours": lambda: side("ours", 1.0), "peer": lambda: side("peer", 3.0)}, rounds=3)
    assert times == {"ours": [1.0] * 3, "peer": [3.0] * 3}
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
