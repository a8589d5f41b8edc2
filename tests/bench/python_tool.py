"""What a call of the python tool costs: wall time of calls, CPU time of a session, throughput with several threads.

python -m tests.bench.python_tool [sessions]
"""

import io
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import ToolBox
from hdpo_jax.tools.python_sandbox import PythonTool
from hdpo_jax.types import ToolCall
from tests.bench.table import Row, markdown

CROP = ToolCall(name="python", arguments={"code": "image_1.crop((16, 16, 80, 80))"})
SETTLE_SECONDS = 1.0
"""Sessions end after `close` returns."""


def main(sessions: int) -> None:
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
    print(markdown(rows))


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
    for name, column in zip(("first call", "second call", "close"), times.T, strict=True):
        yield Row(f"{name}, median", float(np.median(column)), unit="ms")
        yield Row(f"{name}, 95th percentile", float(np.percentile(column, 95)), unit="ms")
    yield Row("CPU of a session with two calls", cpu, unit="ms")
    for threads in (1, 2, 8):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(visit, range(sessions)))
        yield Row(f"sessions/s from {threads} threads", sessions / (time.perf_counter() - start))


def cpu_seconds(server: int) -> float:
    """Of this process, the fork server, and the sessions that it has reaped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open(f"/proc/{server}/stat") as file:
        ticks = file.read().rpartition(")")[2].split()[11:15]
    return usage.ru_utime + usage.ru_stime + sum(map(int, ticks)) / 100


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
