"""The tools of MCP servers, for the threads that trajectories' calls run in.

A server is shared by all trajectories: what it remembers, it remembers for all of them. A tool that keeps state for
each of them, such as a browser, needs a server for each, which is not offered.
"""

import asyncio
import base64
import json
import logging
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from mcp import MCPError
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
    Tool,
)
from pydantic import ValidationError
from pydantic_core import to_json

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.functions import PLAIN_NAME
from hdpo_jax.tools.mcp.connection import START_SECONDS, STOP_SECONDS, Server, ServerDown
from hdpo_jax.tools.mcp.entries import parse
from hdpo_jax.tools.mcp.schemas import BrokenSchema, cleaned, plain
from hdpo_jax.tools.protocol import Schema, Subject
from hdpo_jax.tools.results import LONGEST_ERROR, encodable, observation
from hdpo_jax.types import Observation

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class McpServers:
    """Starts the servers of `tools.mcp`, all at a time, and ends them with this object.

    Raises ConfigError, one line, when one of them does not start.
    """

    def __init__(self, config: ToolsConfig):
        entries = [parse(text) for text in config.mcp]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        self._servers = [Server(entry) for entry in entries]
        self._closed = False
        try:
            listings = self.submit(_started(self._servers)).result(START_SECONDS + STOP_SECONDS)
            self.tools = [
                McpTool(tool, schema, server, self, config)
                for server, listing in zip(self._servers, listings, strict=True)
                for tool, schema in _usable(listing, server.label)
            ]
        except BaseException:
            self.close()
            raise

    def submit(self, work: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
        """From any thread: runs in the servers' event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Ends the servers; what is under way fails."""
        if self._closed:
            return
        self._closed = True
        with suppress(TimeoutError):
            self.submit(_stopped(self._servers)).result(2 * STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


class McpTool:
    """A tool of a server, and its session too: it knows nothing of trajectories."""

    def __init__(self, tool: Tool, schema: Schema, server: Server, servers: McpServers, config: ToolsConfig):
        self.name = tool.name
        self.schema = schema
        self.server = server.label
        self._server = server
        self._servers = servers
        self._config = config

    def open(self, subject: Subject) -> "McpTool":
        """The same for every trajectory; a server gets nothing of the prompt."""
        return self

    def close(self) -> None: ...

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        """Asks the server; a call that takes longer than `tools.timeout_seconds` is cancelled there, too."""
        given = dict(arguments)
        problem = _unsendable(given)
        if problem is not None:
            return self._failed(problem)
        if self._servers.closed:
            return _closed()
        seconds = self._config.timeout_seconds
        answer = self._servers.submit(self._server.call(self.name, given))
        try:
            result = answer.result(seconds)
        except TimeoutError:
            answer.cancel()
            return replace(self._failed(f"it did not answer within {seconds:g} s"), timed_out=True)
        except CancelledError:
            return _closed()
        except ServerDown as error:
            return self._failed(f"its server is down: {error}")
        except MCPError as error:
            return self._failed(error.message)
        except ValidationError:
            return self._failed("it answered with what is no result of a tool")
        return observation(_parts(result), self._config, ok=not result.is_error)

    def _failed(self, reason: str) -> Observation:
        reason = encodable(reason)
        return Observation(text=f"[{self.name} failed: {reason[:LONGEST_ERROR]}]", ok=False)


def _closed() -> Observation:
    return Observation(text="The session is closed.", ok=False, lost=True)


async def _started(servers: Sequence[Server]) -> list[list[Tool]]:
    """What each lists. Raises ConfigError as soon as one does not start."""

    async def start(server: Server) -> list[Tool]:
        try:
            return await server.start()
        except ServerDown as error:
            raise ConfigError(f"tools.mcp: {server.label}: {error}") from error

    return await asyncio.gather(*map(start, servers))


async def _stopped(servers: Sequence[Server]) -> None:
    """Ends the servers, and then the calls that still wait for them."""
    await asyncio.gather(*(server.stop() for server in servers), return_exceptions=True)
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def _usable(listing: Sequence[Tool], label: str) -> Iterator[tuple[Tool, Schema]]:
    """Those that a policy can be told of, each with its schema; of the others there is a warning."""
    for tool in listing:
        if not PLAIN_NAME.fullmatch(tool.name):
            problem = "expected a name of 1 to 64 letters, digits, _, . and -"
            logger.warning("%s: the tool %.80r is left out: %s", label, tool.name, problem)
            continue
        try:
            parameters = plain(tool.input_schema)
        except BrokenSchema as error:
            logger.warning("%s: the tool %s is left out: its schema is broken: %s", label, tool.name, error)
            continue
        function = {"name": tool.name, "description": cleaned(tool.description or ""), "parameters": parameters}
        yield tool, {"type": "function", "function": function}


def _unsendable(arguments: Mapping[str, Any]) -> str | None:
    """What keeps arguments from being a message. One that breaks in the client's own hands would end the connection."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
        to_json([[[[[[[[arguments]]]]]]]])  # as deep as a message has them, and no deeper than a message may be
    except UnicodeEncodeError:
        return "an argument holds half of a surrogate pair, which is no text"
    except (ValueError, RecursionError):
        return "an argument is nested too deeply, or is not a number"
    return None


def _parts(result: CallToolResult) -> Iterator[str | bytes]:
    """Text, and image files. Structured content says the same as the text beside it, if there is any."""
    for block in result.content:
        yield _part(block)
    if not result.content and result.structured_content is not None:
        yield to_json(result.structured_content, inf_nan_mode="constants").decode()


def _part(block: ContentBlock) -> str | bytes:
    match block:
        case TextContent():
            return block.text
        case ImageContent():
            return _from_base64(block.data)
        case EmbeddedResource(resource=TextResourceContents() as resource):
            return f"{cleaned(resource.uri)}:\n{resource.text}"
        case EmbeddedResource(resource=BlobResourceContents(mime_type=str(kind), blob=data)) if "image/" in kind:
            return _from_base64(data)
        case EmbeddedResource(resource=resource):
            return f"[{cleaned(resource.uri)} is left out: it is neither text nor an image]"
        case ResourceLink():
            return f"{cleaned(block.name)}: {cleaned(block.uri)}"
        case AudioContent():
            return "[audio is left out]"


def _from_base64(text: str) -> bytes:
    """Empty, and so no image, where it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""
