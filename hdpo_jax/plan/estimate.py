"""A run's programs, compiled for its slice and counted."""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hdpo_jax.config import ConfigError, RLConfig
from hdpo_jax.plan.hlo import Cost, Module
from hdpo_jax.plan.kernels import kernel_costs
from hdpo_jax.plan.programs import Program, Setting, learning_programs, rollout_programs
from hdpo_jax.plan.topology import Chip, Topology
from hdpo_jax.plan.workload import Need, Workload
from hdpo_jax.rollout.scheduler import SHARERS
from models import logprobs
from models.qwen3_vl import Qwen3VLConfig, read_config
from models.qwen3_vl.sizes import published_config

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One program; all figures are of one chip."""

    hbm_bytes: float
    """Arguments, results and temporaries when they are most, and the code: what the compiler refuses programs by."""
    argument_bytes: float
    temporary_bytes: float
    tokens: float
    """That one call computes, on all chips."""
    flops: float
    model_flops: float
    bytes_moved: float
    collectives: Mapping[str, float]
    seconds: float
    """At the roofline: the slowest of arithmetic, memory and links, as if the others cost nothing."""
    compile_seconds: float
    unknown_loops: tuple[str, ...]
    """Loops that were counted once, for nothing says how often they run."""

    @classmethod
    def too_large(cls, needed: float) -> "Estimate":
        """Of a program that the compiler refused: what it needs is known, but neither what of it is temporary, nor
        what the program does."""
        return cls(
            hbm_bytes=needed,
            argument_bytes=0,
            temporary_bytes=0,
            tokens=0,
            flops=0,
            model_flops=0,
            bytes_moved=0,
            collectives={},
            seconds=0,
            compile_seconds=0,
            unknown_loops=(),
        )

    @property
    def collective_bytes(self) -> float:
        return sum(self.collectives.values())


class DoesNotFit(Exception):
    """The compiler found no room; `needed` bytes of a device, arguments included, as far as it says."""

    def __init__(self, needed: float):
        super().__init__(f"{needed / 2**30:.1f} GiB")
        self.needed = needed


def programs_of(setting: Setting) -> Mapping[str, Program]:
    return {**rollout_programs(setting), **learning_programs(setting)}


def estimate(name: str, program: Program, setting: Setting, topology: Topology) -> Estimate:
    """Compiles one of `programs_of`. Raises DoesNotFit where it needs more memory than a chip has."""
    started = time.perf_counter()
    compiled = _compile(program, setting)
    seconds = time.perf_counter() - started
    workload = Workload.of(setting.config, setting.sizes)
    cores = topology.chip.devices
    module = Module(
        compiled.as_text(),
        trips=loop_trips(name, setting, workload),
        kernels=kernel_costs(name, setting, workload),
    )
    memory = compiled.memory_analysis()
    # Not the sum of arguments and `temp_size_in_bytes`, which counts what loops hold in turn side by side.
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = module.cost
    return Estimate(
        hbm_bytes=cores * needed,
        argument_bytes=cores * arguments,
        temporary_bytes=cores * (needed - arguments),
        tokens=tokens_of(name, setting),
        flops=cores * cost.flops,
        model_flops=model_flops(name, setting, workload) / topology.chips,
        bytes_moved=cores * cost.bytes,
        collectives={kind: cores * sent for kind, sent in cost.collectives.items()},
        seconds=roofline(cost, topology.chip),
        compile_seconds=seconds,
        unknown_loops=tuple(sorted(module.unknown_loops)),
    )


def _compile(program: Program, setting: Setting) -> Any:
    with jax.set_mesh(setting.mesh):
        lowered = program.function.lower(*program.arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _asked(str(error))
            log.debug("%s", error)
            if needed is None:
                raise
            raise DoesNotFit(needed) from None


def _asked(message: str) -> float | None:
    """Bytes that a refusal of the compiler names."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds available HBM", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return float(found[1]) * 1024.0 ** (1 + "KMGT".index(found[2]))


def roofline(cost: Cost, chip: Chip) -> float:
    """Seconds that a device needs at least."""
    share = 1 / chip.devices
    return max(
        cost.flops / (chip.flops * share),
        cost.bytes / (chip.hbm_bandwidth * share),
        sum(cost.collectives.values()) / (chip.links * share),
    )


def loop_trips(name: str, setting: Setting, workload: Workload) -> Mapping[str, float]:
    """How often the loops run that stop when the data says so, by the scope that the source gives them."""
    config = setting.config
    rollout, train = config.rollout, config.train
    steps = train.mini_batches if name == "update" else 1
    micro_batches = -(-train.max_rows // train.micro_batch_rows) / steps
    rows = train.micro_batch_rows / setting.shards("batch")
    span = logprobs.BLOCK * setting.shards("tokens") / max(rows, 1)
    own = workload.response / 2
    return {
        "micro_batches": micro_batches,
        "vocabulary": -(-workload.response // span),
        "steps": rollout.chunk,
        "groups.*pages": -(-workload.prompt // rollout.page),
        "groups": max(1.0, rollout.slots / setting.shards("slots") / SHARERS),
        "pages": -(-own // rollout.page),
    }


def tokens_of(name: str, setting: Setting) -> int:
    """How many tokens one call of a program computes, on all chips."""
    rollout, train = setting.config.rollout, setting.config.train
    if name == "decode":
        return rollout.slots * rollout.chunk
    if name in ("prefill", "append"):
        rows, tokens, _ = setting.extension(name)
        return rows * tokens
    return train.max_rows * train.row_tokens


def model_flops(name: str, setting: Setting, workload: Workload) -> float:
    """What the model itself needs for what the program does, on all chips."""
    config, need = setting.config, Need(setting.sizes)
    if name == "decode":
        tokens = tokens_of(name, setting)
        return need.tokens(tokens, workload.keys(name)) + need.logits(tokens)
    if name in ("prefill", "append"):
        rows, tokens, patches = setting.extension(name)
        seen = rows * need.tokens(tokens, workload.keys(name, tokens))
        return seen + rows * need.patches(patches, min(workload.image, patches or 1))
    forward = workload.rows * (
        need.tokens(workload.tokens, workload.keys(name, workload.tokens))
        + need.logits(workload.response)
        + need.patches(config.train.row_patches, workload.image)
    )
    # Forward and backward; before an update, the old log-probs.
    return forward * (4 if name == "update" else 3)


def check(config: RLConfig) -> None:
    """What a plan needs to be told."""
    if not config.topology:
        raise ConfigError("topology is not set; expected the slice that the run is for, as in --topology v5p:4x4x4")
    if not config.train.max_rows:
        raise ConfigError("train.max_rows is 0; expected the rows of a step, for which its programs are compiled")


def sizes_of(config: RLConfig) -> Qwen3VLConfig:
    """The model's sizes: those of its directory where it is here, else the published ones of `model.size`."""
    if (Path(config.model.path) / "config.json").is_file():
        return read_config(config.model.path)
    if config.model.size:
        return published_config(config.model.size)
    raise ConfigError(f"model.path {config.model.path!r} is not here; expected model.size beside it, as in 8B")
