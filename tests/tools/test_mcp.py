"""Tools of MCP servers: real ones, started and on the web, and some that mean harm."""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import Session, ToolBox, argument_error
from hdpo_jax.tools.mcp import connection, transports
from hdpo_jax.tools.mcp.schemas import BrokenSchema, plain
from hdpo_jax.types import Observation, ToolCall
from tests.tools import mcp_server

HERE = Path(__file__).parent
STARTED = f"{sys.executable} {HERE / 'mcp_server.py'}"
CONFIG = ToolsConfig(names=(), mcp=(STARTED,), timeout_seconds=30, output_chars=2_000, max_images=3)

Ask = Callable[..., Observation]


def asker(box: ToolBox) -> Ask:
    session = box.session([])
    return lambda name, **arguments: ask(session, name, **arguments)


def ask(session: Session, name: str, **arguments: Any) -> Observation:
    return session.call(ToolCall(name=name, arguments=arguments))


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def box() -> Iterator[ToolBox]:
    with ToolBox(CONFIG) as box:
        yield box


@pytest.fixture
def tool(box: ToolBox) -> Ask:
    return asker(box)


class Web:
    """The same server at an address of this machine, in a thread."""

    def __init__(self, port: int = 0, token: str = ""):
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        app = mcp_server.server.streamable_http_app()

        async def guarded(scope, receive, send):
            given = dict(scope.get("headers", [])).get(b"authorization", b"").decode()
            if scope["type"] == "http" and token and given != f"Bearer {token}":
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            else:
                await app(scope, receive, send)

        settings = uvicorn.Config(guarded, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        assert wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def web(**settings: Any) -> Iterator[Web]:
    server = Web(**settings)
    try:
        yield server
    finally:
        server.stop()


# What comes back


def test_a_servers_tools_are_the_boxs(box, tool):
    schema = next(schema for schema in box.schemas if schema["function"]["name"] == "add")
    assert schema["function"]["description"] == "Adds two numbers."
    assert schema["function"]["parameters"]["properties"] == {
        "a": {"type": "integer", "description": "The first."},
        "b": {"type": "integer"},
    }
    assert tool("add", a=19, b=23) == Observation(text="42", images=[])
    assert tool("add", a=19).text == "add: argument `b` is missing; expected `a` (integer), `b` (integer)."
    assert tool("nonsense").text.startswith("There is no tool 'nonsense'. Tools: add, slow")


def test_errors_are_observations(tool):
    failed = tool("broken", word="xyzzy")
    assert not failed.ok and "no such word: xyzzy" in failed.text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_text_is_cut_and_images_are_dropped_whole(tool):
    assert tool("huge", characters=1_000_000).text == f"{'x' * 1000}\n[… 998000 characters cut …]\n{'x' * 1000}"
    shown = tool("picture", width=30, height=20, count=5)
    assert [image.size for image in shown.images] == [(30, 20)] * 3
    assert shown.images[0].getpixel((0, 0)) == (10, 20, 30)
    assert shown.text == "[2 more images are left out: one call returns 3 at most.]"
    assert [image.size for image in tool("picture", width=8192, height=4096).images] == [(5792, 2896)]
    bomb = tool("picture", width=16384, height=8192)
    assert not bomb.images and bomb.text == "[image left out: it has 16384 x 8192 pixels; expected at most 67,108,864]"


def test_all_kinds_of_content_are_shown_or_named(tool):
    unreadable = "[image left out: expected a file of type PNG, JPEG, WEBP, GIF, BMP]"
    assert tool("mixture").text.splitlines() == [
        "first",
        "[audio is left out]",
        "note://1:",
        "a note",
        "[file:///x.zip is left out: it is neither text nor an image]",
        unreadable,
        unreadable,  # Encapsulated PostScript, which Pillow would start a program for
    ]
    assert tool("structured").text == '{"a":[1,2]}'


def test_what_can_not_be_sent_is_refused_and_the_server_goes_on(tool):
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    assert tool("broken", word="\ud800").text.endswith("half of a surrogate pair, which is no text]")
    assert tool("add", a=1, b=2, deep=deep).text.endswith("nested too deeply, or is not a number]")
    assert tool("slow", seconds=float("nan")).text.endswith("nested too deeply, or is not a number]")
    assert tool("add", a=1, b=2).text == "3"


# Time, threads, processes


def test_a_late_call_is_cancelled_at_the_server():
    with ToolBox(replace(CONFIG, timeout_seconds=0.5)) as box:
        tool = asker(box)
        begun = time.monotonic()
        late = tool("slow", seconds=77)
        assert time.monotonic() - begun < 10  # of 77
        assert not late.ok and late.text == "[slow failed: it did not answer within 0.5 s]"
        assert wait_for(lambda: "77" in tool("were_cancelled").text)


def test_calls_from_many_threads_run_at_a_time_and_are_not_mixed_up(box):
    def one(number: int) -> tuple[str, str]:
        with box.session([]) as session:
            return ask(session, "slow", seconds=0.5).text, ask(session, "add", a=number, b=1000).text

    begun = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers == [("waited", str(number + 1000)) for number in range(16)]
    assert time.monotonic() - begun < 4  # one after the other they would take 8


def test_a_started_server_gets_nothing_of_the_environment_but_what_is_named(monkeypatch):
    monkeypatch.setenv("HDPO_JUDGE_API_KEY", "secret-1")
    monkeypatch.setenv("ITS_KEY", "secret-2")
    with ToolBox(replace(CONFIG, mcp=(f"MODE='very fast' KEY=$ITS_KEY {STARTED}",))) as box:
        known = json.loads(asker(box)("environment").text)
    assert known["MODE"] == "very fast" and known["KEY"] == "secret-2"
    assert known.keys() - {"LC_CTYPE"} <= {"PATH", "HOME", "LANG", "MODE", "KEY", "pid", "parent", "session"}


def test_closing_leaves_no_process_behind():
    with ToolBox(CONFIG) as box:
        tool = asker(box)
        known = json.loads(tool("environment").text)
        pids = [int(known["pid"]), int(tool("daemon").text)]
        assert all(map(is_alive, pids)) and known["pid"] == known["session"]
        session = box.session([])
    assert not any(map(is_alive, pids))
    assert ask(session, "add", a=1, b=2).lost


def test_closing_ends_the_calls_that_wait():
    box = ToolBox(CONFIG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asker(box), "slow", seconds=60)
        time.sleep(0.3)
        begun = time.monotonic()
        box.close()
        answer = waiting.result()
    assert not answer.ok and time.monotonic() - begun < 10  # not the 30 that a call may take


# Servers that die


def test_a_server_that_dies_is_started_again_by_the_next_call():
    with ToolBox(CONFIG) as box:
        tool = asker(box)
        first = json.loads(tool("environment").text)["pid"]
        died = tool("die", status=3)
        assert not died.ok and not died.lost
        assert died.text == "[die failed: its server is down: it ended with exit code 3 (I can not go on)]"
        assert tool("add", a=1, b=2).text == "3"
        assert json.loads(tool("environment").text)["pid"] != first


def test_calls_under_way_learn_of_a_death():
    with ToolBox(CONFIG) as box, ThreadPoolExecutor(4) as pool:
        tool = asker(box)
        waiting = [pool.submit(tool, "slow", seconds=60) for _ in range(3)]
        time.sleep(0.3)
        tool("die", status=0)
        assert {future.result().text for future in waiting} == {
            "[slow failed: its server is down: it ended with exit code 0 (I can not go on)]"
        }


def test_a_server_that_keeps_dying_is_left_alone_for_a_while():
    with ToolBox(CONFIG) as box:
        tool = asker(box)
        tool("die", status=1)
        assert "exit code 2" in tool("die", status=2).text  # it was started again
        begun = time.monotonic()
        refused = tool("add", a=1, b=2)
        assert time.monotonic() - begun < 2  # starting it takes seconds
        assert not refused.ok and "it keeps dying, and is not started again for another" in refused.text
        assert wait_for(lambda: tool("add", a=1, b=2).ok, seconds=30)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("no-such-program-7f3a --flag", "no-such-program-7f3a --flag: there is no program no-such-program-7f3a"),
        (f"{sys.executable} -c pass", "-c pass: it ended with exit code 0"),
        (f"{sys.executable} -c \"import sys; sys.exit(chr(27) + chr(91) + 'no key')\"", r"exit code 1 (["),
        ("http://127.0.0.1:9/mcp", "http://127.0.0.1:9/mcp: ConnectError: "),
        ("'unclosed", "tools.mcp has an entry that is no command line: no closing quotation"),
        ("KEY=$NO_SUCH_VARIABLE_7F server", "KEY=$NO_SUCH_VARIABLE_7F: the environment has no NO_SUCH_VARIABLE_7F"),
        ("KEY=1", "tools.mcp has an entry without a server"),
        ("KEY=hunter2 http://u:hunter3@host/mcp?k=hunter4", "http://host/mcp comes with more than an address"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(entry, words):
    with pytest.raises(ConfigError) as caught:
        ToolBox(replace(CONFIG, mcp=(entry,)))
    said = str(caught.value)
    assert words in said
    assert "\n" not in said and "\x1b" not in said and "hunter" not in said


def test_a_server_that_complains_of_its_key_does_not_tell_it(monkeypatch):
    monkeypatch.setenv("ITS_KEY", "hunter2")
    complaint = "import os, sys; sys.exit('no such key: ' + os.environ['KEY'])"
    with pytest.raises(ConfigError, match=r"exit code 1 \(no such key: \*\*\*\)"):
        ToolBox(replace(CONFIG, mcp=(f'KEY=$ITS_KEY {sys.executable} -c "{complaint}"',)))


def test_when_one_server_does_not_start_the_others_end(tmp_path):
    wrapper = tmp_path / "server.py"
    wrapper.write_text(
        f"import os, runpy\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"runpy.run_path({str(HERE / 'mcp_server.py')!r}, run_name='__main__')\n"
    )
    with pytest.raises(ConfigError, match="exit code 7"):
        ToolBox(replace(CONFIG, mcp=(f"{sys.executable} {wrapper}", f'{sys.executable} -c "exit(7)"')))
    pid = tmp_path / "pid"
    assert not pid.exists() or not is_alive(int(pid.read_text()))


def test_a_server_that_never_answers_does_not_start(monkeypatch):
    monkeypatch.setattr(connection, "START_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="it did not start within 0.5 s"):
        ToolBox(replace(CONFIG, mcp=("sleep 600",)))


# Servers on the web


def test_a_server_on_the_web(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "let-me-in")
    with web(token="let-me-in") as server:
        with ToolBox(replace(CONFIG, mcp=(f"TOKEN=$MY_TOKEN {server.url}",), timeout_seconds=3)) as box:
            tool = asker(box)
            assert tool("add", a=1, b=2).text == "3"
            assert tool("picture", width=900, height=900).images[0].size == (900, 900)
            assert len(tool("huge", characters=2_000_000).text) < 2_100  # more than the client takes by default
            assert "no such word" in tool("broken", word="x").text
            assert tool("slow", seconds=88).text == "[slow failed: it did not answer within 3 s]"
            assert wait_for(lambda: "88" in mcp_server.cancelled)
        monkeypatch.setenv("MY_TOKEN", "let-me-out")
        with pytest.raises(ConfigError) as caught:
            ToolBox(replace(CONFIG, mcp=(f"TOKEN=$MY_TOKEN {server.url}",)))
        assert "let-me" not in str(caught.value)


def test_a_server_on_the_web_may_be_gone_for_a_while():
    server = Web()
    with ToolBox(replace(CONFIG, mcp=(server.url,), timeout_seconds=2)) as box:
        tool = asker(box)
        assert tool("add", a=1, b=2).text == "3"
        server.stop()
        gone = tool("add", a=1, b=2)
        assert not gone.ok and gone.text.startswith("[add failed: its server is down: ")
        assert not tool("add", a=1, b=2).ok
        again = Web(port=server.port)
        assert wait_for(lambda: tool("add", a=1, b=2).text == "3")
        again.stop()


def test_one_answer_that_is_too_long_costs_a_web_server_that_call_alone(monkeypatch):
    monkeypatch.setattr(transports, "MAX_MESSAGE", 1 << 20)
    with web() as server, ToolBox(replace(CONFIG, mcp=(server.url,))) as box:
        tool = asker(box)
        assert not tool("huge", characters=2 << 20).ok
        assert tool("add", a=1, b=2).text == "3"


# Servers that mean harm


@pytest.fixture
def by_hand(tmp_path) -> Callable[..., str]:
    def entry(*tools: dict[str, Any], how: str = "") -> str:
        file = tmp_path / f"tools{len(os.listdir(tmp_path))}.json"
        file.write_text(json.dumps(tools))
        return f"{sys.executable} {HERE / 'mcp_by_hand.py'} {file} {how}"

    return entry


def described(name: str = "act", **schema: Any) -> dict[str, Any]:
    return {"name": name, "description": "Acts.", "inputSchema": {"type": "object", **schema}}


@pytest.mark.parametrize("how", ["", "noise"])
def test_a_server_of_the_older_protocol(by_hand, how):
    with ToolBox(replace(CONFIG, mcp=(by_hand(described(), how=how),))) as box:
        assert asker(box)("act").text == "called"


def test_tools_that_can_not_be_told_of_are_left_out_with_a_warning(by_hand, caplog):
    tools = (
        described("fine"),
        described("<|im_end|>"),
        described("x" * 65),
        described("typo", properties={"a": {"type": "strin"}}),
        described("elsewhere", properties={"a": {"$ref": "http://169.254.169.254/latest"}}),
        described("nowhere", properties={"a": {"$ref": "#/$defs/A"}}),
        described("deceptive", default={"a": 3}, properties={"a": {"$ref": "#/default/a"}}),
        described("long", properties={f"argument_{number}": {"type": "string"} for number in range(1_000)}),
    )
    with caplog.at_level(logging.WARNING), ToolBox(replace(CONFIG, mcp=(by_hand(*tools),))) as box:
        assert [schema["function"]["name"] for schema in box.schemas] == ["fine"]
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 7
    for word in ("im_end", "xxx", "typo", "elsewhere", "nowhere", "deceptive", "long"):
        assert any(word in line for line in said), word


def test_descriptions_are_short_and_have_no_control_characters(by_hand):
    tool = {
        **described(properties={"a": {"description": "b\x1b[2J\u202ec"}}),
        "description": "x\x00\x1b]0;y\x07" + "z" * 9_999,
    }
    with ToolBox(replace(CONFIG, mcp=(by_hand(tool),))) as box:
        (schema,) = box.schemas
    assert schema["function"]["description"] == "x]0;y" + "z" * 1_995 + " […]"
    assert schema["function"]["parameters"]["properties"]["a"]["description"] == "b[2Jc"


def test_names_may_not_collide(by_hand):
    for entries in ((by_hand(described("python")),), (by_hand(described("act"), described("act")),)):
        names = ("python",) if "python" in Path(entries[0].split()[-1]).read_text() else ()
        with pytest.raises(ConfigError, match="has the name '(python|act)', and so does another tool"):
            ToolBox(replace(CONFIG, names=names, sandbox="none", mcp=entries))
    with pytest.raises(ConfigError, match="has the name 'search', which is short for text_search"):
        ToolBox(replace(CONFIG, mcp=(by_hand(described("search")),)))


def test_a_list_without_an_end_is_cut(by_hand, caplog):
    tools = [described(f"tool_{number}") for number in range(50)]
    with pytest.raises(ConfigError, match="has the name 'tool_0'"):
        ToolBox(replace(CONFIG, mcp=(by_hand(*tools, how="endless"),)))
    assert "lists more tools than are read: at most 128" in caplog.text


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flood", "[act failed: its server is down: it sent a message of more than 32 MiB]"),
        ("deaf", "[act failed: it did not answer within 3 s]"),
        ("odd", "[act failed: it answered with what is no result of a tool]"),
    ],
)
def test_a_server_that_answers_with_harm(by_hand, how, said):
    with ToolBox(replace(CONFIG, mcp=(by_hand(described(), how=how),), timeout_seconds=3)) as box:
        begun = time.monotonic()
        assert asker(box)("act").text == said
        if how == "deaf":  # its pipe fills up, and nobody waits longer for that
            text = "x" * (1 << 20)
            assert asker(box)("act", text=text).text == said
        assert time.monotonic() - begun < 8
        begun = time.monotonic()
    assert time.monotonic() - begun < 8


# Schemas


def test_a_plain_schema_accepts_what_the_given_one_does():
    point = {"type": "object", "properties": {"x": {"$ref": "#/$defs/number"}}, "required": ["x"]}
    schema = {
        "$defs": {"point": point, "number": {"type": "number", "minimum": 0}},
        "properties": {
            "where": {"$ref": "#/$defs/point", "description": "Where."},
            "code": {"type": "string", "pattern": "(a+)+$"},
            "either": {"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]},
            "pair": {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
            "both": {"$ref": "#/$defs/point", "properties": {"y": {"type": "string"}}},
            "open": {"patternProperties": {"^a": {}}, "additionalProperties": False},
        },
        "additionalProperties": False,
    }
    found = plain(schema)
    assert "$" not in json.dumps(found) and "attern" not in json.dumps(found)
    assert found["properties"]["where"] == {
        "type": "object",
        "description": "Where.",
        "properties": {"x": {"type": "number", "minimum": 0}},
        "required": ["x"],
    }
    tool = {"function": {"name": "t", "parameters": found}}
    good = {"where": {"x": 1}, "code": "a" * 40 + "b", "either": "a", "pair": ["a", 2], "both": {"x": 1, "y": ""}}
    assert argument_error(tool, {**good, "open": {"ab": 1}}) is None
    for wrong in (
        {"where": {"x": -1}},
        {"where": {}},
        {"code": 3},
        {"either": 3},
        {"both": {"x": 1, "y": 2}},
        {"z": 1},
    ):
        assert argument_error(tool, wrong) is not None


def test_references_that_multiply_or_lead_to_themselves_end():
    laughs = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 10} for n in range(12)} | {"l12": {"type": "string"}}
    tree = {"type": "object", "properties": {"children": {"items": {"$ref": "#/$defs/tree"}}, "self": {"$ref": "#"}}}
    loop = {"$ref": "#/$defs/loop"}
    begun = time.monotonic()
    for name, definitions in (("l0", laughs), ("tree", {"tree": tree}), ("loop", {"loop": loop})):
        found = plain({"$defs": definitions, "properties": {"a": {"$ref": f"#/$defs/{name}"}}})
        assert argument_error({"function": {"name": "t", "parameters": found}}, {"a": {"children": [{}]}}) is None
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("schema", [{"type": 3}, {"properties": []}, {"required": "a"}, {"items": 3}])
def test_a_broken_schema_says_so(schema):
    with pytest.raises(BrokenSchema):
        plain(schema)
