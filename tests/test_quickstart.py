"""The quickstart in small: every stage, its files, and what a second call does."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from configs import signs_hdpo, signs_read, signs_sft
from hdpo_jax import quickstart
from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.data.signs_config import ColdStartPhase, SignsConfig
from hdpo_jax.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.requires_bwrap]

RATES = {
    "accuracy",
    "accuracy_legible",
    "accuracy_illegible",
    "tool_rate",
    "redundant_tool_rate",
    "needed_tool_rate",
    "calls_per_rollout",
}


@pytest.fixture
def in_small(monkeypatch):
    """The same stages on a few boards for a few steps."""

    def few_steps(config):
        train = replace(config.train, steps=2, micro_batch_rows=2, max_rows=8)
        if hasattr(train, "batch_size"):
            return replace(config, train=replace(train, batch_size=4))
        rollout = replace(config.rollout, slots=4)
        train = replace(train, prompts_per_step=2, group_size=2, dump_every=1)
        return replace(config, train=train, rollout=rollout)

    for module in (signs_read, signs_sft, signs_hdpo):
        config = few_steps(module.get_config())
        monkeypatch.setattr(module, "get_config", lambda config=config: config)


def test_every_stage_leaves_what_it_should_on_eight_devices(in_small, tmp_path, capsys):
    out = tmp_path / "run"
    phase = ColdStartPhase(conversations=24, tool_share_legible=0.5, tool_share_illegible=0.5)
    signs = SignsConfig(cold_start=(phase, phase), train_boards=8, test_boards=4)
    summary = quickstart.run(out, 0, ToolsConfig(workers=2), signs)
    assert json.loads((out / "summary.json").read_text()) == summary
    for block in ("cold_start", "hdpo"):
        assert set(summary[block]) == RATES
        assert all(0 <= value <= 2 for value in summary[block].values())
    assert {"sft", "rl", "eval", "total"} <= set(summary["seconds"])
    assert summary["compilations_after_warmup"] == 0
    assert "<html" in (out / "report.html").read_text()
    assert len((out / "evaluation" / "hdpo.jsonl").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert summary["hf_export"] in printed and "redundant calls" in printed

    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
        summary["hf_export"], dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.num_hidden_layers == 3

    steps = len(read_metrics(out / "hdpo" / "metrics.jsonl"))
    again = quickstart.run(out, 0, ToolsConfig(workers=2), signs)
    assert again["hdpo"] == summary["hdpo"]
    assert all(again["seconds"][stage] > spent for stage, spent in summary["seconds"].items())
    assert len(read_metrics(out / "hdpo" / "metrics.jsonl")) == steps == 2
    with pytest.raises(ConfigError, match="holds a run with seed 0"):
        quickstart.run(out, 1, ToolsConfig(workers=2), signs)
