"""What README.md says can be done can be done."""

import re
from pathlib import Path

import pytest
from PIL import Image

from hdpo_jax.commands import COMMANDS, GROUPS, RUNS
from hdpo_jax.config import RLConfig
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.evaluate.messages import read_conversations
from tests.models.videos import clip, write_video

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_own_data_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 960)).save("receipt.jpg")
    write_prompts, config = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(write_prompts, {})
    prompts = PromptDataset("prompts.parquet")
    assert len(prompts) == 1 and prompts[0].ground_truth == "TOTAL 12.40" and len(prompts[0].images) == 1
    scope = {}
    exec(config, scope)
    assert isinstance(scope["get_config"](), RLConfig)


def test_json_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("a.jpg")
    lines = re.findall(r'^    (\{"messages".*)$', README, re.MULTILINE)
    Path("in.jsonl").write_text("\n".join(lines))
    image, video = read_conversations("in.jsonl")
    assert (len(image.images), len(image.videos)) == (1, 0)
    assert (len(video.images), len(video.videos)) == (0, 1)


def test_a_column_of_videos_is_added_as_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 960)).save("receipt.jpg")
    write_video(tmp_path / "a.mp4", clip(20))
    write_prompts, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shown = write_prompts.replace("<image>", "<image><video>").replace(
        "rows, RL_SCHEMA", "rows, RL_SCHEMA.append(VIDEOS)"
    )
    shown = shown.replace("import RL_SCHEMA", "import RL_SCHEMA, VIDEOS")
    exec(shown.replace('"images":', '"videos": [{"path": "a.mp4"}], "images":'), {})
    assert len(PromptDataset("prompts.parquet")[0].videos) == 1


def test_commands_exist():
    named = set(re.findall(r"`?hdpo ([a-z][a-z-]+)", README))
    assert named and named <= {*COMMANDS, *RUNS, *GROUPS}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        assert set(re.findall(r"make ([a-z][a-z-]+)", document)) <= targets | {"it", "them"}


def test_files_exist():
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "launch" / "README.md").read_text()):
        for name in re.findall(r"\b(?:hdpo_jax|models|sharding|configs|launch|tests)/[\w./-]*\w", document):
            assert (ROOT / name).exists(), name
