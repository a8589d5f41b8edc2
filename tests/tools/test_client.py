"""Tools on servers, over HTTP: as in this process, spread over several, and what comes of one that dies."""

import concurrent.futures
import contextlib
import http.server
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hdpo_jax.config import ConfigError, ToolsConfig, ToolServerConfig
from hdpo_jax.tools import open_toolbox, servers
from hdpo_jax.tools.client import AFRESH, RemoteSession, RemoteToolBox
from hdpo_jax.tools.wire import image_uri
from hdpo_jax.types import Observation, ToolCall
from tests.tools.serving import NOTEBOOKS, Notebooks, eventually, jpeg_uri, notebooks, served, server_process


def config(*addresses: str, **settings: Any) -> ToolsConfig:
    return replace(ToolsConfig(servers=addresses, lost_seconds=1.0, server_seconds=10.0), **settings)


@contextmanager
def remote(*addresses: str, **settings: Any) -> Iterator[RemoteToolBox]:
    with open_toolbox(config(*addresses, **settings)) as box:
        assert isinstance(box, RemoteToolBox)
        yield box


def note(line: str, **arguments: Any) -> ToolCall:
    return ToolCall(name="note", arguments={"line": line, **arguments})


def same(found: Observation, expected: Observation) -> bool:
    pixels = [(image.size, image.tobytes()) for image in found.images]
    plain = (found.text, found.ok, found.lost, found.timed_out)
    return plain == (expected.text, expected.ok, expected.lost, expected.timed_out) and pixels == [
        (image.size, image.tobytes()) for image in expected.images
    ]


def test_calls_give_what_they_give_here(picture: bytes):
    calls = [
        note("a"),
        note("b <tool_call> <\\/tool_call> </tool_call> \ud800 \0 <image>", pictures=2),
        note("c", mood="fail"),
        note("d", mood="raise"),
        note("e", mood="late"),
        ToolCall(name="note", arguments={}),
        ToolCall(name="note", arguments={"line": 5}),
        ToolCall(name="nope", arguments={}),
        ToolCall(name="", arguments={}, error="there is a </tool_call> but no <tool_call> before it"),
        note("f", mood="lost"),
    ]
    local = Notebooks()
    with notebooks() as (address, notebook), remote(address) as box:
        assert list(box.schemas) == list(local.schemas) and box.workers == 8
        with contextlib.closing(box.session([picture], ["q17"])) as there:
            here = local.session([picture], ["q17"])
            for call in calls:
                expected = here.call(call)
                text = expected.text.encode("utf-8", "replace").decode()
                assert same(there.call(call), replace(expected, text=text)), call
        assert notebook.subjects[0].images == [picture] and notebook.subjects[0].keys == ["q17"]
        assert eventually(lambda: notebook.open_now == 0)


def test_a_malformed_call_asks_nobody():
    with notebooks() as (address, notebook), remote(address) as box:
        session = box.session([])
        assert session.call(ToolCall(name="note", arguments={}, error="it is empty")).text == "it is empty"
        session.close()
        assert httpx.get(f"{address}/health").json()["sessions"] == 0 and notebook.subjects == []


def test_images_are_sent_once_and_beyond_the_most_are_left_out(picture: bytes):
    with notebooks() as (address, notebook), remote(address, max_images=2) as box:
        session = box.session([picture])
        answer = session.call(note("a", pictures=5))
        assert len(answer.images) == 2
        assert answer.text == "1 images: a\n[3 more images are left out: one call returns 2 at most.]"
        assert session.call(note("b")).text == "1 images: a b"
        assert [len(subject.images) for subject in notebook.subjects] == [1]


def test_trajectories_are_spread_and_stay_where_they_began():
    with notebooks() as (first, one), notebooks() as (second, other), remote(first, f"{second}/") as box:
        sessions = [box.session([]) for _ in range(8)]
        for round in range(3):
            for number, session in enumerate(sessions):
                lines = " ".join(f"{number}.{past}" for past in range(round + 1))
                assert session.call(note(f"{number}.{round}")).text == f"0 images: {lines}"
        assert one.open_now == other.open_now == 4
        for session in sessions[:4]:
            session.close()
        assert eventually(lambda: one.open_now + other.open_now == 4)
        # Those that come next go where there is room.
        for session in [box.session([]) for _ in range(4)]:
            session.call(note("x"))
        assert one.open_now == other.open_now == 4
        for session in sessions:
            session.close()


