"""What `tools.mcp` names: a command line that is started, or a web address, each with the secrets that it may have.

    uvx some-server --flag
    MODE=fast API_KEY=$SEARCH_KEY npx some-server
    https://host/mcp
    TOKEN=$HOST_TOKEN https://host/mcp

A value `$NAME` is taken from this process's environment, so that secrets stay out of configs. Nothing else of the
environment gets to a server but PATH, HOME and LANG. `TOKEN` is the bearer token of a web address.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hdpo_jax.config import ConfigError

INHERITED = ("PATH", "HOME", "LANG")
"""Of the environment, what servers get unasked."""

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A server to start or to ask; secrets are in what is not shown."""

    label: str
    """For messages: the command or the address without what may be secret."""
    command: Sequence[str] = field(default=(), repr=False)
    url: str = field(default="", repr=False)
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Those that the entry names, with their values."""

    @property
    def environment(self) -> dict[str, str]:
        """All that a started server knows of ours."""
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        return inherited | dict(self.variables)


def parse(text: str) -> Entry:
    """Raises ConfigError, one line without values of variables, for what names no server."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"tools.mcp has an entry that is no command line: {str(error).lower()}") from None
    variables: dict[str, str] = {}
    while words and (assignment := _ASSIGNMENT.fullmatch(words[0])):
        variables[assignment[1]] = _value(*assignment.groups())
        words.pop(0)
    if not words:
        raise ConfigError("tools.mcp has an entry without a server; expected a command line or a web address")
    if not words[0].startswith(("http://", "https://")):
        return Entry(label=" ".join(words)[:80], command=words, variables=variables)
    url = words[0]
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    label = f"{parts.scheme}://{host}{parts.path}"[:80]
    if not host or len(words) > 1 or {*variables} - {"TOKEN"}:
        raise ConfigError(
            f"tools.mcp: {label} comes with more than an address; expected [TOKEN=$NAME] http://host/path"
        )
    return Entry(label=label, url=url, variables=variables)


def _value(name: str, value: str) -> str:
    if not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise ConfigError(f"tools.mcp: {name}={value}: the environment has no {value[1:]}; set it, or leave it out")
    return os.environ[value[1:]]
