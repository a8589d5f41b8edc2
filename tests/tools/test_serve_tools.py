"""`hdpo serve-tools` as users start it, with the python tool: interpreters are freed, and the server ends in order."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import ToolBox, open_toolbox
from hdpo_jax.types import ToolCall
from tests.tools.serving import ROOT, action, descendants, eventually, over, serve_tools, server_process, tool_call

pytestmark = pytest.mark.requires_bwrap

LOOP = "import time\nfor _ in range(1000): time.sleep(0.01)"


class Running:
    """A server process, and how many processes it has with no interpreter open."""

    def __init__(self, process: subprocess.Popen[str], address: str):
        self.process, self.address = process, address
        self.client = httpx.Client(base_url=address, timeout=60)
        self.idle = len(descendants(process.pid))

    @property
    def interpreters(self) -> int:
        return len(descendants(self.process.pid)) - self.idle

    def run(self, trajectory: str, code: str, **fields) -> str:
        turn = action(trajectory, tool_call("python", code=code), **fields)
        answer = self.client.post("/get_observation", json=turn)
        assert answer.status_code == 200, answer.text
        return answer.json()["observations"][0]["obs"]

    def finish(self, trajectory: str) -> None:
        assert self.client.post("/get_observation", json=over(trajectory)).json()["dones"] == [True]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    flags = ["--tools.workers", "4", "--server.idle-seconds", "3"]
    with server_process(*serve_tools(*flags), variables={"HDPO_TOOLS_TOKEN": ""}) as (process, address):
        yield Running(process, address)


def test_state_is_kept_and_finish_ends_the_interpreter_and_what_it_started(server: Running, picture: bytes):
    assert server.run("t", "x = image_1.size; print(x)", images=[picture]) == "(120, 80)"
    assert server.run("t", "print(x[0] + 1)") == "121"
    code = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True); print('started')"
    assert server.run("t", code) == "started"
    assert server.interpreters >= 2
    server.finish("t")
    assert eventually(lambda: server.interpreters == 0)
    assert "NameError" in server.run("t", "x")
    server.finish("t")


def test_idle_interpreters_end(server: Running):
    server.run("idle", "1")
    assert server.interpreters == 1
    assert eventually(lambda: server.interpreters == 0, seconds=20)


def test_hostile_ids_make_no_files(server: Running):
    before = set(os.listdir(ROOT))
    for name in ("../../../tmp/hdpo-hostile", "a\0b", "hostile"):
        assert server.run(name, "print(1)") == "1"
        server.finish(name)
    assert set(os.listdir(ROOT)) == before and not os.path.exists("/tmp/hdpo-hostile")


def test_code_on_a_server_does_what_it_does_here(server: Running, picture: bytes):
    calls = [
        "image_1.resize((30, 20))",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()\nprint('<image>')",
        "1/0",
        "print(chr(0xd800), end='')",
        "for i in range(9): display(image_1.crop((0, 0, 10 + i, 10)))",
    ]
    config = ToolsConfig(workers=2)
    with ToolBox(config) as local, open_toolbox(replace(config, servers=(server.address,))) as box:
        here = local.session([picture])
        with here, contextlib.closing(box.session([picture])) as there:
            for code in calls:
                call = ToolCall(name="python", arguments={"code": code})
                expected, found = here.call(call), there.call(call)
                assert (found.text, found.ok) == (expected.text, expected.ok)
                assert [one.tobytes() for one in found.images] == [one.tobytes() for one in expected.images]
    assert eventually(lambda: server.interpreters == 0)


def test_what_times_out_says_so(picture: bytes):
    flags = ["--tools.timeout-seconds", "0.5", "--tools.workers", "1"]
    with server_process(*serve_tools(*flags)) as (_, address), httpx.Client(base_url=address, timeout=60) as client:
        answer = client.post("/get_observation", json=action("t", tool_call("python", code=LOOP))).json()
        (observation,) = answer["observations"]
        assert observation["timeout"] is True and answer["valids"] == [True]
        assert "ran longer than 0.5 s" in observation["obs"] and observation["metrics"]["ok"] is False


def test_sigterm_lets_a_call_finish_and_ends_all_interpreters():
    with server_process(*serve_tools()) as (process, address):
        running = Running(process, address)
        running.run("idle", "1")
        children = descendants(process.pid)
        answers: list[str] = []
        code = "import time; time.sleep(2); print('done')"
        thread = threading.Thread(target=lambda: answers.append(running.run("busy", code)))
        thread.start()
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        refused = running.client.post("/get_observation", json=action("new", tool_call("python", code="1")))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert running.client.get("/health").json()["status"] == "draining"
        assert process.wait(timeout=20) == 0
        thread.join()
        assert answers == ["done"]
        assert process.stderr is not None and process.stderr.read() == ""
        assert eventually(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))


def test_it_serves_its_own_tools_only():
    command = [sys.executable, *serve_tools("--tools.servers", "http://127.0.0.1:1")]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 2 and outcome.stderr.startswith("hdpo: tools.servers is set; expected")
