"""The settings of a run, as frozen dataclasses checked at construction."""

from dataclasses import dataclass, field, replace
from typing import Literal

from hdpo_jax.config.checks import at_least, more_than_zero, require, share
from hdpo_jax.config.rewards import RewardsConfig
from hdpo_jax.config.tools import ToolsConfig
from sharding.mesh import MeshAxes

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """A Qwen3-VL or (text only) Qwen3 directory in HF format."""
    size: str = ""
    """The published size this is, as in 8B: `hdpo plan` takes it where the directory is not at hand."""
    dtype: Dtype = "bfloat16"
    """Activations and matrix products."""
    param_dtype: Dtype = "float32"
    """Master weights."""
    remat: Literal["nothing", "full", "save_attention", "offload"] = "full"
    """What the backward pass computes anew: nothing; every layer from its input (full); the same, with the outputs of
    attention kept (save_attention), or with the layers' inputs waiting in host memory (offload)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str
    """A parquet file, a folder of them, or a folder that tensorflow-datasets prepared as ArrayRecord (its split
    "train", or the one whose name stands behind it), in the Metis-RL (train) or Metis-ColdStart (sft) schema."""
    workers: int = 0
    """Grain worker processes that read rows; 0 reads in the main process."""
    cache_mb: int = 2_048
    """Prompts and conversations stay encoded, images resized, while they fit this much host memory."""
    max_bad_rows: float = 0.01
    """Share of unusable rows past which a run stops instead of skipping them."""

    def __post_init__(self):
        at_least(self, "data", 0, "workers", "cache_mb")
        share(self, "data", "max_bad_rows")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    max_calls: int = 10
    """Tool calls a trajectory may send; one more ends it."""
    max_response_tokens: int = 16_384
    """Tokens after the prompt, observations included."""
    max_observation_tokens: int = 8_192
    """Tokens of one observation, chat wrapper included; a longer one loses images from the end, then its middle."""
    call_seconds: float = 120.0
    """A tool call that has not answered by then is given up: the policy sees an error, and goes on."""
    gate: str = ""
    """Not while training: the gate.json of `hdpo eval --calibrate-gate`, by which calls of little worth are answered
    instead. Empty: every call is sent."""
    gate_threshold: float = 0.5
    """Worth from which on a call is sent: the share of such calls that turned a wrong answer into a right one."""

    def __post_init__(self):
        at_least(self, "agent", 0, "max_calls")
        more_than_zero(self, "agent", "call_seconds")
        at_least(self, "agent", 1, "max_response_tokens", "max_observation_tokens")
        share(self, "agent", "gate_threshold")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    mode: Literal["host_driven", "fused"] = "host_driven"
    """fused: rollouts, rewards and update in one program, which calls the host for tools. Same results."""
    slots: int = 64
    """Trajectories that decode at a time."""
    in_flight: int = 0
    """Trajectories under way at a time, those that wait for tools included; 0: twice the slots."""
    capacity: int = 41_984
    """Tokens of a trajectory, at most: prompt and response."""
    patches: int = 131_072
    """Image patches of a trajectory, at most."""
    page: int = 64
    """Tokens in a page of the key-value cache."""
    pages: int = 0
    """Pages in the cache; 0: as many as fill every slot to its capacity. With fewer, what waits longest for a tool
    is computed anew when they run out."""
    chunk: int = 64
    """Decode steps between two looks of the host, at most."""
    return_early: float = 0.25
    """Share of the running slots that may wait for the host before a chunk ends early."""
    gather_seconds: float = 0.05
    """How long the host waits for tools while less than half the slots can decode, before it decodes without them."""
    shapes: tuple[tuple[int, int, int], ...] = (
        (1, 256, 0),
        (8, 256, 0),
        (8, 1_024, 0),
        (2, 1_024, 4_096),
        (2, 4_096, 16_384),
        (1, 8_192, 32_768),
    )
    """Static sizes (rows, tokens, image patches) in which prompts and observations are computed: each in the first
    that holds it, what no size holds in parts. Of those with other rows only, the smallest that holds the batch."""
    parameters: Literal["sharded", "gathered"] = "sharded"
    """Where a decode step reads them from. gathered: a copy for the time of the rollouts, in model.dtype and split over
    mesh.tensor only; it takes that memory, and spares every step the gathering over mesh.fsdp."""
    replay_experts: bool = False
    """Of a mixture of experts: what is learned from a token goes through the experts that it went through when it was
    sampled, whatever the router would choose by now or in other arithmetic. On host and device a token takes a byte for
    each, layer by layer: 384 for a 30B-A3B."""
    longest_first: bool = True
    """Prompts whose rollouts were long before start first."""
    temperature: float = 1.0
    top_k: int = 0
    """0: no truncation."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are left out; 0: none."""
    force_end: bool = False
    """Write the end of the turn, unsampled, as the last token of a spent budget."""

    def __post_init__(self):
        at_least(self, "rollout", 1, "slots", "capacity", "page", "chunk")
        at_least(self, "rollout", 0, "in_flight", "patches", "pages", "gather_seconds", "temperature", "top_k")
        for name in ("return_early", "top_p"):
            require(0 < getattr(self, name) <= 1, f"rollout.{name}", getattr(self, name), "a share in (0, 1]")
        require(0 <= self.min_p < 1, "rollout.min_p", self.min_p, "a share in [0, 1)")
        sound = all(rows > 0 < tokens and patches >= 0 for rows, tokens, patches in self.shapes)
        in_order = sorted(self.shapes, key=lambda shape: (shape[1:], shape[0]))
        require(
            len(self.shapes) > 0 and sound and list(self.shapes) == in_order,
            "rollout.shapes",
            self.shapes,
            "triples (rows > 0, tokens > 0, patches >= 0) by tokens, patches and rows, at least one",
        )
        least = self.pages_a_row + 1
        require(self.pages == 0 or self.pages >= least, "rollout.pages", self.pages, f"0, or at least {least}")

    @property
    def pages_a_row(self) -> int:
        """Pages of a trajectory at its capacity."""
        return -(-self.capacity // self.page)

    @property
    def image_patches(self) -> int:
        """Patches of one image, at most: an image is computed in one piece."""
        return min(self.patches, max(patches for _, _, patches in self.shapes))

    def pages_per_lane(self, lanes: int) -> int:
        """Pages in each of so many parts of the mesh, page 0 included, which belongs to nobody."""
        pages = self.pages or self.slots * self.pages_a_row
        return 1 + max(-(-pages // lanes), self.pages_a_row + 1)

    def share(self, own: int, lanes: int) -> "RolloutConfig":
        """What a process runs that has `own` of the lanes; each is as large as where one process has them all."""
        return replace(
            self,
            slots=own * -(-self.slots // lanes),
            in_flight=-(-self.in_flight * own // lanes),
            pages=own * (self.pages_per_lane(lanes) - 1),
            shapes=tuple((own * max(1, rows // lanes), tokens, patches) for rows, tokens, patches in self.shapes),
        )


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
    importance_cap: float = 0.0
    """Truncated importance sampling: a token's loss is multiplied by its probability before the update over the one
    that it was drawn with, at most by this. 0: not at all, which is right where the same policy does both."""

    def __post_init__(self):
        at_least(self, "algorithm", 0, "coupling", "w_acc", "w_tool", "clip_low", "clip_high")
        cap = self.importance_cap
        require(cap == 0 or cap >= 1, "algorithm.importance_cap", cap, "0 (off), or at least 1")
        require(self.dual_clip > 1, "algorithm.dual_clip", self.dual_clip, "more than 1")


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
    moments: Dtype = "float32"
    """What the optimizer remembers of each parameter: AdamW's two moments, Muon's momentum."""

    def __post_init__(self):
        more_than_zero(self, "optimizer", "learning_rate", "muon_learning_rate", "clip_norm")
        at_least(self, "optimizer", 0, "warmup_steps", "weight_decay")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "a share in [0, 1)")
            # bfloat16 has 8 bits: what is to fall by less than 1/256 may round to itself, and would never fall.
            kept = self.moments == "float32" or getattr(self, name) <= 0.995
            require(kept, f"optimizer.{name}", getattr(self, name), "at most 0.995 with optimizer.moments bfloat16")


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
    """Rows that the static batch holds; 0: as many as the first batch needs, and a quarter more. A later batch that
    needs more gets them, at the price of a compilation."""

    def __post_init__(self):
        at_least(self, "train", 1, "steps", "checkpoint_every", "keep_checkpoints", "row_tokens", "micro_batch_rows")
        at_least(self, "train", 0, "row_patches", "max_rows")


@dataclass(frozen=True, kw_only=True)
class RLTrainConfig(TrainConfig):
    row_tokens: int = 41_984
    row_patches: int = 131_072
    prompts_per_step: int = 128
    group_size: int = 16
    mini_batches: int = 2
    """Optimizer steps a rollout step, each on an equal share of the prompts."""
    dump_every: int = 10
    """Steps between two rollout dumps; 0: none."""
    off_policy_steps: int = 0
    """1: while a step's update runs, the next step's rollouts are already sampled, with the parameters that the update
    began with: `algorithm.importance_cap` weighs what they have become since. Costs the memory of a second copy of the
    parameters, in `model.param_dtype`, and of the key-value cache, both beside the update. The first step, and the
    first after a resume, is sampled on-policy. 0: sampling and learning take turns, exactly on-policy."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "train", 0, "dump_every")
        at_least(self, "train", 1, "prompts_per_step", "group_size")
        require(self.off_policy_steps in (0, 1), "train.off_policy_steps", self.off_policy_steps, "0 or 1")
        divides = self.mini_batches > 0 and self.prompts_per_step % self.mini_batches == 0
        require(divides, "train.mini_batches", self.mini_batches, "a divisor of train.prompts_per_step")


@dataclass(frozen=True, kw_only=True)
class SFTTrainConfig(TrainConfig):
    batch_size: int = 128
    """Conversations an optimizer step."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "train", 1, "batch_size")


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
    topology: str = ""
    """The TPU slice that it is for, as in v5p:4x4x4: `hdpo plan` compiles for it. A run takes the devices it finds."""
    model: ModelConfig
    data: DataConfig
    mesh: MeshAxes = field(default_factory=MeshAxes)
    agent: AgentConfig = field(default_factory=AgentConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: RLTrainConfig = field(default_factory=RLTrainConfig)

    def __post_init__(self):
        """Rows hold whatever the budgets allow: else a run would end in the middle, over one trajectory."""
        require(not self.agent.gate, "agent.gate", self.agent.gate, "none while training: it is a dial for inference")
        for name, least in (("row_tokens", self.rollout.capacity), ("row_patches", self.rollout.patches)):
            found = getattr(self.train, name)
            require(found >= least, f"train.{name}", found, f"at least {least}, which rollout.* allows a trajectory")
        if self.train.off_policy_steps:
            apart = self.rollout.mode != "fused"
            require(apart, "train.off_policy_steps", 1, "0 with rollout.mode fused: one program takes turns")
            cap = self.algorithm.importance_cap
            require(cap > 0, "algorithm.importance_cap", cap, "one for train.off_policy_steps 1, e.g. 2.0")
        known = self.rollout.mode != "fused" or self.train.max_rows > 0
        require(known, "train.max_rows", 0, "the rows of a batch, at most: rollout.mode fused compiles for them")
