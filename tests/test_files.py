"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from hdpo_jax.files import replacing, write_text_atomically


def test_old_content_stands_until_the_new_is_whole(tmp_path: Path):
    path = tmp_path / "deep" / "file.txt"
    write_text_atomically(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_an_error_leaves_no_trace(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_text_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
