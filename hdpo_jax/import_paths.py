"""Objects of the user's own code, by import path: `module:name` or `path/to/file.py:name`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hdpo_jax.config import ConfigError


def load(path: str, setting: str) -> Any:
    """What an import path names. Modules are looked for where Python does, and then in the working directory.

    Raises ConfigError, one line that names `setting`, when there is no such file, module or name in it, or importing
    it fails.
    """
    module_path, colon, name = path.rpartition(":")
    if not (colon and module_path and name):
        raise ConfigError(f"{setting} holds {path!r}; expected module:name or file.py:name")
    try:
        module = _file(Path(module_path)) if module_path.endswith(".py") else _module(module_path)
    except _Missing as error:
        raise ConfigError(f"{setting} holds {path!r}: {error}") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{setting} holds {path!r}: importing it failed: {reason}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{setting} holds {path!r}: {module_path} has no {name}")
        found = getattr(found, part)
    return found


class _Missing(Exception):
    """There is nothing to import; says where it was looked for."""


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if not {"", here} & {*sys.path}:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module may be there, and what it imports may not.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise _Missing(f"there is no module {name}, neither installed nor in {here}") from None


def _file(path: Path) -> ModuleType:
    """A file as a module: once, however often it is named."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise _Missing(f"there is no file {path}")
    name = f"hdpo_jax_file{str(path.with_suffix('')).replace('.', '_').replace('/', '.')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    # Type hints are resolved through it.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