def test_the_end_of_a_run_tells_servers_which_trajectories_are_over():
    with notebooks() as (address, notebook):
        with remote(address) as box:
            sessions = [box.session([]) for _ in range(100)]
            for session in sessions:
                session.call(note("a"))
            started = time.monotonic()
            for session in sessions:
                session.close()
                session.close()
            assert time.monotonic() - started < 1  # a hundredth of a second each: nobody waits for an answer
        assert notebook.open_now == 0
        assert session.call(note("b")).lost


@contextmanager
def cutting_proxy(backend: str, cuts: int, *, before: bool = False) -> Iterator[tuple[str, list[int]]]:
    """Passes requests on; of the first posts, cuts the connection once the backend has answered (or before it asks)."""
    posts: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(httpx.get(backend + self.path, headers=self.passed()))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posts.append(len(body))
            cut = len(posts) <= cuts
            if not (cut and before):
                answer = httpx.post(backend + self.path, content=body, headers=self.passed(), timeout=30)
            if cut:
                self.close_connection = True
                return
            self.send(answer)

        def passed(self) -> dict[str, str]:
            return {"Authorization": self.headers.get("Authorization", "")}

        def send(self, answer: httpx.Response) -> None:
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", posts
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("cut_before", [False, True])
def test_a_call_whose_answer_is_cut_off_runs_once(cut_before: bool):
    with (
        notebooks() as (address, notebook),
        cutting_proxy(address, cuts=2, before=cut_before) as (proxy, posts),
        remote(proxy, lost_seconds=5.0) as box,
        contextlib.closing(box.session([])) as session,
    ):
        assert session.call(note("a", pictures=1)).text == "0 images: a"
        assert session.call(note("b")).text == "0 images: a b"
        assert notebook.written == ["a", "b"] and len(posts) == 4
        assert len(notebook.subjects) == 1


def test_an_answer_that_stays_away_is_a_lost_server():
    with (
        notebooks() as (address, notebook),
        cutting_proxy(address, cuts=1_000) as (proxy, _),
        remote(proxy, server_seconds=3.0) as box,
        contextlib.closing(box.session([])) as session,
    ):
        started = time.monotonic()
        answer = session.call(note("a"))
        assert answer.lost and not answer.ok and 0.5 < time.monotonic() - started < 5


def steps(box: RemoteToolBox, sessions: Sequence[Any], line: str) -> list[Observation]:
    with concurrent.futures.ThreadPoolExecutor(len(sessions)) as pool:
        return list(pool.map(lambda session: session.call(note(line)), sessions))


def home(session: RemoteSession) -> str | None:
    return session._server and session._server.name


