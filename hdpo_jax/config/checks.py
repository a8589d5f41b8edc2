"""What every config checks of itself at construction: one line says what is wrong."""

import os
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
    """A setting is missing, unknown or out of range; the message names it and says what to do."""


def require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {found!r}; expected {expected}")


def at_least(config: object, prefix: str, least: float, *names: str) -> None:
    for name, value in _numbers(config, names):
        require(value >= least, f"{prefix}.{name}", value, f"at least {least:g}")


def more_than_zero(config: object, prefix: str, *names: str) -> None:
    for name, value in _numbers(config, names):
        require(value > 0, f"{prefix}.{name}", value, "more than 0")


def share(config: object, prefix: str, *names: str) -> None:
    for name, value in _numbers(config, names):
        require(0 <= value <= 1, f"{prefix}.{name}", value, "a share from 0 to 1")


def bearer_token(variable: str) -> str | None:
    """The secret that servers ask for and clients show, from the environment; None: there is none."""
    # Secrets that a shell made often end with a line break.
    token = os.environ.get(variable, "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{variable} holds characters that HTTP can not send; expected printable ASCII without spaces"
        )
    return token or None


def _numbers(config: object, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    """The settings that are numbers; `config_files` refuses the others, by their declared types."""
    values = ((name, getattr(config, name)) for name in names)
    return ((name, value) for name, value in values if isinstance(value, int | float))
