"""What the processes of a session may use together, and what they do between the calls."""

import dataclasses
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import Session, Subject, ToolBox
from hdpo_jax.tools.kernel import watch
from hdpo_jax.tools.python_sandbox import PythonSession, PythonTool
from tests.tools.conftest import CONFIG

pytestmark = pytest.mark.requires_bwrap

GRACE = 60.0
"""Seconds for what takes one on an idle machine."""


@pytest.fixture(scope="module")
def box() -> Iterator[ToolBox]:
    """CPU for 2 s a call: four times the timeout."""
    with ToolBox(dataclasses.replace(CONFIG, timeout_seconds=0.5, processes=32)) as box:
        yield box


@pytest.fixture
def patient(box: ToolBox) -> Iterator[PythonSession]:
    """A session whose calls have time, but no more CPU than the others'."""
    tool = box.tool("python")
    assert isinstance(tool, PythonTool)
    session = tool.open(Subject())
    session._config = dataclasses.replace(CONFIG, timeout_seconds=GRACE)
    yield session
    session.close()


def text_of(session: PythonSession, code: str) -> str:
    return session.call({"code": code}).text


def ends(session: PythonSession, seconds: float = GRACE) -> bool:
    """Whether the session's process is gone by then, without a call."""
    assert session._kernel is not None
    poll = select.poll()
    poll.register(session._kernel.connection, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


def killed(session: PythonSession, code: str) -> str:
    """What is said of a session that is killed during this call or after it."""
    text = session.call({"code": code}).text
    if session._kernel is None:
        return text
    assert ends(session), text
    return text_of(session, "1")


FORKS = """
import mmap, os, time
def hold(megabytes):
    memory = {allocate}
    for place in range(0, megabytes << 20, 4096):
        memory[place] = 1
    time.sleep(600)
for _ in range({count}):
    if os.fork() == 0:
        hold({megabytes})
"""


def test_memory_of_all_processes_together(patient):
    """256 MiB a session: six times 100 MiB is too much, though each process may have that."""
    patient.call({"code": "x = 1"})
    code = FORKS.format(allocate="bytearray(megabytes << 20)", count=6, megabytes=100)
    observation = patient.call({"code": code + "time.sleep(600)"})
    assert not observation.ok and not observation.lost
    assert "out of memory; it and what it started may use 256 MiB together" in observation.text
    assert "All variables are lost" in observation.text
    assert text_of(patient, "1 + 1") == "2"


def test_memory_that_is_taken_after_the_call_has_returned(patient):
    code = FORKS.format(allocate="mmap.mmap(-1, megabytes << 20)", count=6, megabytes=100)
    assert "out of memory" in killed(patient, code)


def test_shared_memory_counts_once(patient):
    """Forks of a process that holds 100 MiB hold the same: by resident size these would be 900 MiB."""
    code = """
import os, time
memory = bytearray(100 << 20)
for place in range(0, len(memory), 4096):
    memory[place] = 1
for _ in range(8):
    if os.fork() == 0:
        time.sleep(600)
"""
    patient.call({"code": code})
    assert not ends(patient, seconds=20 * watch.LONGEST / 4)
    assert text_of(patient, "len(memory) >> 20") == "100"


def test_what_waits_in_sockets_counts(patient):
    """Buffers of sockets are memory of no process: 30 processes with 200 each could hold a few GiB."""
    code = """
import os, socket, time
for _ in range(20):
    if os.fork() == 0:
        pairs = [socket.socketpair() for _ in range(100)]
        for one, other in pairs:
            one.setblocking(False)
            try:
                while True: one.send(bytes(65536))
            except BlockingIOError:
                pass
        time.sleep(600)
"""
    assert "out of memory" in killed(patient, code)


def test_a_process_that_hides_is_counted(patient):
    """What makes itself unreadable to others of its user is read all the same."""
    code = "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n"
    code += FORKS.format(allocate="bytearray(megabytes << 20)", count=6, megabytes=100)
    assert "out of memory" in killed(patient, code)


BUSY = """
import os
for _ in range(4):
    if os.fork() == 0:
        while True: pass
"""
SHORT = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(4):
    if os.fork() == 0:
        while True:
            if os.fork() == 0:
                end = time.monotonic() + 0.02
                while time.monotonic() < end: pass
                os._exit(0)
            time.sleep(0.02)
"""
THREADS = """
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
"""


@pytest.mark.parametrize("code", [BUSY, SHORT, THREADS], ids=["busy", "short-lived", "threads"])
def test_cpu_time_between_the_calls(patient, code: str):
    """Nothing works on for ever after its call has returned, and however short each process lives."""
    assert "too much CPU time; it and what it started may use" in killed(patient, code)
    assert text_of(patient, "1 + 1") == "2"


def test_each_call_has_its_own_cpu_time(patient):
    """Five times 0.6 s in one session, which may use 2 s from one call to the next."""
    code = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\nprint('done')"
    assert [text_of(patient, code) for _ in range(5)] == ["done"] * 5


class TestBetweenCalls:
    """Threads and processes that live on may print and show: the next answer says so, and is whole."""

    @pytest.fixture
    def session(self, patient) -> PythonSession:
        return patient

    @pytest.mark.parametrize(
        "start",
        [
            "threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
            "subprocess.Popen('sleep 0.3; echo late', shell=True)\n;",
            "subprocess.Popen('(setsid sh -c \"sleep 0.3; echo late\" &)', shell=True)\n;",
        ],
        ids=["thread", "process", "daemon"],
    )
    def test_what_is_printed_after_a_call_is_told_at_the_next(self, session, start: str):
        assert text_of(session, f"import subprocess, threading, time\nprint('at once')\n{start}") == "at once"
        time.sleep(2)
        assert text_of(session, "print('next')") == (
            "late\n[The above was printed after the last call had returned.]\nnext"
        )
        assert text_of(session, "print('quiet')") == "quiet"

    def test_what_is_shown_after_a_call_is_there_at_the_next(self, session):
        code = """
import threading, time
def later():
    time.sleep(0.3)
    display(Image.new('RGB', (2, 3)))
threading.Thread(target=later).start()
Image.new('RGB', (1, 1))
"""
        assert [image.size for image in session.call({"code": code}).images] == [(1, 1)]
        time.sleep(2)
        assert [image.size for image in session.call({"code": "1"}).images] == [(2, 3)]
        assert not session.call({"code": "1"}).images

    def test_a_flood_between_the_calls_is_cut(self, session):
        code = """
import threading, time
def flood():
    for _ in range(2000): print('x' * 1000)
thread = threading.Thread(target=lambda: (time.sleep(0.1), flood()))
thread.start()
"""
        session.call({"code": code})
        time.sleep(1)
        text = text_of(session, "thread.join(); print('end')")
        assert len(text) < CONFIG.output_chars + 200 and "characters cut" in text and text.endswith("end")

    def test_threads_that_print_during_calls_break_nothing(self, session):
        code = """
import threading, time
stop = False
def chatter():
    while not stop:
        print('chatter', end=' ')
        display(Image.new('RGB', (1, 1)))
        time.sleep(0.001)
for _ in range(4): threading.Thread(target=chatter).start()
"""
        assert session.call({"code": code}).ok
        for number in range(10):
            observation = session.call({"code": f"print('<{number}>')"})
            assert observation.ok and f"<{number}>" in observation.text and len(observation.images) <= CONFIG.max_images
        session.call({"code": "stop = True"})

    def test_forks_print_too(self, session):
        code = "import os\nif os.fork() == 0:\n    print('child')\n    os._exit(0)\nos.wait()\nprint('parent')"
        assert text_of(session, code) == "child\nparent"
        pool = (
            "import multiprocessing\nwith multiprocessing.get_context('fork').Pool(1) as pool: pool.map(print, ['x'])"
        )
        assert text_of(session, pool) == "x"

    def test_a_fork_that_runs_on_does_not_answer(self, session):
        """Both come to the end of the cell: one of them answers, and the next call is answered anew."""
        assert "twice" in text_of(session, "import os\nos.fork()\nprint('twice')")
        texts = [text_of(session, f"{number} + 1") for number in range(5)]
        assert texts[0].endswith("1") and texts[1:] == ["2", "3", "4", "5"]


def test_idle_sessions_cost_the_server_next_to_nothing(box: ToolBox, run):
    """At most a twentieth of a core, whatever the number of sessions."""
    sessions = [box.session([]) for _ in range(20)]
    try:
        for session in sessions:
            assert run(session, "1").ok
        tool = box.tool("python")
        assert isinstance(tool, PythonTool)
        before = cpu_seconds(tool.server.process_id)
        time.sleep(4)
        assert cpu_seconds(tool.server.process_id) - before < 4 * 2 * watch.SHARE + 0.05
    finally:
        close(sessions)


def close(sessions: list[Session]) -> None:
    for session in sessions:
        session.close()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_the_same_bounds_hold_without_a_sandbox():
    config = ToolsConfig(sandbox="none", memory_mb=256)
    with ToolBox(config) as box:
        tool = box.tool("python")
        session = tool.open(Subject())
        code = FORKS.format(allocate="bytearray(megabytes << 20)", count=6, megabytes=100) + "time.sleep(600)"
        assert "out of memory" in session.call({"code": code}).text
        session.close()
