"""How messages get to MCP servers and back, none of them longer than MAX_MESSAGE.

The client's own ways have no such bound: one line of a server could fill the memory.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
import httpx2
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from mcp.client.streamable_http import streamable_http_client
from mcp.os.posix.utilities import terminate_posix_process_tree
from mcp.shared.message import SessionMessage
from mcp.types import jsonrpc_message_adapter

from hdpo_jax.tools.mcp.schemas import cleaned

MAX_MESSAGE = 32 << 20
"""Bytes."""
EXIT_SECONDS = 2.0
"""That a process has to end: first when its input is closed, then when it is told to."""

OnEnd = Callable[[str], None]
"""Is told why a server can not be talked to any more."""


@asynccontextmanager
async def process(command: Sequence[str], environment: Mapping[str, str], on_end: OnEnd) -> AsyncIterator[tuple]:
    """Starts a server that talks by its standard input and output, and ends it with all that is in its session.

    It is not in this terminal's session, so that Ctrl-C is ours to deal with. Raises OSError when it does not start.
    """
    server = await anyio.open_process(command, env=environment, start_new_session=True)
    assert server.stdin and server.stdout and server.stderr
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage | Exception]()
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage]()
    said = bytearray()

    async def read() -> None:
        assert server.stdout
        lines = BufferedByteReceiveStream(server.stdout)
        # Who waits for an answer learns that there is none when this closes: the reason has to be known by then.
        async with to_client:
            try:
                while True:
                    line = await lines.receive_until(b"\n", MAX_MESSAGE)
                    # Programs print, too, where only messages should be.
                    with suppress(ValueError):
                        await to_client.send(SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False)))
            except anyio.DelimiterNotFound:
                on_end(f"it sent a message of more than {MAX_MESSAGE >> 20} MiB")
            except (anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                on_end(await _cause(server, said))
        # A pipe that nobody reads from is never closed.
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            while True:
                await server.stdout.receive()

    async def write() -> None:
        assert server.stdin
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            async with from_client:
                async for message in from_client:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await server.stdin.send(text.encode() + b"\n")

    async def listen() -> None:
        """Keeps the end of what it complains of: it must not fill a pipe, a disk or a terminal."""
        assert server.stderr
        with suppress(anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            while True:
                said.extend(await server.stderr.receive())
                del said[:-2_000]

    async with anyio.create_task_group() as group:
        try:
            for task in (read, write, listen):
                group.start_soon(task)
            yield from_server, to_server
        finally:
            with anyio.CancelScope(shield=True):
                await _end(server)
            group.cancel_scope.cancel()
            for stream in (to_client, from_server, to_server, from_client):
                stream.close()


@asynccontextmanager
async def web(url: str, token: str | None) -> AsyncIterator[tuple]:
    """A server at an address, by streamable HTTP."""
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    async with (
        httpx2.AsyncClient(
            headers=headers, timeout=httpx2.Timeout(30.0, read=300.0), event_hooks={"response": [_bound]}
        ) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=MAX_MESSAGE) as streams,
    ):
        yield streams


class _Bounded(httpx2.AsyncByteStream):
    """A body that fails when it gets too long."""

    def __init__(self, body: httpx2.AsyncByteStream):
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._body:
            size += len(chunk)
            if size > MAX_MESSAGE:
                raise httpx2.StreamError(f"it is longer than {MAX_MESSAGE >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()


async def _bound(response: httpx2.Response) -> None:
    """Of a stream of events each is bounded, by the client."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise httpx2.DecodingError("the answer is compressed, which was not asked for", request=response.request)
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)


async def _cause(server: Process, said: bytearray) -> str:
    """Why a server closed its output, with the last line of its complaints."""
    with anyio.move_on_after(EXIT_SECONDS):
        while server.returncode is None:
            await anyio.sleep(0.01)
    lines = cleaned(bytes(said).decode("utf-8", "replace")).strip().splitlines()
    last = f" ({lines[-1][:200]})" if lines else ""
    match server.returncode:
        case None:
            return f"it closed its output{last}"
        case code if code < 0:
            return f"it ended by signal {-code} ({signal.strsignal(-code)}){last}"
        case code:
            return f"it ended with exit code {code}{last}"


async def _end(server: Process) -> None:
    """Closes its input, and kills what is left of its session a while later."""
    assert server.stdin
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await server.stdin.aclose()
    with anyio.move_on_after(EXIT_SECONDS):
        # Not `wait`, which waits for all that have inherited its output, too.
        while server.returncode is None:
            await anyio.sleep(0.01)
    await terminate_posix_process_tree(server, EXIT_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    with anyio.move_on_after(EXIT_SECONDS):
        await server.wait()
