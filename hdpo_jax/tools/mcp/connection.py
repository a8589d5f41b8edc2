"""An MCP server that is started, asked, and started again when it has died."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import anyio
from mcp import Client, MCPError
from mcp.types import (
    CONNECTION_CLOSED,
    INVALID_REQUEST,
    CallToolRequest,
    CallToolRequestParams,
    CallToolResult,
    Tool,
)

from hdpo_jax.tools.mcp import transports
from hdpo_jax.tools.mcp.entries import Entry
from hdpo_jax.tools.mcp.schemas import cleaned
from hdpo_jax.tools.results import error_in_words

START_SECONDS = 120.0
"""A server may have to be downloaded first."""
STOP_SECONDS = 8.0
LONGEST_PAUSE = 60.0
"""Seconds before a server that keeps dying is started again."""
MAX_PAGES, MAX_TOOLS = 20, 128
"""Of what a server lists."""
_CLOSED = "it was closed"

logger = logging.getLogger(__name__)


class ServerDown(Exception):
    """A server is not there; says why."""


class Connection:
    """One life of a server, from its start to its death. Lives in a task of its own, as the client's scopes have to."""

    def __init__(self, entry: Entry, on_death: Callable[[], None]):
        self._entry = entry
        self._on_death = on_death
        self._ready, self._stop, self._dead = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._scope = anyio.CancelScope()
        self._client: Client | None = None
        self._reason = ""
        self.tools: list[Tool] = []
        """What it lists; at most MAX_TOOLS."""
        self._task = asyncio.create_task(self._live())

    @property
    def over(self) -> bool:
        return self._stop.is_set()

    async def started(self) -> Client:
        """Waits for the server to be ready. Raises ServerDown when it does not become so."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            self._end(f"it did not start within {START_SECONDS:g} s")
            self._scope.cancel()
        if self._client is None or self.over:
            raise ServerDown(self._reason)
        return self._client

    async def lost(self) -> ServerDown | None:
        """After an error that may be the server's death: what it was, or None where it lives."""
        try:
            async with asyncio.timeout(1.0):
                await self._stop.wait()
        except TimeoutError:
            return None
        with anyio.move_on_after(1.0):
            await self._dead.wait()
        return ServerDown(self._reason)

    async def close(self) -> None:
        """Ends the server; kills it where it does not end."""
        self._end(_CLOSED)
        if self._client is None:
            self._scope.cancel()
        with anyio.move_on_after(STOP_SECONDS):
            await self._dead.wait()
        self._scope.cancel()
        await self._task

    def forget(self) -> None:
        """Ends what is left of a server that does not know us any more, without waiting for it."""
        self._end("it has forgotten its session")

    def _end(self, reason: str) -> None:
        for value in self._entry.variables.values():
            # A server may complain of the key that it was given.
            reason = reason.replace(value, "***") if len(value) > 3 else reason
        self._reason = self._reason or reason
        self._stop.set()
        self._ready.set()

    async def _live(self) -> None:
        try:
            with self._scope:
                async with Client(self._transport(), cache=None) as client:
                    self.tools = await _listed(client, self._entry.label)
                    self._client = client
                    self._ready.set()
                    await self._stop.wait()
        except Exception as error:
            self._end(_in_words(error))
        finally:
            self._end("it ended")
            if self._reason != _CLOSED:
                logger.warning("the MCP server %s is down: %s", self._entry.label, self._reason)
            self._dead.set()
            self._on_death()

    def _transport(self) -> Any:
        entry = self._entry
        if entry.url:
            return transports.web(entry.url, entry.variables.get("TOKEN"))
        return transports.process(entry.command, entry.environment, self._end)


class Server:
    """A server of `tools.mcp`, for all trajectories. Its methods run in one event loop."""

    def __init__(self, entry: Entry):
        self.label = entry.label
        self._entry = entry
        self._connection: Connection | None = None
        self._deaths = 0
        """Since the last call that was answered."""
        self._not_before = 0.0

    async def start(self) -> list[Tool]:
        """What it lists. Raises ServerDown when it does not start."""
        connection = self._connect()
        await connection.started()
        return connection.tools

    async def call(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
        """Asks once. A server that has died is started before that, but no sooner than its pause is over.

        Raises ServerDown where there is none, or it dies meanwhile; MCPError, or pydantic's ValidationError, for what
        it answers instead of a result.
        """
        connection = self._connect()
        client = await connection.started()
        request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))
        try:
            # Not `call_tool`, which would check the result by the server's own schema, in this one thread.
            result = await client.session.send_request(request, CallToolResult)
        except MCPError as error:
            if error.code == INVALID_REQUEST and error.message == "Session terminated":
                connection.forget()
                raise ServerDown("it has forgotten its session") from error
            if error.code == CONNECTION_CLOSED and (death := await connection.lost()):
                raise death from error
            raise
        self._deaths = 0
        return result

    async def stop(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def _connect(self) -> Connection:
        if self._connection is None or self._connection.over:
            left = self._not_before - asyncio.get_running_loop().time()
            if left > 0:
                raise ServerDown(f"it keeps dying, and is not started again for another {left:.0f} s")
            self._connection = Connection(self._entry, self._died)
        return self._connection

    def _died(self) -> None:
        """The first time it may start again at once; then after a pause that doubles."""
        self._deaths += 1
        pause = min(2.0 ** (self._deaths - 2), LONGEST_PAUSE) if self._deaths > 1 else 0.0
        self._not_before = asyncio.get_running_loop().time() + pause


async def _listed(client: Client, label: str) -> list[Tool]:
    tools, cursor = [], None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None or len(tools) > MAX_TOOLS:
            break
    if cursor is not None or len(tools) > MAX_TOOLS:
        logger.warning("%s lists more tools than are read: at most %d, on %d pages", label, MAX_TOOLS, MAX_PAGES)
    return tools[:MAX_TOOLS]


def _in_words(error: BaseException) -> str:
    """The first of the errors that a task group collected, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no program {error.filename}"
    return " ".join(cleaned(error_in_words(error)).split())[:300]
