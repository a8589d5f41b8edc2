"""Command-line flags from type annotations, by tyro, with every refusal told in one line."""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from hdpo_jax.config import ConfigError

Parsed = TypeVar("Parsed")

# No --no-x beside --x, and RUN-DIR instead of PATH for what has no flag.
MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
RULE = "-----"


def parse_flags(target: Callable[..., Parsed], flags: Sequence[str], *, program: str, **options: Any) -> Parsed:
    """The `target` dataclass filled from `flags`; `options` are those of tyro.cli, `default` among them.

    ConfigError where the flags do not fit. `--help` prints and exits with status 0.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, args=list(flags), prog=program, config=MARKERS, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(complaint.getvalue(), program)) from None


def _one_line(box: str, program: str) -> str:
    """The gist of tyro's boxed complaint: its message, and the option that was probably meant."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    ruled = [RULE if re.fullmatch(r"\W*[-\u2500]{5,}\W*", line) else line for line in plain.splitlines()]
    unframed = [re.sub(r"[\u2500-\u257f]", "", line).strip() for line in ruled]
    _title, *lines = filter(None, unframed)
    parts = []
    for rule, section in itertools.groupby(lines, key=RULE.__eq__):
        head, *rest = section
        if rule or head.startswith("For full helptext"):
            continue
        if head.startswith(("Perhaps you meant", "Argument helptext")):
            parts += [f"there is {rest[0]}"] if rest else []
        elif head.startswith("Missing from"):
            parts.append("missing " + ", ".join(line for line in rest if re.match("--|[A-Z-]+$", line)))
        else:
            parts.append(" ".join([head, *rest]).removesuffix(".").removeprefix("Error parsing "))
    return "; ".join([*parts, f"see {program} --help"])
