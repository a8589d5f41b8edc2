"""Runs the benchmarks and keeps their tables: `python -m tests.bench [NAME [ARGUMENTS…]]`."""

import ast
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.bench.table import Section, last_table, read_sections, with_summary, write_sections

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT, README = ROOT / "docs" / "bench.md", ROOT / "README.md"
BENCHMARKS = ("rollout", "update", "logprobs", "packing", "signs", "python_tool", "search", "gpu")
"""In the order of the document."""
BY_NAME_ONLY = ("gpu",)
"""What needs another machine than the others."""


def main(arguments: list[str]) -> int:
    """Runs the named benchmark, or all that run anywhere. 1 where one failed; the tables of the others are kept."""
    if arguments and arguments[0] not in BENCHMARKS:
        print(f"no benchmark is called {arguments[0]!r}; expected one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    anywhere = [name for name in BENCHMARKS if name not in BY_NAME_ONLY]
    failed = [name for name in arguments[:1] or anywhere if not keep(name, arguments[1:])]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def keep(name: str, arguments: list[str]) -> bool:
    """Runs a benchmark and rewrites its section of docs/bench.md and the README's table; False where it failed."""
    print(f"--- {name}", flush=True)
    stamp = where_and_when()
    code, printed = run(name, arguments)
    if code:
        return False
    sections = read_sections(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else {}
    sections[name] = Section(name, about(name), stamp, last_table(printed))
    sections = {known: sections[known] for known in BENCHMARKS if known in sections}
    DOCUMENT.write_text(write_sections(sections), encoding="utf-8")
    README.write_text(with_summary(README.read_text(encoding="utf-8"), sections), encoding="utf-8")
    return True


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status of a benchmark and what it printed, which is shown as it comes."""
    command = [sys.executable, "-u", "-m", f"tests.bench.{name}", *arguments]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def about(name: str) -> str:
    """The first paragraph of the benchmark's docstring."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0]


def where_and_when() -> str:
    """Date, machine and versions, in a line."""
    today = datetime.now(UTC)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    libraries = ", ".join(f"{library} {version(library)}" for library in ("jax", "torch", "transformers"))
    return (
        f"{today.day} {today:%B %Y}, {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, {libraries}, commit {commit()}."
    )


def processor() -> str:
    """Its model, as the system names it."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor()


def commit() -> str:
    """The checked-out commit, and whether files differ from it; what the benchmarks themselves write does not count."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    written = [f":!{path.relative_to(ROOT)}" for path in (DOCUMENT, README)]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
