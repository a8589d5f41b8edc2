"""The tools of a run, and a trajectory's view of them."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.image_search import ImageSearchTool
from hdpo_jax.tools.protocol import Schema, Subject, Tool, ToolSession, argument_error
from hdpo_jax.tools.python_sandbox import PythonTool
from hdpo_jax.tools.text_search import TextSearchTool
from hdpo_jax.types import Observation, ToolCall

TOOLS = {"python": PythonTool, "text_search": TextSearchTool, "image_search": ImageSearchTool}

logger = logging.getLogger(__name__)


class ToolBox:
    """Opens the tools that the configuration names; closes them, and all sessions, at the end.

    Raises ConfigError, one line, when a tool is unknown or does not work on this machine.
    """

    def __init__(self, config: ToolsConfig):
        self.workers = config.workers
        """Calls that may run at a time."""
        self._refuse_repeats = config.refuse_repeats
        self._tools: dict[str, Tool] = {}
        unknown = [name for name in config.names if name not in TOOLS]
        if unknown:
            raise ConfigError(f"tools.names holds {unknown[0]!r}; expected names among {', '.join(TOOLS)}")
        try:
            for name in config.names:
                self._tools[name] = TOOLS[name](config)
        except BaseException:
            self.close()
            raise

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
        for tool in self._tools.values():
            tool.close()

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
        self._refuse_repeats = refuse_repeats
        self._answered: set[str] = set()
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
        request = json.dumps([call.name, call.arguments], sort_keys=True)
        if request in self._answered:
            return Observation(text=f"[{call.name} was already called with these arguments: see above.]", ok=False)
        observation = self._run(tool, call)
        if observation.ok and ({"all", call.name} & {*self._refuse_repeats}):
            self._answered.add(request)
        return observation

    def _run(self, tool: Tool, call: ToolCall) -> Observation:
        # A call may still stand in line when its trajectory is given up: it must not start a kernel for nobody.
        with self._lock:
            if self._closed:
                return Observation(text="The trajectory has ended.", ok=False, lost=True)
            if call.name not in self._open:
                self._open[call.name] = tool.open(self._subject)
            session = self._open[call.name]
        try:
            return session.call(call.arguments)
        except Exception:
            # An error like any other to the policy; the log has the traceback for whoever wrote the tool.
            logger.exception("the %s tool failed", call.name)
            return Observation(text=f"The {call.name} tool failed.", ok=False)

    def close(self) -> None:
        """Frees what the trajectory's tools hold, and ends every process that its code started."""
        with self._lock:
            self._closed = True
            for session in self._open.values():
                session.close()
            self._open.clear()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
