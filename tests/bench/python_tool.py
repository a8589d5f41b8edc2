"""What a call of the python tool costs: wall time of calls, CPU time of a session, throughput with several threads; and
what is left of many sessions in a row, a tenth of which crash, hang, or leave processes behind.

python -m tests.bench.python_tool [--sessions 200] [--soak 1000]
"""

import io
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tyro
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import ToolBox
from hdpo_jax.tools.python_sandbox import PythonTool
from hdpo_jax.types import ToolCall
from tests.bench.soak import soak as soaked
from tests.bench.table import Row, markdown

CROP = ToolCall(name="python", arguments={"code": "image_1.crop((16, 16, 80, 80))"})
SETTLE_SECONDS = 1.0
"""Sessions end after `close` returns."""


def main(sessions: int = 200, soak: int = 1_000) -> None:
    """`sessions`: that are timed. `soak`: that are opened and closed in a row."""
    file = io.BytesIO()
    Image.effect_noise((512, 512), 20).convert("RGB").save(file, "JPEG", quality=90)
    start = time.perf_counter()
    with ToolBox(ToolsConfig()) as box:
        started = time.perf_counter() - start
        print(f"the tool stands after {started:.2f} s; {sessions} sessions of two calls each")
        tool = box.tool("python")
        assert isinstance(tool, PythonTool)
        rows = [
            Row("start of the tool", started, unit="s"),
            *measure(box, tool.server.process_id, file.getvalue(), sessions),
        ]
    print(f"the soak: {soak} sessions of three calls each, from several threads", flush=True)
    print(markdown([*rows, *left_over(soak)]))


def measure(box: ToolBox, server: int, image: bytes, sessions: int) -> Iterator[Row]:
    def visit(_: int) -> tuple[float, float, float]:
        session = box.session([image])
        marks = [time.perf_counter()]
        for _ in range(2):
            assert session.call(CROP).images
            marks.append(time.perf_counter())
        session.close()
        marks.append(time.perf_counter())
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    visit(0)
    time.sleep(SETTLE_SECONDS)
    before = cpu_seconds(server)
    times = np.array([visit(index) for index in range(sessions)]) * 1e3
    time.sleep(SETTLE_SECONDS)
    cpu = (cpu_seconds(server) - before) / sessions * 1e3
    names = {"new session with its first call": "<= 30 ms", "warm call": "<= 10 ms", "close": None}
    for (name, target), column in zip(names.items(), times.T, strict=True):
        yield Row(f"{name}, median", float(np.median(column)), unit="ms", target=target)
        yield Row(f"{name}, 95th percentile", float(np.percentile(column, 95)), unit="ms")
    yield Row("CPU of a session with two calls", cpu, unit="ms")
    for threads in (1, 2, 8):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(visit, range(sessions)))
        yield Row(f"sessions/s from {threads} threads", sessions / (time.perf_counter() - start))


def left_over(sessions: int) -> Iterator[Row]:
    outcome = soaked(sessions)
    for problem in outcome.wrong[:10]:
        print(problem)
    what = f"of {sessions:,} sessions in a row"
    yield Row(f"{what}: sessions/s", sessions / outcome.seconds)
    yield Row(f"{what}: wrong answers", str(len(outcome.wrong)), target="0")
    left = ("processes", "threads", "descriptors", "server_descriptors", "sockets", "files")
    counts = ", ".join(f"{outcome.grown(name)} {name.replace('server_', 'server ')}" for name in left)
    yield Row(f"{what}: left behind", counts, target="0")
    for name, whose in (("memory", "host"), ("server_memory", "fork server")):
        yield Row(f"{what}: growth of the {whose}", f"{outcome.grown(name) / 2**20:.2f} MiB", target="none")


def cpu_seconds(server: int) -> float:
    """Of this process, the fork server, and the sessions that it has reaped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open(f"/proc/{server}/stat") as file:
        ticks = file.read().rpartition(")")[2].split()[11:15]
    return usage.ru_utime + usage.ru_stime + sum(map(int, ticks)) / 100


if __name__ == "__main__":
    tyro.cli(main)
