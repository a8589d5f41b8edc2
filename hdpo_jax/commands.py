"""The commands of `hdpo`: each a dataclass of its flags with the one call that it makes.

What a command does is imported when it runs: help and refusals come at once.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from hdpo_jax.config import (
    AgentConfig,
    ConfigError,
    Dtype,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
    SFTConfig,
    ToolsConfig,
    ToolServerConfig,
)
from hdpo_jax.config_files import config_names, load_config, run_settings
from hdpo_jax.data.signs_config import SignsConfig
from hdpo_jax.flags import parse_flags
from sharding.mesh import MeshAxes


class Command(Protocol):
    """The flags of a command, filled in."""

    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Cold start, HDPO, evaluation, report and export on built-in data, on a laptop's CPU."""

    out: Path = Path("runs/quickstart")
    """Where everything goes; a run that stopped there is resumed."""
    seed: int = 0
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    signs: SignsConfig = field(default_factory=SignsConfig)

    def run(self) -> None:
        from hdpo_jax import quickstart

        quickstart.run(self.out, self.seed, self.tools, self.signs)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Accuracy and tool use of a model on a file of prompts."""

    model: Path | None = None
    """A model directory in HF format."""
    run_dir: Path | None = None
    """Instead of --model: a run of `hdpo train` or `hdpo sft`, whose newest checkpoint is taken."""
    data: Path
    """A parquet file, or a folder of them, in the Metis-RL schema."""
    output: Path
    """The folder for results.json and the trajectories."""
    settings: Path | None = None
    """A run of `hdpo train` whose agent.*, rollout.*, tools.* and rewards.* are the defaults; without it, --run-dir."""
    samples: int = 1
    """Rollouts a prompt."""
    limit: int = 0
    """Prompts, from the first on; 0: all."""
    calibrate_gate: bool = False
    """Sample once more, with an answer in place of each call; write gate.json (for --agent.gate) and its curve."""
    seed: int = 0
    dtype: Dtype = "bfloat16"
    agent: AgentConfig = field(default_factory=AgentConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def settings_of(self) -> Path | None:
        return self.settings or (self.run_dir if self.model is None else None)

    def run(self) -> None:
        if (self.model is None) == (self.run_dir is None):
            raise ConfigError("expected one of --model and --run-dir")
        from hdpo_jax.evaluate.runner import evaluate

        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        del given["settings"]
        evaluate(**given)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue conversations: one JSON object a line of --messages."""

    model: Path
    """A model directory in HF format."""
    messages: Path
    """JSON lines: {"messages": [{"role", "content"}]}, content as the chat template takes it."""
    output: Path
    """JSON lines: text, token_ids, logprobs, stop_reason, tool_calls."""
    max_new_tokens: int = 1024
    temperature: float = 1.0
    """0 takes the likeliest token."""
    tools: str = "none"
    """Tools to run, separated by commas ("python"), or none: calls are reported, not run."""
    seed: int = 0
    dtype: Dtype = "bfloat16"
    tool_settings: Annotated[ToolsConfig, tyro.conf.arg(name="tools")] = field(default_factory=ToolsConfig)

    def run(self) -> None:
        from hdpo_jax.evaluate.generate import generate_file

        names = () if self.tools == "none" else tuple(self.tools.split(","))
        tools = replace(self.tool_settings, names=names)
        generate_file(
            self.model,
            self.messages,
            self.output,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            tools=tools if names or tools.functions or tools.mcp else None,
            seed=self.seed,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """Teacher-forced log-probs of conversations: arrays token_ids_i and logprobs_i for line i."""

    model: Path
    """A model directory in HF format."""
    messages: Path
    """JSON lines: {"messages": [{"role", "content"}]}, content as the chat template takes it."""
    output: Path
    """An npz file. logprobs_i[t] = log p(token t | tokens before it); entry 0 is NaN."""
    add_generation_prompt: bool = False
    """Open an assistant turn after the last message."""
    dtype: Dtype = "bfloat16"

    def run(self) -> None:
        from hdpo_jax.evaluate.score import score_file

        score_file(
            self.model,
            self.messages,
            self.output,
            add_generation_prompt=self.add_generation_prompt,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class ImportHF:
    """HF safetensors to an Orbax checkpoint."""

    model: Path
    """A model directory in HF format."""
    checkpoint: Path
    """The directory to write."""

    def run(self) -> None:
        from hdpo_jax.evaluate.convert import import_hf

        import_hf(self.model, self.checkpoint)
        print(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class ExportHF:
    """A checkpoint, also one of a training run, to HF safetensors that transformers loads as they are."""

    checkpoint: Path
    """A directory of `hdpo import-hf`, or a run directory: its newest checkpoint."""
    output: Path
    """The model directory to write."""
    dtype: Dtype | None = None
    """Of the tensors written; by default what the config.json of the base model says."""

    def run(self) -> None:
        from hdpo_jax.evaluate.convert import export_hf
        from sharding.multihost import is_lead
        from sharding.watch import job

        with job():
            export_hf(self.checkpoint, self.output, self.dtype)
            if is_lead():
                print(self.output)


SERVING = RolloutConfig(slots=16, capacity=16_384, patches=65_536, chunk=16)
"""What answers are sampled with where no flag says otherwise: few at a time, and told of often."""

CHATTING = ((1, 256, 0), (1, 1_024, 4_096), (1, 4_096, 16_384))
"""Static sizes for one who talks: few programs to compile."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer OpenAI-compatible requests (/v1/models, /v1/chat/completions), with images, for many clients at a time."""

    model: Path
    """A model directory in HF format."""
    host: str = "127.0.0.1"
    """Beyond this machine only with a secret in HDPO_SERVE_TOKEN, which clients send as their API key."""
    port: int = 8000
    """0: a free one."""
    name: str = ""
    """What the model is called; by default its directory's name."""
    agent_loop: Annotated[bool, tyro.conf.arg(name="agent")] = False
    """Run the model's tool calls here (tools.*) and answer with its last turn; else they are the client's."""
    waiting: int = 256
    """Requests that may wait for a slot; more get 429."""
    body_mb: int = 64
    """Of a request, images included."""
    drain_seconds: float = 60.0
    """How long requests may still be answered after SIGTERM."""
    seed: int = 0
    dtype: Dtype = "bfloat16"
    mesh: MeshAxes = field(default_factory=MeshAxes)
    limits: Annotated[AgentConfig, tyro.conf.arg(name="agent")] = field(default_factory=AgentConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    rollout: RolloutConfig = SERVING

    def run(self) -> None:
        from hdpo_jax.serve.command import run_server

        run_server(
            self.model,
            host=self.host,
            port=self.port,
            name=self.name,
            agent_loop=self.agent_loop,
            waiting=self.waiting,
            body_mb=self.body_mb,
            drain_seconds=self.drain_seconds,
            seed=self.seed,
            dtype=self.dtype,
            mesh=self.mesh,
            agent=self.limits,
            tools=self.tools,
            rollout=self.rollout,
        )


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation in the terminal, with images and tools; every call and its result is shown."""

    model: Path
    """A model directory in HF format."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    seed: int | None = None
    """The same one gives the same answers; None: others each time."""
    dtype: Dtype = "bfloat16"
    mesh: MeshAxes = field(default_factory=MeshAxes)
    agent: AgentConfig = field(default_factory=AgentConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    rollout: RolloutConfig = field(default_factory=lambda: replace(SERVING, slots=1, shapes=CHATTING))

    def run(self) -> None:
        from hdpo_jax.serve.chat import run_chat

        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        run_chat(**given)


@dataclass(frozen=True, kw_only=True)
class ServeTools:
    """A tool server: runs the tools of trajectories that are sampled elsewhere (their --tools.servers).

    Beyond this machine, HDPO_TOOLS_TOKEN in the environment is the secret that trainers show.
    """

    host: str = "127.0.0.1"
    port: int = 8700
    """0 takes a free one."""
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    server: ToolServerConfig = field(default_factory=ToolServerConfig)

    def run(self) -> None:
        from hdpo_jax.tools.server import serve_tools

        serve_tools(self.tools, self.server, host=self.host, port=self.port)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained HTML page of a run: curves and a trajectory browser."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The output folder of hdpo quickstart, sft or train."""

    def run(self) -> None:
        from hdpo_jax.evaluate.report import write_report

        print(write_report(self.run_dir))


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """An index of documents for the text_search tool (tools.text_search.index)."""

    documents: Path
    """JSON lines (.jsonl, .jsonl.gz), or a folder of them: {"title", "text", "url"}; text may be called contents,
    content or body, url also link."""
    output: Path
    """The file to write."""

    def run(self) -> None:
        from hdpo_jax.tools.search.build import build_text_index

        build_text_index(self.documents, self.output)


@dataclass(frozen=True, kw_only=True)
class DataIndexImages:
    """An index of images for the image_search tool (tools.image_search.path)."""

    images: Path
    """A folder of image files. A metadata.jsonl in it may give titles and addresses: {"file", "title", "url"}; else an
    image's title is its file name."""
    output: Path
    """The file to write."""

    def run(self) -> None:
        from hdpo_jax.tools.search.build import build_image_index

        build_image_index(self.images, self.output)


COMMANDS: dict[str, type[Command]] = {
    "quickstart": Quickstart,
    "eval": Eval,
    "generate": Generate,
    "score": Score,
    "import-hf": ImportHF,
    "export-hf": ExportHF,
    "serve": Serve,
    "chat": Chat,
    "serve-tools": ServeTools,
    "report": Report,
}
GROUPS: dict[str, dict[str, type[Command]]] = {
    "data": {
        "index": DataIndex,
        "index-images": DataIndexImages,
    },
}
"""Commands of two words."""
RUNS: dict[str, type[SFTConfig] | type[RLConfig]] = {"sft": SFTConfig, "train": RLConfig, "plan": RLConfig}
"""Commands that take a config, and of what kind."""


def run_command(name: str, flags: Sequence[str]) -> None:
    """Runs a command; ConfigError where there is none of that name, or the flags do not fit it."""
    if name in GROUPS:
        _run_in_group(name, flags)
    elif name == "plan":
        _plan(flags)
    elif name in RUNS:
        _train(name, flags)
    elif name in COMMANDS:
        command = parse_flags(COMMANDS[name], flags, program=f"hdpo {name}")
        if isinstance(command, Eval) and (run := command.settings_of):
            # Once more: what the run's settings are to this command, flags may override.
            command = parse_flags(Eval, flags, program=f"hdpo {name}", default=replace(command, **run_settings(run)))
        command.run()
    else:
        known = ", ".join([*RUNS, *COMMANDS, *GROUPS])
        raise ConfigError(f"there is no command {name!r}; expected one of {known}")


def _run_in_group(group: str, words: Sequence[str]) -> None:
    """Runs the command that the words begin with."""
    commands = GROUPS[group]
    known = ", ".join(commands)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise ConfigError(f"hdpo {group} COMMAND: a command comes first, one of {known}")
    name, *flags = words
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = (f"  {known:<{width}}  {(kind.__doc__ or '').splitlines()[0]}" for known, kind in commands.items())
        print(
            f"usage: hdpo {group} COMMAND [OPTIONS]\n",
            *lines,
            f"\n`hdpo {group} COMMAND --help` lists the flags.",
            sep="\n",
        )
    elif name in commands:
        parse_flags(commands[name], flags, program=f"hdpo {group} {name}").run()
    else:
        raise ConfigError(f"there is no command {group} {name!r}; expected one of {known}")


def _config(name: str, flags: Sequence[str], note: str = "") -> SFTConfig | RLConfig:
    """The config that the flags begin with, overridden by the others."""
    kind, program = RUNS[name], f"hdpo {name} CONFIG"
    choices = f"CONFIG is a Python file that defines get_config() -> {kind.__name__}, or a name: "
    choices += ", ".join(config_names()) or "(configs/ is empty)"
    if flags and flags[0] in ("-h", "--help"):
        parse_flags(kind, ["--help"], program=program, description=f"{kind.__doc__}\n\n{choices}{note}")
    if not flags or flags[0].startswith("-"):
        raise ConfigError(f"{program}: a config comes first. {choices}")
    path, *overrides = flags
    return parse_flags(kind, overrides, program=f"hdpo {name} {path}", default=load_config(path, kind))


def _train(name: str, flags: Sequence[str]) -> None:
    config = _config(name, flags)
    from sharding.watch import job

    with job():
        if isinstance(config, SFTConfig):
            from hdpo_jax.train.sft import train_sft

            result = train_sft(config)
        else:
            from hdpo_jax.train.rl import train_rl

            result = train_rl(config)
    result.require_finished(config.output)


def _plan(flags: Sequence[str]) -> None:
    settings = [flag for flag in flags if flag != "--json"]
    config = _config("plan", settings, note="\n\n--json prints an object instead of a table.")
    assert isinstance(config, RLConfig)
    from hdpo_jax.plan.command import PLANS, plan

    plan(config, as_json=len(settings) < len(flags), cache=PLANS)
