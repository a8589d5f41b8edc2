"""Settings are checked when they are made: each refusal names the setting, what it is and what it should be."""

from dataclasses import replace
from typing import Any

import pytest

from configs import metis_8b, signs_hdpo
from hdpo_jax.config import (
    AgentConfig,
    AlgorithmConfig,
    ConfigError,
    DataConfig,
    JudgeConfig,
    OptimizerConfig,
    RewardsConfig,
    RLConfig,
    RLTrainConfig,
    RolloutConfig,
    SFTConfig,
    SFTTrainConfig,
    ToolsConfig,
)
from hdpo_jax.config_files import config_names, load_config


@pytest.mark.parametrize(
    ("kind", "prefix", "settings"),
    [
        (DataConfig, "data", {"workers": -1}),
        (DataConfig, "data", {"max_bad_rows": 1.5}),
        (AgentConfig, "agent", {"max_calls": -1}),
        (AgentConfig, "agent", {"max_observation_tokens": 0}),
        (ToolsConfig, "tools", {"workers": 0}),
        (ToolsConfig, "tools", {"timeout_seconds": -1.0}),
        (ToolsConfig, "tools", {"memory_mb": 0}),
        (RolloutConfig, "rollout", {"chunk": 0}),
        (RolloutConfig, "rollout", {"capacity": 0}),
        (RolloutConfig, "rollout", {"shapes": ((0, 64, 0),)}),
        (RolloutConfig, "rollout", {"shapes": ((8, 64, 0), (8, 32, 0))}),
        (RolloutConfig, "rollout", {"page": 0}),
        (RolloutConfig, "rollout", {"pages": 100}),
        (RolloutConfig, "rollout", {"min_p": 1.0}),
        (RolloutConfig, "rollout", {"return_early": 0.0}),
        (RolloutConfig, "rollout", {"shapes": ()}),
        (AlgorithmConfig, "algorithm", {"w_tool": -0.1}),
        (AlgorithmConfig, "algorithm", {"importance_cap": 0.5}),
        (OptimizerConfig, "optimizer", {"b2": 1.0}),
        (OptimizerConfig, "optimizer", {"clip_norm": 0.0}),
        (RLTrainConfig, "train", {"steps": -5}),
        (RLTrainConfig, "train", {"micro_batch_rows": 0}),
        (RLTrainConfig, "train", {"mini_batches": 3}),
        (RLTrainConfig, "train", {"off_policy_steps": 2}),
        (SFTTrainConfig, "train", {"batch_size": 0}),
        (JudgeConfig, "rewards.judge", {"timeout_seconds": 0.0}),
        (JudgeConfig, "rewards.judge", {"attempts": 0}),
        (JudgeConfig, "rewards.judge", {"max_tokens": 0}),
        (JudgeConfig, "rewards.judge", {"double_check": 1.5}),
        (RewardsConfig, "rewards", {"verifiers": ()}),
        (SFTTrainConfig, "train", {"keep_checkpoints": 0}),
    ],
)
def test_impossible_settings_are_refused(kind: Any, prefix, settings):
    ((name, value),) = settings.items()
    required = {"path": "data"} if kind is DataConfig else {}
    with pytest.raises(ConfigError, match=rf"^{prefix}\.{name} is .*; expected ") as caught:
        kind(**required, **settings)
    assert repr(value) in str(caught.value)


def test_moments_that_could_not_fall_are_refused():
    with pytest.raises(ConfigError, match=r"^optimizer.b2 is 0.999; expected at most 0.995 with optimizer.moments bf"):
        OptimizerConfig(moments="bfloat16")
    assert OptimizerConfig(moments="bfloat16", b2=0.995).moments == "bfloat16"


def test_every_config_of_the_tree_is_sound():
    for name in config_names():
        kind = SFTConfig if name in ("signs_read", "signs_sft") else RLConfig
        load_config(name, kind)


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        # The longest trajectory: 24,576 + 1 prompt tokens and 16,384 of response.
        ("train", {"row_tokens": 40_960}, "train.row_tokens is 40960; expected at least 41984"),
        # Images: 65,536 patches of the prompt, and 4 for each of 16,384 tokens.
        ("train", {"row_patches": 65_536}, "train.row_patches is 65536; expected at least 131072"),
    ],
)
def test_a_run_that_could_meet_a_trajectory_without_room_is_refused(part, settings, said):
    config = metis_8b.get_config()
    assert isinstance(config, RLConfig)
    with pytest.raises(ConfigError, match=said):
        replace(config, **{part: replace(getattr(config, part), **settings)})


@pytest.mark.parametrize(
    ("cap", "mode", "said"),
    [
        (0.0, "host_driven", "algorithm.importance_cap is 0.0; expected one for train.off_policy_steps 1, e.g. 2.0"),
        (2.0, "fused", "train.off_policy_steps is 1; expected 0 with rollout.mode fused"),
    ],
)
def test_sampling_ahead_is_refused_where_it_would_be_wrong_or_in_vain(cap, mode, said):
    config = signs_hdpo.get_config()
    with pytest.raises(ConfigError, match=f"^{said}"):
        replace(
            config,
            rollout=replace(config.rollout, mode=mode),
            algorithm=replace(config.algorithm, importance_cap=cap),
            train=replace(config.train, off_policy_steps=1),
        )
