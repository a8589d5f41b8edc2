"""`hdpo score` against transformers, and what it does with lines that are no conversation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from hdpo_jax.evaluate import score
from hdpo_jax.evaluate.messages import MessagesError
from hdpo_jax.evaluate.score import score_file
from models.qwen3_vl.processing import Processor
from tests.evaluate.oracle import data_uri, model_inputs, picture, user, user_with_videos, write_lines

CONVERSATIONS = [
    [{"role": "user", "content": "What does the sign say?"}, {"role": "assistant", "content": "<answer>AEG</answer>"}],
    [
        user("Which is wider?", data_uri(picture(96, 32, 0)), data_uri(picture(40, 64, 1))),
        {"role": "assistant", "content": "one"},
    ],
    [{"role": "user", "content": "Read the sign. " * 20}],
    [user("Read the sign.", data_uri(picture(64, 64, 2)))],
    [user_with_videos()],
]


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", CONVERSATIONS)


def oracle_logprobs(
    model: Qwen3VLForConditionalGeneration, processor: Processor, token_ids: np.ndarray, conversation: list[Any]
):
    """log p(token t | tokens before it) for t >= 1, by transformers."""
    inputs = model_inputs(processor, conversation, token_ids)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    following = inputs["input_ids"][0, 1:, None]
    return torch.log_softmax(logits[:-1].double(), -1).gather(-1, following)[:, 0].numpy()


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_scores_are_those_of_transformers(
    tiny_model: Path, messages: Path, tmp_path: Path, add_generation_prompt: bool
):
    output = tmp_path / "out.npz"
    score_file(tiny_model, messages, output, add_generation_prompt=add_generation_prompt, dtype="float32")
    processor = Processor.from_hf(tiny_model)
    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    with np.load(output) as scores:
        assert len(scores.files) == 2 * len(CONVERSATIONS)
        for index, conversation in enumerate(CONVERSATIONS):
            token_ids, logprobs = scores[f"token_ids_{index}"], scores[f"logprobs_{index}"]
            expected = processor.encode_messages(conversation, add_generation_prompt=add_generation_prompt).token_ids
            assert token_ids.dtype == np.int32 and logprobs.dtype == np.float32
            np.testing.assert_array_equal(token_ids, expected)
            assert np.isnan(logprobs[0]) and len(logprobs) == len(token_ids)
            oracle = oracle_logprobs(model, processor, token_ids, conversation)
            np.testing.assert_allclose(logprobs[1:], oracle, atol=2e-4)


def test_a_score_does_not_depend_on_its_neighbours(tiny_model: Path, tmp_path: Path):
    lines = [json.dumps({"messages": conversation}) for conversation in CONVERSATIONS]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    (tmp_path / "one.jsonl").write_text(lines[1])
    score_file(tiny_model, tmp_path / "all.jsonl", tmp_path / "all.npz", dtype="float32")
    score_file(tiny_model, tmp_path / "one.jsonl", tmp_path / "one.npz", dtype="float32")
    with np.load(tmp_path / "all.npz") as everyone, np.load(tmp_path / "one.npz") as alone:
        np.testing.assert_allclose(everyone["logprobs_1"][1:], alone["logprobs_0"][1:], atol=1e-5)


def test_conversations_of_many_lengths_compile_few_programs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = [[{"role": "user", "content": "sign " * count}] for count in range(1, 60, 3)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation}) + "\n" for conversation in words))
    shapes, pack_rows = set(), score.pack_rows

    def recording(config: Any, prompts: Any, **sizes: int) -> score.ScoreRows:
        shapes.add(tuple(sizes.values()))
        return pack_rows(config, prompts, **sizes)

    monkeypatch.setattr(score, "pack_rows", recording)
    score_file(tiny_model, path, tmp_path / "out.npz", dtype="float32")
    # Twenty lengths, from under 20 to under 200 tokens: at most rows of 64, 128 and 256.
    assert len(shapes) <= 3


def test_command_scores_without_torch(tiny_model: Path, messages: Path, tmp_path: Path):
    arguments = [
        "score",
        "--model",
        tiny_model,
        "--messages",
        messages,
        "--output",
        tmp_path / "out.npz",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, "-m", "tests.hdpo", *map(str, arguments)]
    outcome = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert "PyTorch" not in outcome.stderr
    with np.load(tmp_path / "out.npz") as scores:
        assert scores["logprobs_3"].shape == scores["token_ids_3"].shape


def _video_line(video: Any, **options: Any) -> str:
    part = {"type": "video", "video": video, **options}
    return json.dumps({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nonsense", "in.jsonl:2: "),
        ('{"messages": []}', "in.jsonl:2: "),
        (json.dumps({"messages": [user("x", "/nowhere.png")]}), "in.jsonl:2: .*nowhere.png"),
        (json.dumps({"messages": [user("x", "data:image/png;base64,AAAA")]}), "in.jsonl:2: .*can not be decoded"),
        (_video_line("/nowhere.mp4"), "in.jsonl:2: video '/nowhere.mp4' can not be read"),
        (_video_line("data:video/mp4;base64,AAAA"), "in.jsonl:2: video of 3 bytes can not be decoded"),
        (_video_line(None), "in.jsonl:2: a video part carries 'None'; expected a path, a data URI or a list of frame"),
        (_video_line("a.mp4", nframes=2), "in.jsonl:2: a video part has nframes; expected video, and fps or num_fr"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}), "{'type': 'video', 'video'}"),
    ],
)
def test_bad_line_is_named_and_nothing_is_written(tiny_model: Path, tmp_path: Path, line: str, problem: str):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATIONS[0]}) + f"\n{line}\n")
    with pytest.raises(MessagesError, match=problem):
        score_file(tiny_model, path, tmp_path / "out.npz", dtype="float32")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
