"""The house's rules that a reader can not see in one file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"hdpo_jax": {"models", "sharding"}, "models": {"sharding"}, "sharding": set()}
"""Package -> the packages of this repository that it may import."""
TEST_ONLY = {"torch", "tensorflow", "chex", "pytest"}
LONGEST = 600
"""Lines; past that, two things live in one file."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module.partition(".")[0]


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_one_way(package: str):
    above = set(BELOW) - BELOW[package] - {package}
    wrong = [f"{p.relative_to(ROOT)}:{n} imports {m}" for p in sources(package) for n, m in imported(p) if m in above]
    assert not wrong


@pytest.mark.parametrize("package", [*BELOW, "configs"])
def test_the_oracle_stays_in_the_tests(package: str):
    wrong = [
        f"{p.relative_to(ROOT)}:{n} imports {m}" for p in sources(package) for n, m in imported(p) if m in TEST_ONLY
    ]
    assert not wrong


def test_everything_imports_without_torch_and_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in BELOW
        for path in sources(package)
        # Programs of their own: importing them starts something.
        if path.name != "__main__.py" and "kernel" not in path.parts
    ]
    code = (
        "import importlib\nfrom tests.hdpo import hide_oracles\nhide_oracles()\n"
        f"for name in {modules!r}:\n    importlib.import_module(name)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]


def test_files_stay_small():
    files = [path for package in BELOW for path in sources(package)]
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST}


def test_no_loose_ends():
    # Put together here, so that this file does not name them.
    words = ["TO" + "DO", "FIX" + "ME", "type: " + "ignore", "pragma: " + "no cover", "pyright: " + "ignore"]
    files = [path for package in [*BELOW, "configs", "tests"] for path in sources(package)]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    wrong = [f"{path.relative_to(ROOT)}: {word}" for path, text in texts.items() for word in words if word in text]
    assert not wrong


def test_no_paths_of_one_machine():
    pattern = re.compile(r"""["'`( ]/(home|root|Users|work)/\w""")
    suffixes = {".py", ".md", ".toml", ".sh", ".html", ".js", ".css", ""}
    folders = [*BELOW, "configs", "launch", "tests", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")]
    found = {path: pattern.search(path.read_text(encoding="utf-8")) for path in files if path.is_file()}
    assert not [f"{path.relative_to(ROOT)}: {match[0]}" for path, match in found.items() if match]
