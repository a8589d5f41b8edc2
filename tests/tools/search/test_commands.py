"""`hdpo data`: a group of commands."""

import json
from pathlib import Path

import pytest

from hdpo_jax import cli
from hdpo_jax.commands import GROUPS
from tests.tools.search.pictures import file_of, picture


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: hdpo data COMMAND") and all(f"\n  {name} " in shown for name in GROUPS["data"])


@pytest.mark.parametrize("words", [[group, name] for group, commands in GROUPS.items() for name in commands])
def test_every_command_of_a_group_has_help(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0 and f"usage: hdpo {' '.join(words)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line", "status"),
    [
        ([], "hdpo data COMMAND: a command comes first, one of index, ", 2),
        (["--output", "x"], "hdpo data COMMAND: a command comes first, one of index, ", 2),
        (["indx"], "there is no command data 'indx'; expected one of index, ", 2),
        (["index", "--documents", "x"], "missing --output PATH; see hdpo data index --help", 2),
        (["index", "--documents", "nowhere", "--output", "x"], "there is no file or folder nowhere", 1),
        (["index-images", "--images", "nowhere", "--output", "x"], "there is no folder nowhere", 1),
    ],
)
def test_refusals_are_one_line(words: list[str], line: str, status: int, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", *words]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"hdpo: {line}") and captured.err.count("\n") == 1


def test_an_index_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    documents, output = tmp_path / "docs.jsonl", tmp_path / "index.sqlite"
    documents.write_text(json.dumps({"title": "A", "text": "alpha"}) + "\nnonsense\n")
    assert cli.main(["data", "index", "--documents", str(documents), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{output}: 1 documents, ") and captured.out.count("\n") == 1
    assert f"left out 1 lines: {documents}:2: not JSON" in captured.err


def test_an_index_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images, output = tmp_path / "images", tmp_path / "index.sqlite"
    images.mkdir()
    (images / "a.png").write_bytes(file_of(picture(0)))
    (images / "b.png").write_bytes(b"nonsense")
    assert cli.main(["data", "index-images", "--images", str(images), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{output}: 1 images, ") and "b.png: the file is no image" in captured.err
