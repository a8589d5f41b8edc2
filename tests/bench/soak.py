"""Sessions of the python tool in a row, well-behaved ones and others, and what is left of them afterwards."""

import contextlib
import gc
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import Session, ToolBox
from hdpo_jax.tools.python_sandbox import PythonTool
from hdpo_jax.types import Observation, ToolCall

CONFIG = ToolsConfig(timeout_seconds=2.0, memory_mb=256, processes=16)
THREADS = 8
WARM_UP = 100
"""Sessions before the first count: caches fill, and memory is asked for that is used again later."""
BATCH = 100
"""Sessions that are asked for at a time: what waits takes memory too."""
SETTLE_SECONDS = 30.0

ODD = {
    3: ("import os; os._exit(3)", "exit code 3"),
    5: ("import ctypes; ctypes.string_at(0)", "signal 11"),
    7: ("import os; os.closerange(3, 200)", "The Python process ended"),
    11: ("import subprocess; subprocess.Popen('(setsid sleep 300 &); sleep 300', shell=True)\nx = 2;", "(no output)"),
    13: ("import threading; threading.Thread(target=threading.Event().wait).start()", "(no output)"),
    17: ("import time\ntime.sleep(60)", "was interrupted. Variables are kept."),
    19: ("import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\ntime.sleep(60)", "did not react"),
    23: ("import socket; kept = [socket.socketpair() for _ in range(50)]", "(no output)"),
    29: ("open('file', 'wb').write(bytes(1 << 20));", "(no output)"),
    31: (
        "import os\nfor place in range(4, 64):\n    try: os.write(place, bytes(1000))\n    except OSError: pass",
        "had to be ended",
    ),
}
"""Of each hundred sessions, what these do at the end, and what is said of it."""


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What the trainer and the fork server hold."""

    processes: int
    threads: int
    descriptors: int
    server_descriptors: int
    sockets: int
    """In the sandbox's network, those without a descriptor too."""
    files: int
    """And folders, among the temporary ones."""
    memory: int
    """Bytes of this process."""
    server_memory: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    wrong: list[str]
    """Answers that were not the expected ones."""
    before: Holdings
    after: Holdings
    seconds: float

    def grown(self, name: str) -> int:
        return getattr(self.after, name) - getattr(self.before, name)


def soak(sessions: int) -> Outcome:
    """Opens and closes so many, `THREADS` at a time."""
    with own_temporary_folder(), ToolBox(CONFIG) as box, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: visit(box, number), range(WARM_UP)))
        before = held(box)
        start = time.perf_counter()
        wrong: list[str] = []
        for batch in range(0, sessions, BATCH):
            numbers = range(batch, min(batch + BATCH, sessions))
            wrong += filter(None, pool.map(lambda number: visit(box, number), numbers))
        seconds = time.perf_counter() - start
        return Outcome(wrong=wrong, before=before, after=held(box), seconds=seconds)


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Where nobody else's files are."""
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = usual


def visit(box: ToolBox, number: int) -> str | None:
    """One session of three calls; what was wrong with an answer."""
    with box.session([]) as session:
        answers = [ask(session, f"x = {number}\nprint(x)").text, ask(session, "x + 1").text]
        if answers != [str(number), str(number + 1)]:
            return f"session {number} answered {answers}"
        code, words = ODD.get(number % 100, ("x", str(number)))
        text = ask(session, code).text
        return None if words in text else f"session {number} said {text!r} of {code!r}"


def ask(session: Session, code: str) -> Observation:
    return session.call(ToolCall(name="python", arguments={"code": code}))


def held(box: ToolBox) -> Holdings:
    """Once every session is gone: they end after `close` has returned."""
    tool = box.tool("python")
    assert isinstance(tool, PythonTool)
    server = tool.server.process_id
    end = time.monotonic() + SETTLE_SECONDS
    while descendants(server) and time.monotonic() < end:
        time.sleep(0.1)
    gc.collect()
    files = sum(len(folders) + len(names) for _, folders, names in os.walk(tempfile.gettempdir()))
    return Holdings(
        processes=len(descendants(server)),
        threads=threading.active_count(),
        descriptors=len(os.listdir("/proc/self/fd")),
        server_descriptors=len(os.listdir(f"/proc/{server}/fd")),
        sockets=Path(f"/proc/{server}/net/unix").read_text().count("\n"),
        files=files,
        memory=private_bytes(os.getpid()),
        server_memory=private_bytes(server),
    )


def private_bytes(process: int) -> int:
    found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def descendants(process: int) -> list[int]:
    """Processes below one, seen from the host, those that have ended but are not reaped among them."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [process]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]