@contextmanager
def two_servers() -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """In processes of their own, which start beside each other."""
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield list(pool.map(lambda _: stack.enter_context(server_process(*NOTEBOOKS)), range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("on_lost", ["drop", "observe"])
def test_a_server_that_is_killed_takes_its_trajectories_along_and_no_others(on_lost: str):
    with two_servers() as ((first, one), (_, other)):
        with remote(one, other, on_lost=on_lost) as box:
            sessions = [box.session([]) for _ in range(8)]
            assert {answer.text for answer in steps(box, sessions, "a")} == {"0 images: a"}
            doomed = [session for session in sessions if home(session) == one]
            assert len(doomed) == 4
            # In the midst of a call.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                under_way = pool.submit(doomed[0].call, note("x", seconds=5))
                time.sleep(0.3)
                first.send_signal(signal.SIGKILL)
                first.wait()
                answers = [under_way.result(), *steps(box, doomed[1:], "b")]
            for answer in answers:
                assert not answer.ok and answer.lost is (on_lost == "drop")
                assert "The tool server was lost, and with it all variables" in answer.text
            survivors = [session for session in sessions if session not in doomed]
            assert {answer.text for answer in steps(box, survivors, "b")} == {"0 images: a b"}
            # Where the policy goes on, it does so on the server that lives, and is told what it lost.
            assert {answer.text for answer in steps(box, doomed, "c")} == {f"{AFRESH}\n0 images: c"}
            assert {answer.text for answer in steps(box, doomed, "d")} == {"0 images: c d"}
            # New ones do not even notice.
            started = time.monotonic()
            fresh = [box.session([]) for _ in range(4)]
            assert {answer.text for answer in steps(box, fresh, "e")} == {"0 images: e"}
            assert time.monotonic() - started < 1
            for session in [*sessions, *fresh]:
                session.close()
        assert httpx.get(f"{other}/health").json()["sessions"] == 0


@pytest.mark.parametrize("on_lost", ["drop", "observe"])
def test_a_server_that_was_started_anew_is_found_out(on_lost: str):
    """Behind the same address there is another process: a call must not run as if nothing were missing."""
    backend = ""

    async def passed_on(request: Request) -> Response:
        async with httpx.AsyncClient(timeout=30) as client:
            url = backend + request.url.path
            answer = await client.request(request.method, url, content=await request.body())
        return Response(answer.content, answer.status_code)

    proxy = Starlette(routes=[Route("/{path:path}", passed_on, methods=["GET", "POST"])])
    with notebooks() as (first, _), notebooks() as (second, anew), served(proxy) as address:
        backend = first
        with remote(address, on_lost=on_lost) as box, contextlib.closing(box.session([])) as session:
            assert session.call(note("a")).text == "0 images: a"
            backend = second
            answer = session.call(note("b"))
            assert "all variables are lost" in answer.text and answer.lost is (on_lost == "drop") and not answer.ok
            assert anew.written == []
            assert session.call(note("c")).text == f"{AFRESH}\n0 images: c"


@pytest.mark.slow
def test_a_draining_server_is_left_by_new_trajectories():
    with two_servers() as ((leaving, one), (_, other)), remote(one, other) as box:
        held = [box.session([]) for _ in range(2)]
        steps(box, held, "a")
        (old,) = (session for session in held if home(session) == one)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(old.call, note("b", seconds=1.5))
            time.sleep(0.3)
            leaving.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            fresh = [box.session([]) for _ in range(4)]
            assert {answer.text for answer in steps(box, fresh, "x")} == {"0 images: x"}
            assert {home(session) for session in fresh} == {other}
            assert under_way.result().text == "0 images: a b"
        assert leaving.wait(timeout=10) == 0
        assert old.call(note("c")).lost
        for session in [*held, *fresh]:
            session.close()


def test_a_server_without_room_is_asked_again_until_there_is():
    config = ToolServerConfig(queue=1, sessions=3)
    with notebooks(config, workers=1) as (address, notebook), remote(address, workers=16, server_seconds=30) as box:

        def trajectory(number: int) -> None:
            with contextlib.closing(box.session([])) as session:
                for call in range(3):
                    answer = session.call(note(f"{number}.{call}", seconds=0.02))
                    assert answer.ok and answer.text.endswith(f"{number}.{call}"), answer

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(trajectory, range(16)))
        assert sorted(notebook.written) == sorted(f"{n}.{call}" for n in range(16) for call in range(3))
        refused = 'hdpo_tools_rejected_total{reason="busy"}'
        assert any(line.startswith(refused) for line in httpx.get(f"{address}/metrics").text.splitlines())


def test_trajectories_go_where_there_is_room():
    with (
        notebooks(ToolServerConfig(sessions=1)) as (full, _),
        notebooks() as (free, notebook),
        remote(full) as another,
        remote(full, free) as box,
    ):
        held = another.session([])
        held.call(note("a"))
        sessions = [box.session([]) for _ in range(6)]
        started = time.monotonic()
        for session in sessions:
            assert session.call(note("b")).text == "0 images: b"
        assert notebook.open_now == 6 and time.monotonic() - started < 2
        for session in [held, *sessions]:
            session.close()


def test_a_server_that_never_has_room_is_as_good_as_lost():
    with notebooks(ToolServerConfig(sessions=1)) as (address, _), remote(address, server_seconds=1.5) as box:
        first, second = box.session([]), box.session([])
        first.call(note("a"))
        started = time.monotonic()
        assert second.call(note("b")).lost and 0.5 < time.monotonic() - started < 4
        assert first.call(note("b")).text == "0 images: a b"
        first.close()
        second.close()


def test_a_closed_session_stops_asking():
    with server_process(*NOTEBOOKS) as (process, address), remote(address, lost_seconds=60, server_seconds=60) as box:
        session = box.session([])
        session.call(note("a"))
        process.kill()
        process.wait()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(session.call, note("b"))
            time.sleep(0.5)
            started = time.monotonic()
            session.close()
            assert under_way.result().lost and time.monotonic() - started < 3


def test_a_session_that_is_closed_during_its_call_leaves_nothing_open():
    with notebooks() as (address, notebook), remote(address, workers=16) as box:
        sessions = [box.session([]) for _ in range(64)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(session.call, note("a", seconds=0.002)) for session in sessions]
            for session in sessions:
                time.sleep(0.004)
                session.close()
            for future in calls:
                future.result()
        assert eventually(lambda: notebook.open_now == 0)
        assert [server.trajectories for server in box.servers._servers] == [0]


def test_where_no_server_answers_the_run_does_not_start():
    with served(Starlette()) as wrong, pytest.raises(ConfigError) as refused:
        open_toolbox(config("http://127.0.0.1:9", wrong, lost_seconds=0.2))
    said = str(refused.value)
    assert said.startswith("no tool server answers (http://127.0.0.1:9: ") and wrong in said and "\n" not in said
    assert "404" in said and "hdpo serve-tools" in said


def test_a_server_that_does_not_answer_is_warned_of_and_used_once_it_does(caplog: pytest.LogCaptureFixture):
    with notebooks() as (address, _), remote("http://127.0.0.1:9", address) as box:
        (warning,) = (message for message in caplog.messages if message.startswith("the tool server"))
        assert warning.startswith("the tool server http://127.0.0.1:9 does not answer (")
        sessions = [box.session([]) for _ in range(4)]
        assert {answer.text for answer in steps(box, sessions, "a")} == {"0 images: a"}
        for session in sessions:
            session.close()


def test_servers_that_start_beside_the_run_are_waited_for():
    threads = []
    with contextlib.ExitStack() as stack:
        late = stack.enter_context(cutting_proxy("http://127.0.0.1:9", cuts=0))[0]
        stack.close()
        port = int(late.rpartition(":")[2])

        def start() -> None:
            time.sleep(0.6)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Healthy)
            threads.append(server)
            server.serve_forever()

        threading.Thread(target=start, daemon=True).start()
        with remote(f"http://127.0.0.1:{port}", lost_seconds=10):
            pass
        threads[0].shutdown()
        threads[0].server_close()


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None: ...


