"""What every HTTP server of `hdpo` does alike: who may ask, how much at a time, and how it ends."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hdpo_jax.config import ConfigError, bearer_token

BODY_SECONDS = 60.0
"""How long a request's body may take to arrive."""
LINGER_SECONDS = 2.0
"""How long the rest of a refused body is read and thrown away: a client that still writes would not see the answer."""
CLOSE_SECONDS = 2
"""How long connections may take to close once there are no requests to wait for."""
BACKLOG = 2_048

logger = logging.getLogger(__name__)


def token_for(host: str, variable: str) -> str | None:
    """The token that clients have to show, from the environment; None: none is asked for.

    Raises ConfigError where there is none and other machines reach `host`.
    """
    token = bearer_token(variable)
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and {variable} is not set; expected a secret in it, "
            "which clients show, or --host 127.0.0.1"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application in front of another one: lets in who shows the token, so much at a time, in the end nobody.

    401 without the token, 413 and 408 for bodies that are too large or too slow, 429 for requests beyond `requests`,
    503 once it drains; all with one line in `detail`. Bodies are read here, up to the limit, whatever headers say.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        requests: int,
        body_bytes: int,
        public: Collection[str] = ("/health",),
        unbounded: Collection[str] = ("/health", "/metrics"),
        on_answer: Callable[[str, int], None] = lambda path, status: None,
    ):
        """`public`: paths that need no token. `unbounded`: paths that answer however much there is to do.

        `on_answer`: hears of the path and the status of every answer, refusals too.
        """
        self._app = app
        self._token = None if token is None else _digest(token)
        self._requests = requests
        self._body_bytes = body_bytes
        self._public = frozenset(public)
        self._unbounded = frozenset(unbounded)
        self._on_answer = on_answer
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Lets no more requests in."""
        self._draining = True

    async def emptied(self) -> None:
        """Waits until every request that was let in is answered."""
        await self._empty.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_answer(scope["path"], message["status"])
            await send(message)

        await self._admit(scope, receive, heard)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token is None and (stranger := _by_a_page(scope)):
            await refuse(send, 403, f"{stranger}, and without a token only programs of this machine may ask")
        elif scope["path"] not in self._public and not self._may(scope):
            await refuse(send, 401, "a bearer token is needed that fits", {"WWW-Authenticate": "Bearer"})
        elif scope["path"] in self._unbounded:
            await self._app(scope, receive, send)
        elif self._draining:
            await refuse(send, 503, "the server is shutting down", {"Retry-After": "1", "Connection": "close"})
        elif self._inside >= self._requests:
            await refuse(send, 429, f"{self._requests} requests are being answered already", {"Retry-After": "1"})
        else:
            with self._counted():
                await self._let_in(scope, receive, send)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def _may(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, secret = shown[0].partition(b" ") if len(shown) == 1 else (b"", b"", b"")
        # Digests have one length, and are compared in a time that says nothing of where they differ.
        return hmac.compare_digest(_digest(secret.strip()), self._token) and scheme.lower() == b"bearer"

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        message: Message = {"more_body": True}
        too_large = _declared(scope) > self._body_bytes
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not too_large and message.get("more_body"):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    too_large = len(body) > self._body_bytes
        except TimeoutError:
            await refuse(send, 408, f"the body took longer than {BODY_SECONDS:g} s", {"Connection": "close"})
            return
        if too_large:
            limit = f"the body is larger than {self._body_bytes:,} bytes"
            await refuse(send, 413, limit, {"Connection": "close"}, rest=receive)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        body.clear()

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


async def refuse(
    send: Send, status: int, detail: str, headers: Mapping[str, str] | None = None, *, rest: Receive | None = None
) -> None:
    """Answers with an error: one line, in JSON. `rest`: where the rest of the body comes from, to be thrown away."""
    content = json.dumps({"detail": detail}).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
    pairs = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content, "more_body": rest is not None})
    if rest is not None:
        await _discard(rest)
        await send({"type": "http.response.body"})


def serve(guard: Guard, *, host: str, port: int, drain_seconds: float) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers the requests that are in, for no longer than `drain_seconds`.

    A second signal does not wait for them. Prints the address once it answers; port 0 takes a free one.
    """
    listener = _listener(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        guard,
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = _Server(config, f"listening on http://{shown}:{listener.getsockname()[1]}")
    asyncio.run(_serve(server, guard, listener, drain_seconds))


class _Server(uvicorn.Server):
    """uvicorn's, which says when it answers, and leaves signals to `serve`: its own would end the process by them."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self._greeting = greeting

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)


async def _serve(server: _Server, guard: Guard, listener: socket.socket, drain_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    signals = asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await _first(serving, signals.get())
    if serving.done():
        serving.result()
        raise RuntimeError("the server did not start; the lines above say why")
    guard.drain()
    if not await _first(guard.emptied(), signals.get(), seconds=drain_seconds):
        logger.warning("requests were still running after %g s, and are given up", drain_seconds)
    server.should_exit = True
    await serving


async def _first(*awaitables: Any, seconds: float | None = None) -> bool:
    """Waits for one of them, and for the others no more; False: none came in time."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    done, _ = await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for given, future in zip(awaitables, futures, strict=True):
        if future is not given:
            future.cancel()
    return bool(done)


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"can not listen on {host}, port {port}: {reason}; expected a free --port") from None
    # Connections inherit it. Without, a body that follows its headers waits for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _by_a_page(scope: Scope) -> str:
    """What says that a web page asks, in a browser of this machine; empty: nothing does.

    A page may send what it likes to a loopback address, and under a name of its own that leads there read the answer.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if b"origin" in headers:
        return f"the request comes from the page {headers[b'origin'][:80]!r}"
    try:
        name = urlsplit(f"//{headers.get(b'host', 'localhost')}").hostname or ""
    except ValueError:
        name = ""
    return "" if is_loopback(name) else f"the request is for {name[:80]!r}"


def _declared(scope: Scope) -> int:
    """What the headers say of the body's length; 0 where they say nothing that is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


async def _discard(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


def _digest(secret: str | bytes) -> bytes:
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()
