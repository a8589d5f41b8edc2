"""Every setting, as frozen dataclasses checked at construction: one line says what is wrong."""

from hdpo_jax.config.checks import ConfigError, bearer_token
from hdpo_jax.config.rewards import JudgeConfig, RewardsConfig
from hdpo_jax.config.run import (
    AgentConfig,
    AlgorithmConfig,
    DataConfig,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    RLConfig,
    RLTrainConfig,
    RolloutConfig,
    SFTConfig,
    SFTTrainConfig,
    TrainConfig,
)
from hdpo_jax.config.tools import ImageSearchConfig, TextSearchConfig, ToolsConfig, ToolServerConfig, WebConfig

__all__ = [
    "AgentConfig",
    "AlgorithmConfig",
    "ConfigError",
    "DataConfig",
    "Dtype",
    "ImageSearchConfig",
    "JudgeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "RLTrainConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SFTConfig",
    "SFTTrainConfig",
    "TextSearchConfig",
    "ToolServerConfig",
    "ToolsConfig",
    "TrainConfig",
    "WebConfig",
    "bearer_token",
]
