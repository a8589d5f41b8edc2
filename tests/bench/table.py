"""Rows of a benchmark as a Markdown table, and the documents that hold the tables."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

HEADER = ("| what | ours | peer | ratio | target |", "|---|---|---|---|---|")
README_MARKS = ("<!-- bench -->", "<!-- /bench -->")
INTRODUCTION = """# Benchmarks

`make bench` runs the programs of tests/bench one after another and writes this file and the table of the README;
`make bench BENCH=update` runs one and rewrites its section. What is compared runs in turn, each side in a process of
its own.
"""


@dataclass(frozen=True)
class Row:
    """One line of a table. Numbers are written with three digits and the unit; text stands as it is."""

    what: str
    ours: float | str
    peer: float | str | None = None
    ratio: float | None = None
    """How many times better ours is; which way round is the benchmark's to say."""
    target: str | None = None
    unit: str = ""

    def cells(self) -> tuple[str, str, str, str, str]:
        ratio = None if self.ratio is None else f"{_digits(self.ratio)}x"
        return self.what, _cell(self.ours, self.unit), _cell(self.peer, self.unit), ratio or "", self.target or ""


class Section(NamedTuple):
    """What docs/bench.md holds of one benchmark."""

    name: str
    about: str
    """What is measured: one paragraph."""
    stamp: str
    """When, on what and with which versions: one line."""
    table: str


def markdown(rows: Sequence[Row]) -> str:
    """The table; what a benchmark prints last."""
    return "\n".join([*HEADER, *(f"| {' | '.join(row.cells())} |" for row in rows)])


def last_table(printed: str) -> str:
    """The table at the end of what a benchmark printed. Raises ValueError where there is none."""
    tables = re.findall(rf"^{re.escape(HEADER[0])}\n(?:\|.*\|(?:\n|\Z))+", printed, re.MULTILINE)
    if not tables:
        raise ValueError("the benchmark printed no table")
    return tables[-1].rstrip("\n")


def read_sections(document: str) -> dict[str, Section]:
    """The sections of docs/bench.md, by name, in order."""
    return {section.name: section for section in _sections(document)}


def _sections(document: str) -> Iterator[Section]:
    for block in document.split("\n## ")[1:]:
        name, about, stamp, table = re.split(r"\n\n+", block.strip(), maxsplit=3)
        yield Section(name, about, stamp, table)


def write_sections(sections: Mapping[str, Section]) -> str:
    """docs/bench.md."""
    blocks = (f"\n## {name}\n\n{about}\n\n{stamp}\n\n{table}\n" for name, about, stamp, table in sections.values())
    return INTRODUCTION + "".join(blocks)


def with_summary(readme: str, sections: Mapping[str, Section]) -> str:
    """The README with the rows that have a target between its marks, and where they were measured."""
    start, end = README_MARKS
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise ValueError(f"the README needs {start} and {end}, once each")
    rows: list[str] = []
    measured: dict[str, list[str]] = {}
    for section in sections.values():
        aimed = [line for line in section.table.splitlines()[2:] if _has_target(line)]
        rows += aimed
        if aimed:
            measured.setdefault(section.stamp, []).append(section.name)
    stamps = [f"Measured ({', '.join(names)}): {stamp}" for stamp, names in measured.items()]
    before, rest = readme.split(start)
    after = rest.split(end)[1]
    blocks = ["\n".join([*HEADER, *rows]), *stamps] if rows else []
    return f"{before}{start}\n" + "".join(f"{block}\n" for block in "\n\n".join(blocks).splitlines()) + f"{end}{after}"


def _has_target(line: str) -> bool:
    return bool(line.split("|")[-2].strip())


def _cell(value: float | str | None, unit: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{_digits(value)} {unit}".rstrip()


def _digits(value: float) -> str:
    """Three digits that count, or all of those before the point."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
