"""The tools of a run, and a trajectory's view of them."""

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.functions import FunctionTool
from hdpo_jax.tools.image_search import ImageSearchTool
from hdpo_jax.tools.protocol import ALIASES, SCHEMAS, Schema, Subject, Tool, Tools, ToolSession, argument_error
from hdpo_jax.tools.python_sandbox import PythonTool
from hdpo_jax.tools.text_search import TextSearchTool
from hdpo_jax.types import Observation, ToolCall

TOOLS = {"python": PythonTool, "text_search": TextSearchTool, "image_search": ImageSearchTool}

logger = logging.getLogger(__name__)


def open_toolbox(config: ToolsConfig) -> Tools:
    """The tools of a run: on the servers that the configuration names, or in this process where it names none.

    Raises ConfigError, one line, when they do not work.
    """
    if not config.servers:
        return ToolBox(config)
    # Only those who use servers wait for it.
    from hdpo_jax.tools.client import RemoteToolBox

    return RemoteToolBox(config)


class ToolBox:
    """Opens the tools that the configuration names: built-in ones, functions, those of MCP servers. Closes them, and
    all sessions, at the end.

    Raises ConfigError, one line, when a tool is unknown, does not work on this machine or has another's name.
    """

    def __init__(self, config: ToolsConfig):
        self.workers = config.workers
        """Calls that may run at a time."""
        self._tools: dict[str, Tool] = {}
        self._opened = ExitStack()
        try:
            self._open(config)
            self._refuse_repeats = _known([*SCHEMAS, *self._tools, "all"], config.refuse_repeats)
        except BaseException:
            self.close()
            raise

    def _open(self, config: ToolsConfig) -> None:
        unknown = [name for name in config.names if name not in TOOLS]
        if unknown:
            raise ConfigError(f"tools.names holds {unknown[0]!r}; expected names among {', '.join(TOOLS)}")
        for name in config.names:
            self._add(TOOLS[name](config), "tools.names")
        for path in config.functions:
            self._add(FunctionTool(path, config), f"tools.functions: {path}")
        if config.mcp:
            from hdpo_jax.tools.mcp import McpServers  # takes seconds, and few runs need it

            servers = McpServers(config)
            self._opened.callback(servers.close)
            for tool in servers.tools:
                self._add(tool, f"tools.mcp: {tool.server}")

    def _add(self, tool: Tool, origin: str) -> None:
        self._opened.callback(tool.close)
        if tool.name in ALIASES:
            taken = f"which is short for {ALIASES[tool.name]}"
        elif tool.name in self._tools:
            taken = "and so does another tool"
        else:
            self._tools[tool.name] = tool
            return
        raise ConfigError(f"{origin} has the name {tool.name!r}, {taken}; expected a name for each tool")

    @property
    def schemas(self) -> list[Schema]:
        """The open tools, as a chat template's system prompt takes them."""
        return [tool.schema for tool in self._tools.values()]

    def tool(self, name: str) -> Tool:
        """An open tool. Raises KeyError for others."""
        return self._tools[name]

    def session(self, images: Sequence[bytes], keys: Sequence[str] = ()) -> "Session":
        """One trajectory's tools.

        `images`: the prompt's original files. `keys`: names under which data sets know it.
        """
        return Session(self._tools, Subject(images=images, keys=keys), self._refuse_repeats)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "ToolBox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session:
    """What a trajectory calls. A tool's session opens at the tool's first call."""

    def __init__(self, tools: Mapping[str, Tool], subject: Subject, refuse_repeats: Sequence[str] = ()):
        """`refuse_repeats`: tools that answer the same arguments once, "all" among them for every tool."""
        self._tools = tools
        self._subject = subject
        self._refuse_repeats = frozenset(refuse_repeats)
        self._asked: set[bytes] = set()
        """Digests of calls that were answered, or are about to be."""
        self._open: dict[str, ToolSession] = {}
        self._closed = False
        self._lock = threading.Lock()

    def call(self, call: ToolCall) -> Observation:
        """Answers any call: malformed ones, unknown tools and wrong arguments by a text that says what is wrong."""
        if call.error is not None:
            return Observation(text=call.error, ok=False)
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return Observation(text=f"There is no tool {call.name[:50]!r}. Tools: {known}.", ok=False)
        problem = argument_error(tool.schema, call.arguments)
        if problem is not None:
            return Observation(text=problem, ok=False)
        request = None
        try:
            if {"all", call.name} & self._refuse_repeats:
                request = _digest(call)
            with self._lock:
                # A call may still stand in line when its trajectory is given up: it must not start a kernel for nobody.
                if self._closed:
                    return Observation(text="The trajectory has ended.", ok=False, lost=True)
                if request in self._asked:
                    note = f"[{call.name} was already called with these arguments: see above.]"
                    return Observation(text=note, ok=False)
                if call.name not in self._open:
                    self._open[call.name] = tool.open(self._subject)
                session = self._open[call.name]
                if request is not None:
                    self._asked.add(request)
            observation = session.call(call.arguments)
        except Exception:
            # An error like any other to the policy; the log has the traceback for whoever wrote the tool.
            logger.exception("the %s tool failed", call.name)
            observation = Observation(text=f"The {call.name} tool failed.", ok=False)
        if request is not None and not observation.ok:
            # What failed may be tried again.
            with self._lock:
                self._asked.discard(request)
        return observation

    def close(self) -> None:
        """Frees what the trajectory's tools hold, and ends every process that its code started."""
        with self._lock, ExitStack() as stack:
            self._closed = True
            for session in self._open.values():
                stack.callback(session.close)
            self._open.clear()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _known(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """What `tools.refuse_repeats` names, in the tools' own names. Raises ConfigError for a name that no tool has."""
    found = [ALIASES.get(name, name) for name in asked]
    unknown = [name for name in found if name not in names]
    if unknown:
        known = ", ".join(dict.fromkeys(names))
        raise ConfigError(f"tools.refuse_repeats holds {unknown[0]!r}; expected names among {known}")
    return found


def _digest(call: ToolCall) -> bytes:
    """The same for calls that say the same; short, since arguments may be long."""
    said = json.dumps([call.name, dict(call.arguments)], sort_keys=True, default=repr)
    return hashlib.sha256(said.encode()).digest()
