"""What all servers share, over real HTTP: the token, the bounds of bodies and requests, the end by a signal."""

import asyncio
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from hdpo_jax import http_server
from hdpo_jax.config import ConfigError
from hdpo_jax.http_server import Guard, is_loopback, token_for

ROOT = Path(__file__).parent.parent
TOKEN = "correct-horse"
BOUND = 1_000


async def size(request: Request) -> JSONResponse:
    await asyncio.sleep(float(request.query_params.get("seconds", 0)))
    return JSONResponse({"size": len(await request.body())})


def application(token: str | None = None, requests: int = 8) -> Guard:
    paths = ("/size", "/health", "/metrics")
    app = Starlette(routes=[Route(path, size, methods=["GET", "POST"]) for path in paths])
    return Guard(app, token=token, requests=requests, body_bytes=BOUND)


@contextmanager
def served(guard: Guard) -> Iterator[int]:
    """The port where a thread serves it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(guard, log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def test_the_token_is_needed_but_for_health():
    with served(application(TOKEN)) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for header in (None, TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Bearer \xff"):
            headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
            for path in ("/size", "/metrics"):
                refused = client.get(path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in refused.text
        assert client.get("/health").status_code == 200
        assert client.get("/size", headers={"Authorization": f"Bearer {TOKEN}"}).json() == {"size": 0}
        assert client.get("/size", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer wrong")]
        assert client.get("/size", headers=twice).status_code == 401


def test_bodies_are_bounded_whatever_they_say_of_their_length():
    with served(application()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/size", content=b"x" * BOUND).json() == {"size": BOUND}
        refused = client.post("/size", content=b"x" * (BOUND + 1))
        assert refused.status_code == 413 and refused.json() == {"detail": "the body is larger than 1,000 bytes"}
        assert client.post("/size", content=(b"x" * 100 for _ in range(10))).json() == {"size": BOUND}
        assert client.post("/size", content=(b"x" * 100 for _ in range(11))).status_code == 413
        # The refusal reaches clients that are still writing, and a great body is not taken in.
        assert client.post("/size", content=b"x" * 20_000_000).status_code == 413


def test_a_length_that_is_announced_is_refused_before_it_comes():
    with served(application()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("POST", "/size")
        connection.putheader("Content-Length", "1000000000000")
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_server, "BODY_SECONDS", 0.2)
    with served(application()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("POST", "/size")
        connection.putheader("Content-Length", "10")
        connection.endheaders()
        connection.send(b"x")
        assert connection.getresponse().status == 408
        connection.close()


def test_no_more_requests_at_a_time_than_allowed():
    with served(application(requests=2)) as port:
        address = f"http://127.0.0.1:{port}"
        busy = [threading.Thread(target=httpx.get, args=(f"{address}/size?seconds=1",)) for _ in range(2)]
        for thread in busy:
            thread.start()
        time.sleep(0.3)
        refused = httpx.get(f"{address}/size")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert httpx.get(f"{address}/health").status_code == httpx.get(f"{address}/metrics").status_code == 200
        for thread in busy:
            thread.join()
        assert httpx.get(f"{address}/size").status_code == 200


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HDPO_X_TOKEN", raising=False)
    assert token_for("127.0.0.1", "HDPO_X_TOKEN") is None
    for host in ("0.0.0.0", "::", "", "10.0.0.5", "tool-server"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="HDPO_X_TOKEN is not set; expected a secret"):
            token_for(host, "HDPO_X_TOKEN")
    monkeypatch.setenv("HDPO_X_TOKEN", " \n")
    with pytest.raises(ConfigError, match="HDPO_X_TOKEN is not set"):
        token_for("0.0.0.0", "HDPO_X_TOKEN")
    for token in ("two words", "caf\xe9", "a\nb"):
        monkeypatch.setenv("HDPO_X_TOKEN", token)
        with pytest.raises(ConfigError, match="^HDPO_X_TOKEN holds characters that HTTP can not send"):
            token_for("127.0.0.1", "HDPO_X_TOKEN")
    # Secrets that are mounted or made by a shell often end with a line break.
    monkeypatch.setenv("HDPO_X_TOKEN", f"{TOKEN}\n")
    assert token_for("0.0.0.0", "HDPO_X_TOKEN") == token_for("::1", "HDPO_X_TOKEN") == TOKEN


@contextmanager
def process(drain_seconds: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = (
        "from hdpo_jax.http_server import serve; from tests.test_http_server import application;"
        f"serve(application(), host='127.0.0.1', port=0, drain_seconds={drain_seconds})"
    )
    command = [sys.executable, "-c", code]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        line = started.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.communicate()


def in_thread(address: str, seconds: float) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    path = f"{address}/size?seconds={seconds}"
    thread = threading.Thread(target=lambda: answers.append(httpx.get(path, timeout=20)))
    thread.start()
    time.sleep(1.5)  # a client takes its time to come in on a busy machine
    return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_no_others_in(number: signal.Signals):
    with process(drain_seconds=20) as (server, address), httpx.Client() as client:
        thread, answers = in_thread(address, 4)
        assert client.get(f"{address}/size").status_code == 200
        server.send_signal(number)
        time.sleep(0.3)
        refused = client.get(f"{address}/size")
        assert refused.status_code == 503 and refused.json() == {"detail": "the server is shutting down"}
        assert server.wait(timeout=10) == 0
        thread.join()
        assert answers[0].status_code == 200


def test_what_takes_longer_than_the_drain_is_given_up():
    with process(drain_seconds=0.3) as (server, address):
        thread, answers = in_thread(address, 15)
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0
        assert time.monotonic() - started < 6
        assert server.stderr is not None and "still running after 0.3 s" in server.stderr.read()
        thread.join()
        assert not answers or answers[0].status_code >= 500


def test_a_second_signal_does_not_wait():
    with process(drain_seconds=60) as (server, address):
        thread, _ = in_thread(address, 15)
        for _ in range(2):
            server.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert server.wait(timeout=8) == 0
        thread.join()


def test_an_address_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^can not listen on 127.0.0.1, port {port}: Address already in use"):
            http_server.serve(application(), host="127.0.0.1", port=port, drain_seconds=1)
    with pytest.raises(ConfigError, match="can not listen on 127.0.0.1, port 70000"):
        http_server.serve(application(), host="127.0.0.1", port=70000, drain_seconds=1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "evil.example"}, 403),  # a name that a page has lead here
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null", "Content-Type": "text/plain"}, 403),
    ],
    ids=str,
)
def test_without_a_token_no_web_page_may_ask(headers, status):
    with served(application()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/size", content=b"x", headers=headers).status_code == status
    with served(application(TOKEN)) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        # Whoever shows the secret may come from where they like.
        shown = {"Authorization": f"Bearer {TOKEN}", **headers}
        assert client.post("/size", content=b"x", headers=shown).status_code == 200
