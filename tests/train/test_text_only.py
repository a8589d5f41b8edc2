"""A text-only Qwen3 through the same trainer: cold start, HDPO with the Python tool, export."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from hdpo_jax.config import (
    AgentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RLConfig,
    RLTrainConfig,
    RolloutConfig,
    SFTConfig,
    SFTTrainConfig,
    ToolsConfig,
)
from hdpo_jax.data.dataset import BadRowError
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.schemas import COLD_START_SCHEMA, RL_SCHEMA
from hdpo_jax.evaluate.convert import export_hf
from hdpo_jax.evaluate.score import score_file
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.train.rl import train_rl
from hdpo_jax.train.sft import train_sft
from models.families import read_processor
from tests.models.text_model import write_qwen3

pytestmark = pytest.mark.slow

SUMS = [(first, second) for first in range(3, 7) for second in range(2, 6)]
CALL = (
    '<reason>I compute.</reason> <tool_call>{{"name": "python", "arguments": {{"code": "print({} + {})"}}}}</tool_call>'
)
ANSWER = "<reason>I have it.</reason> <answer>{}</answer>"


class Task(NamedTuple):
    model: Path
    conversations: Path
    prompts: Path


def question(first: int, second: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {first} + {second}?"}]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    directory = tmp_path_factory.mktemp("sums")
    conversations, prompts = [], []
    for number, (first, second) in enumerate(SUMS):
        messages = [*question(first, second), {"role": "assistant", "content": CALL.format(first, second)}]
        messages += [{"role": "user", "content": str(first + second)}]
        messages += [{"role": "assistant", "content": ANSWER.format(first + second)}]
        conversations.append({"messages": json.dumps(messages), "images": []})
        row = {"data_source": "sums", "prompt": question(first, second), "images": []}
        answer = {"reward_model": {"ground_truth": str(first + second)}, "extra_info": {"index": number}}
        prompts.append(row | answer)
    task = Task(directory / "model", directory / "conversations.parquet", directory / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(conversations, COLD_START_SCHEMA), task.conversations)
    pq.write_table(pa.Table.from_pylist(prompts, RL_SCHEMA), task.prompts)
    texts = [message["content"] for row in conversations for message in json.loads(row["messages"])]
    write_qwen3(task.model, texts, tie_word_embeddings=True)
    return task


def sft_config(task: Task, output: Path, steps: int) -> SFTConfig:
    return SFTConfig(
        output=str(output),
        model=ModelConfig(path=str(task.model), dtype="float32"),
        data=DataConfig(path=str(task.conversations)),
        optimizer=OptimizerConfig(name="muon", muon_learning_rate=2e-2, learning_rate=3e-3, b2=0.99),
        train=SFTTrainConfig(steps=steps, batch_size=16, row_tokens=256, micro_batch_rows=8, max_rows=16),
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_cold_start_and_hdpo_with_the_python_tool(task, tmp_path):
    """Settings leave room for image patches, as the defaults do; no array is made for them."""
    train_sft(sft_config(task, tmp_path / "sft", steps=30))
    losses = [line["loss/total"] for line in metrics(tmp_path / "sft")]
    assert losses[-1] < 0.2 * losses[0]
    export_hf(tmp_path / "sft", tmp_path / "cold")

    config = RLConfig(
        output=str(tmp_path / "hdpo"),
        model=ModelConfig(path=str(tmp_path / "cold"), dtype="float32"),
        data=DataConfig(path=str(task.prompts)),
        agent=AgentConfig(max_calls=2, max_response_tokens=64, max_observation_tokens=24),
        tools=ToolsConfig(sandbox="none", workers=2),
        rollout=RolloutConfig(slots=8, capacity=128, patches=64, page=16, chunk=8, shapes=((8, 32, 0), (8, 32, 64))),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=RLTrainConfig(
            steps=2, prompts_per_step=4, group_size=4, row_tokens=256, row_patches=64, micro_batch_rows=8, max_rows=16
        ),
    )
    train_rl(config)
    done = metrics(tmp_path / "hdpo")
    assert [line["step"] for line in done] == [1, 2]
    assert done[0]["tools/calls_per_rollout"] > 0.5 and done[0]["policy/logprob_gap_max"] < 1e-3
    assert done[0]["reward/accuracy"] > 0 and all(line["optimizer/skipped"] == 0 for line in done)
    assert any(line["optimizer/grad_norm"] > 0 for line in done)

    export_hf(tmp_path / "hdpo", tmp_path / "out")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is transformers.Qwen3ForCausalLM
    given = tmp_path / "in.jsonl"
    given.write_text(json.dumps({"messages": question(3, 4)}))
    score_file(tmp_path / "out", given, tmp_path / "scores.npz", dtype="float32")
    scores = np.load(tmp_path / "scores.npz")
    ids = torch.tensor(scores["token_ids_0"])[None].long()
    with torch.no_grad():
        expected = torch.log_softmax(loaded(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(scores["logprobs_0"][1:], expected, atol=1e-3)


def test_an_image_in_the_data_is_a_bad_row_in_one_line(task, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    rows = pq.read_table(task.prompts).to_pylist()[:1]
    rows[0]["prompt"][1]["content"] = "<image>What is it?"
    rows[0]["images"] = [{"bytes": (tmp_path / "image.png").read_bytes()}]
    pq.write_table(pa.Table.from_pylist(rows, RL_SCHEMA), tmp_path / "prompts.parquet")
    encode = PromptEncoder(read_processor(task.model), RolloutConfig())
    dataset = PromptDataset(tmp_path / "prompts.parquet", problem=encode.problem)
    with pytest.raises(BadRowError, match="an image came for a model that reads text only") as caught:
        dataset[0]
    assert "\n" not in str(caught.value)