def test_the_token_comes_from_the_environment_and_is_tried_at_once(monkeypatch: pytest.MonkeyPatch):
    with notebooks(token="s3cret") as (address, _):
        for token in (None, "wrong"):
            if token is not None:
                monkeypatch.setenv("HDPO_TOOLS_TOKEN", token)
            with pytest.raises(ConfigError, match=f"^{address} refuses the token; .*HDPO_TOOLS_TOKEN"):
                open_toolbox(config(address))
        monkeypatch.setenv("HDPO_TOOLS_TOKEN", "s3cret\n")
        with remote(address) as box, contextlib.closing(box.session([])) as session:
            assert session.call(note("a")).text == "0 images: a"


def test_what_a_server_refuses_is_not_the_policys_fault(picture: bytes, caplog: pytest.LogCaptureFixture):
    with notebooks(ToolServerConfig(images=1)) as (address, _):
        for on_lost in ("drop", "observe"):
            with remote(address, on_lost=on_lost) as box, contextlib.closing(box.session([picture] * 2)) as session:
                answer = session.call(note("a"))
                assert "extra_fields[0] has 2 images; expected 1 at most" in answer.text
                assert not answer.ok and answer.lost is (on_lost == "drop")
    assert "refuses a call: HTTP 422" in caplog.text


class Authors:
    """Speaks as the server of the authors' release does, and knows no field but its own."""

    FIELDS = {"trajectory_ids", "actions", "extra_fields", "finish", "is_last_step"}

    def __init__(self, picture: bytes):
        self.requests: list[dict[str, Any]] = []
        self.answers: list[Callable[[], Response]] = []
        self.picture = jpeg_uri(picture)
        post = Route("/get_observation", self.observe, methods=["POST"])
        self.app = Starlette(routes=[post, Route("/health", self.health)])

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "workers": 4})

    async def observe(self, request: Request) -> Response:
        body = await request.json()
        assert set(body) == self.FIELDS and {len(value) for value in body.values()} == {1}
        self.requests.append(body)
        if body["finish"][0]:
            return JSONResponse({"detail": "Processing failed"}, 500)
        return self.answers.pop(0)()


def answered(observation: Any, *, valid: bool = True) -> Callable[[], Response]:
    return lambda: JSONResponse(
        {"observations": [observation], "dones": [False], "valids": [valid], "processing_time_ms": 5.2}
    )


