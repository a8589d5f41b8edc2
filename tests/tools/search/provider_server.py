"""A provider on this machine: answers each request by the next of the replies it was given, and notes what it got."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Reply = Callable[[BaseHTTPRequestHandler], None]


@dataclass(kw_only=True)
class Received:
    path: str
    params: dict[str, str]
    headers: dict[str, str]
    body: Any
    at: float


@dataclass(kw_only=True)
class ProviderServer:
    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    """The last one is given again and again."""
    received: list[Received] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_reply(self, request: Received) -> Reply:
        with self.lock:
            self.received.append(request)
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def sends(payload: Any, status: int = 200, **headers: str) -> Reply:
    """JSON, or bytes as they are; `headers` with _ for -."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in ({"Content_Type": "application/json"} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def resets(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A header that never ends, a byte at a time: no wait for a byte is long."""
    for _ in range(100):
        try:
            handler.wfile.write(b"X" if _ else b"HTTP/1.1 200 OK\r\nX-Slow: ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


def stops_early(handler: BaseHTTPRequestHandler) -> None:
    """Half of what was promised."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"organic": [')
    handler.close_connection = True


@contextmanager
def provider_server(replies: Sequence[Reply] = ()) -> Iterator[ProviderServer]:
    server = ProviderServer(replies=list(replies))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(
                path=address.path,
                params=dict(parse_qsl(address.query)),
                headers=headers,
                body=json.loads(data) if data else None,
                at=time.monotonic(),
            )
            server.next_reply(received)(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        server.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        running.shutdown()
        thread.join()
