"""Command lines of `hdpo` as launch/ and README.md state them, read by the flags parser of `hdpo` itself."""

import dataclasses
import math
from collections.abc import Sequence

from hdpo_jax.commands import COMMANDS, RUNS, Command
from hdpo_jax.config import RLConfig, SFTConfig
from hdpo_jax.config_files import load_config
from hdpo_jax.flags import parse_flags


def parse(arguments: Sequence[str]) -> RLConfig | SFTConfig | Command:
    """What `hdpo` would run for `arguments`; ConfigError where the config is not there or a flag does not fit."""
    name, *flags = arguments
    if name in RUNS:
        config, *overrides = flags
        return parse_flags(RUNS[name], overrides, program=f"hdpo {name}", default=load_config(config, RUNS[name]))
    return parse_flags(COMMANDS[name], flags, program=f"hdpo {name}")


def devices_of_mesh(config: RLConfig | SFTConfig, given: int) -> int:
    """Devices that the config's mesh takes up where there are `given`."""
    sizes = dataclasses.asdict(config.mesh).values()
    fixed = math.prod(size for size in sizes if size != -1)
    return given // fixed * fixed if -1 in sizes else fixed
