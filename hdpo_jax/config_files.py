"""Runs are Python files: `get_config()` gives an SFTConfig or an RLConfig, flags override its fields.

Whatever is wrong with one becomes a ConfigError of one line that names the file and the field.
"""

import dataclasses
import difflib
import importlib.util
import json
import traceback
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hdpo_jax.config import AgentConfig, ConfigError, RewardsConfig, RolloutConfig, ToolsConfig

Config = TypeVar("Config")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def config_names() -> list[str]:
    """The runs that `configs/` holds, by name."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def find_config(name: str) -> Path:
    """The file that `name` means: a path to a Python file, or the name of one in configs/."""
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"there is no config file {name}; expected a Python file that defines get_config()")
        return path
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        names = config_names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"configs/ has: {', '.join(names) or 'nothing'}"
        raise ConfigError(f"there is no run named {name!r}; {hint}")
    return path


def load_config(name: str, kind: type[Config]) -> Config:
    """The checked config of the file that `name` points at; ConfigError when it is not a sound `kind`."""
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"hdpo_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} can not be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError("defines no get_config(); expected `def get_config() -> " + kind.__name__ + "`")
        config = get_config()
    except Exception as error:
        raise ConfigError(f"{_where(path, error)}: {_what(error)}") from error
    if not isinstance(config, kind):
        raise ConfigError(f"{path}: get_config() gives {type(config).__name__}; this command takes {kind.__name__}")
    problem = type_problem(config)
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return config


def run_settings(run_dir: Path) -> dict[str, Any]:
    """What a run of `hdpo train` says of agent, rollout, tools and rewards; nothing of a run without rollouts."""
    file = run_dir / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run_dir} holds no config.json; expected the output folder of hdpo train or sft")
    stored = json.loads(file.read_text(encoding="utf-8"))
    kinds = {"agent": AgentConfig, "rollout": RolloutConfig, "tools": ToolsConfig, "rewards": RewardsConfig}
    try:
        return {name: _built(kind, stored[name]) for name, kind in kinds.items() if name in stored}
    except TypeError as error:
        raise ConfigError(
            f"{file} was written by another version: {_what(error)}; give the settings as flags"
        ) from None


def _built(kind: type[Config], stored: Any) -> Config:
    """A dataclass of settings from the JSON that it was stored as."""
    hints = get_type_hints(kind)

    def value(name: str, entry: Any) -> Any:
        nested = dataclasses.is_dataclass(hints.get(name))
        return _built(hints[name], entry) if nested else _tuples(entry)

    return kind(**{name: value(name, entry) for name, entry in stored.items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that settings hold."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def type_problem(config: Any, prefix: str = "") -> str | None:
    """The first field of a (nested) dataclass whose value does not have the annotated type, in words.

    Dataclasses do not check types, and a string among the numbers would only fail far into a run.
    """
    hints = get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, hint, name = getattr(config, entry.name), hints[entry.name], prefix + entry.name
        if dataclasses.is_dataclass(hint) and isinstance(value, type(hint)):
            problem = None
        elif not _fits(value, hint):
            return f"{name} is {value!r}; expected {_spell(hint)}"
        else:
            problem = type_problem(value, f"{name}.") if dataclasses.is_dataclass(value) else None
        if problem:
            return problem
    return None


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _where(path: Path, error: Exception) -> str:
    """`file:line` of the innermost line of the config file that the error came through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _what(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TypeError):
        # "RLConfig.__init__() missing 1 required keyword-only argument: 'output'" and its like.
        return (
            text.replace(".__init__()", "")
            .replace("keyword-only argument", "field")
            .replace("keyword argument", "field")
        )
    if isinstance(error, ConfigError):
        return text
    return f"{type(error).__name__}: {text}"
