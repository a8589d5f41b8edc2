"""A real endpoint on this machine that speaks /v1/chat/completions, and whose answers a test decides."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Raw:
    """An answer that is not just a model's words."""

    status: int = 200
    body: Iterable[bytes] = ()
    """Pieces, sent as they come."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.body["messages"]


class JudgeServer:
    """`answer(asked)` gives the model's words, or Raw. A context manager."""

    def __init__(self, answer: Callable[[Asked], str | Raw], *, port: int = 0):
        self.asked: list[Asked] = []
        self.most = 0
        """Requests that were there at a time, at most."""
        self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked = Asked(body, {name.lower(): value for name, value in self.headers.items()})
                if self.path != "/v1/chat/completions":
                    return self._send(Raw(404, [b"there is nothing here"]))
                with server._lock:
                    server.asked.append(asked)
                    server._now += 1
                    server.most = max(server.most, server._now)
                try:
                    found = answer(asked)
                finally:
                    with server._lock:
                        server._now -= 1
                self._send(found if isinstance(found, Raw) else completion(found))

            def _send(self, raw: Raw) -> None:
                self.send_response(raw.status)
                for name, value in {"content-type": "application/json", "connection": "close", **raw.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in raw.body:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except OSError:  # whoever asked has gone
                    pass
                self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(words: str | None) -> Raw:
    choice = {"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    return Raw(body=[json.dumps(whole).encode()])


def dribble(piece: bytes, seconds: float, every: float = 0.05) -> Iterable[bytes]:
    """A server that is never silent, and never done."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield piece
        time.sleep(every)


def shown(asked: Asked, part: str) -> list[str]:
    """What stands in a part of our prompt: the JSON strings on its lines."""
    user = asked.messages[-1]["content"]
    (opening,) = [line for line in user.splitlines() if line.startswith(f"<{part}_")]
    inside = user.split(opening + "\n")[1].split("\n" + opening.replace("<", "</"))[0]
    return [json.loads(line) for line in inside.splitlines()]


def careful(asked: Asked) -> str:
    """A judge that compares."""
    (prediction,) = shown(asked, "prediction")
    return "CORRECT" if prediction.lower() in map(str.lower, shown(asked, "ground_truths")) else "INCORRECT"
