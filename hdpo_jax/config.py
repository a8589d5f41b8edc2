"""Every setting of a run, as frozen dataclasses checked at construction: one line says what is wrong."""

from dataclasses import dataclass, field
from typing import Literal

from sharding.mesh import MeshAxes

Dtype = Literal["bfloat16", "float32"]


class ConfigError(ValueError):
    """A setting is missing, unknown or out of range; the message names it and says what to do."""


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {found!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """A Qwen3-VL directory in HF format."""
    dtype: Dtype = "bfloat16"
    """Activations and matrix products."""
    param_dtype: Dtype = "float32"
    """Master weights."""
    remat: Literal["nothing", "full"] = "full"
    """What the backward pass recomputes: nothing, or every layer."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str
    """A parquet file, or a folder of them, in the Metis-RL (train) or Metis-ColdStart (sft) schema."""
    workers: int = 0
    """Grain worker processes that read rows; 0 reads in the main process."""
    cache_mb: int = 2_048
    """Conversations stay encoded, images resized, while they fit this much host memory (sft)."""
    max_prompt_tokens: int = 24_576
    max_bad_rows: float = 0.01
    """Share of unusable rows past which a run stops instead of skipping them."""

    def __post_init__(self):
        _require(0 <= self.max_bad_rows <= 1, "data.max_bad_rows", self.max_bad_rows, "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    max_calls: int = 10
    """Tool calls a trajectory may send; one more ends it."""
    max_response_tokens: int = 16_384
    """Tokens after the prompt, observations included."""
    max_observation_tokens: int = 8_192

    def __post_init__(self):
        _require(self.max_calls >= 0, "agent.max_calls", self.max_calls, "0 or more")
        _require(self.max_response_tokens > 0, "agent.max_response_tokens", self.max_response_tokens, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    names: tuple[str, ...] = ("python",)
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """What isolates model-written code. "none" runs it with this user's rights: only for code you trust."""
    workers: int = 8
    """Tool calls that run at a time."""
    timeout_seconds: float = 20.0
    memory_mb: int = 1_024
    processes: int = 32
    disk_mb: int = 64
    output_chars: int = 65_536
    max_images: int = 8
    """Images one call may return; the rest are dropped whole, and the observation says so."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    slots: int = 64
    """Trajectories that decode at a time."""
    capacity: int = 41_984
    """Tokens a slot can hold: prompt and response."""
    chunk: int = 64
    """Decode steps between two looks of the host, at most."""
    return_early: float = 0.25
    """Share of the running slots that may wait for the host before a chunk ends early."""
    gather_seconds: float = 0.05
    """How long a batch in which most slots wait for tools waits for their answers before it decodes without them."""
    temperature: float = 1.0
    top_k: int = 0
    """0: no truncation."""
    top_p: float = 1.0
    prefill_rows: int = 8
    """Prompts computed at a time."""
    append_rows: int = 8
    """Observations computed at a time."""
    prompt_shapes: tuple[tuple[int, int], ...] = ((1_024, 0), (4_096, 16_384), (24_576, 65_536))
    """Static sizes (tokens, image patches) that a prompt is padded to; the first that holds it is taken."""
    observation_shapes: tuple[tuple[int, int], ...] = ((256, 0), (2_048, 0), (5_376, 20_480), (8_192, 32_768))
    """The same for observations."""

    def __post_init__(self):
        _require(self.slots > 0, "rollout.slots", self.slots, "at least 1")
        _require(self.temperature >= 0, "rollout.temperature", self.temperature, "0 (greedy) or more")
        _require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "a share in (0, 1]")
        for name in ("prompt_shapes", "observation_shapes"):
            shapes = getattr(self, name)
            sound = len(shapes) > 0 and all(tokens > 0 and patches >= 0 for tokens, patches in shapes)
            _require(sound, f"rollout.{name}", shapes, "pairs (tokens > 0, patches >= 0), at least one")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Which rewards meet where. The defaults are HDPO; the others are its baselines."""

    advantages: Literal["hdpo", "coupled_calls", "coupled_reward", "unconditional"] = "hdpo"
    """hdpo: two channels, efficiency among correct rollouts only. coupled_calls: r_acc - alpha T, one channel.
    coupled_reward: r_acc + alpha r_tool, one channel. unconditional: two channels, both over the whole group."""
    coupling: float = 0.1
    """alpha of the coupled baselines."""
    w_acc: float = 1.0
    w_tool: float = 0.15
    """0 is plain GRPO."""
    tool_mean_over: Literal["nonzero", "qualifying", "all"] = "nonzero"
    """Rollouts whose tokens the tool term's mean runs over."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0

    def __post_init__(self):
        for name in ("w_acc", "w_tool", "clip_low", "clip_high"):
            _require(getattr(self, name) >= 0, f"algorithm.{name}", getattr(self, name), "0 or more")
        _require(self.dual_clip > 1, "algorithm.dual_clip", self.dual_clip, "more than 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for matrices inside layers, AdamW for the rest."""
    learning_rate: float = 1e-6
    muon_learning_rate: float = 2e-2
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to."""

    def __post_init__(self):
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "more than 0")
        _require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "more than 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 200
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    row_tokens: int = 40_960
    """Length of a packed row."""
    row_patches: int = 65_536
    """Image patches that a packed row holds."""
    micro_batch_rows: int = 8
    """Packed rows whose activations are held at a time."""
    max_rows: int = 0
    """Rows that the static batch holds; 0: as many as the worst case needs."""


@dataclass(frozen=True, kw_only=True)
class RLTrainConfig(TrainConfig):
    prompts_per_step: int = 128
    group_size: int = 16
    mini_batches: int = 2
    """Optimizer steps a rollout step, each on an equal share of the prompts."""
    dump_every: int = 10
    """Steps between two rollout dumps; 0: none."""

    def __post_init__(self):
        divides = self.mini_batches > 0 and self.prompts_per_step % self.mini_batches == 0
        _require(divides, "train.mini_batches", self.mini_batches, "a divisor of train.prompts_per_step")
        _require(self.group_size > 0, "train.group_size", self.group_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SFTTrainConfig(TrainConfig):
    batch_size: int = 128
    """Conversations an optimizer step."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """A supervised run: `hdpo sft`."""

    output: str
    model: ModelConfig
    data: DataConfig
    mesh: MeshAxes = field(default_factory=MeshAxes)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: SFTTrainConfig = field(default_factory=SFTTrainConfig)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """A reinforcement-learning run: `hdpo train`."""

    output: str
    model: ModelConfig
    data: DataConfig
    mesh: MeshAxes = field(default_factory=MeshAxes)
    agent: AgentConfig = field(default_factory=AgentConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: RLTrainConfig = field(default_factory=RLTrainConfig)