def test_the_authors_server_is_a_server_too(picture: bytes):
    theirs = Authors(picture)
    marked = "A search found 2 results:\n\n1. <image>\n[Cat]\n\n\n2. <image>\n[Dog]\n"
    ran = {"metrics": {"code_success": True, "code_lines": 1}, "timeout": False}
    theirs.answers = [
        answered({"obs": "2\n", "image": [], **ran}),
        answered({"obs": marked, "image": [theirs.picture] * 2, "metrics": {"search_success": True}, "timeout": False}),
        answered({"obs": "No tags", "image": theirs.picture, **ran}),
        answered({"obs": "Error", "image": [], "metrics": {"code_success": False}, "timeout": True}),
        answered({"obs": "10 results", "metrics": {"search_success": False}, "timeout": False}),
        answered("", valid=False),
        lambda: JSONResponse({"detail": "Action processing failed"}, 500),
    ]
    with served(theirs.app) as address, remote(f"{address}/get_observation") as box:
        assert [schema["function"]["name"] for schema in box.schemas] == ["python"]
        with contextlib.closing(box.session([picture], ["q17", "7"])) as session:
            call = ToolCall(name="python", arguments={"code": "print(1 + 1)"})
            assert same(session.call(call), Observation(text="2\n"))
            found = session.call(call)
            assert found.ok and found.text == "A search found 2 results:\n\n1. \n[Cat]\n\n\n2. \n[Dog]\n"
            assert [image.size for image in found.images] == [(120, 80)] * 2
            assert len(session.call(call).images) == 1
            late = session.call(call)
            assert not late.ok and late.timed_out
            assert not session.call(call).ok
            assert same(session.call(call), Observation(text="", ok=False))
            failed = session.call(call)
            assert not failed.ok and not failed.lost and "HTTP 500" in failed.text
        assert eventually(lambda: len(theirs.requests) == 8)
    first, last = theirs.requests[0], theirs.requests[-1]
    (turn,) = first["actions"]
    assert turn == '<tool_call>{"name": "python", "arguments": {"code": "print(1 + 1)"}}</tool_call>'
    assert first["extra_fields"][0]["index"] == "q17"
    assert [uri[:22] for uri in first["extra_fields"][0]["images"]] == ["data:image/png;base64,"]
    assert first["finish"] == [False] and last["finish"] == [True]
    assert {request["trajectory_ids"][0] for request in theirs.requests} == set(first["trajectory_ids"])


@pytest.mark.parametrize("opened", [False, True], ids=["first call", "later call"])
def test_what_may_have_run_on_the_authors_server_is_not_sent_again(picture: bytes, opened: bool):
    theirs = Authors(picture)
    theirs.answers = [answered({"obs": str(number)}) for number in range(9)]
    with (
        served(theirs.app) as address,
        cutting_proxy(address, cuts=1) as (proxy, posts),
        remote(proxy) as box,
        contextlib.closing(box.session([])) as session,
    ):
        if opened:
            session._opened, session._server = True, box.servers.take()
        assert session.call(ToolCall(name="python", arguments={"code": "1"})).lost
        assert len(posts) == 1


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        ({"obs": "x", "image": ["data:image/png;base64,AAAA"]}, "x\n[An image is left out: it is no image file"),
        ({"obs": "x", "image": ["/etc/passwd"]}, "x\n[An image is left out: it is no data URI"),
        ({"obs": 5}, "[The tool server did not run the call: its answer is not of the format"),
        ({"image": []}, "[The tool server did not run the call: its answer is not of the format"),
    ],
)
def test_nonsense_of_a_server_is_told_in_words(observation: Any, said: str, picture: bytes):
    theirs = Authors(picture)
    theirs.answers = [answered(observation)]
    with served(theirs.app) as address, remote(address) as box, contextlib.closing(box.session([])) as session:
        answer = session.call(ToolCall(name="python", arguments={"code": "1"}))
        assert answer.text.startswith(said) and not answer.images


def test_an_answer_is_read_up_to_a_bound(picture: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servers, "MAX_ANSWER", 1_000)
    theirs = Authors(picture)
    theirs.answers = [answered({"obs": "x" * 2_000})]
    with served(theirs.app) as address, remote(address) as box, contextlib.closing(box.session([])) as session:
        answer = session.call(ToolCall(name="python", arguments={"code": "1"}))
        assert answer.lost and "larger than 1,000 bytes" in answer.text


def test_large_images_of_a_server_are_left_out(picture: bytes):
    theirs = Authors(picture)
    huge = Image.new("1", (5_000, 5_000))
    theirs.answers = [answered({"obs": "x", "image": [image_uri(huge)]})]
    with served(theirs.app) as address, remote(address) as box, contextlib.closing(box.session([])) as session:
        answer = session.call(ToolCall(name="python", arguments={"code": "1"}))
        assert "has 5000x5000 pixels" in answer.text and answer.images == []


def test_errors_show_no_password():
    with pytest.raises(ConfigError) as refused:
        open_toolbox(config("http://user:hunter2@127.0.0.1:9", lost_seconds=0.0))
    assert "hunter2" not in str(refused.value)
