"""Tool servers for tests: real ones over HTTP, with a tool that starts no interpreter, or as `hdpo serve-tools`."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from hdpo_jax.config import ToolServerConfig
from hdpo_jax.http_server import serve
from hdpo_jax.tools import Subject, Tool, ToolBox
from hdpo_jax.tools.server import tool_server
from hdpo_jax.types import Observation

ROOT = Path(__file__).parents[2]


class Notebook:
    """A tool with state: adds a line to the trajectory's notes, and shows them all, slowly where asked."""

    name = "note"
    schema = {
        "type": "function",
        "function": {
            "name": "note",
            "parameters": {
                "type": "object",
                "properties": {
                    "line": {"type": "string"},
                    "seconds": {"type": "number"},
                    "pictures": {"type": "integer"},
                    "mood": {"enum": ["fine", "fail", "raise", "lost", "late"]},
                },
                "required": ["line"],
                "additionalProperties": False,
            },
        },
    }

    def __init__(self):
        self.open_now = 0
        self.written: list[str] = []
        """Every line of every trajectory, in the order in which they were begun."""
        self.subjects: list[Subject] = []

    def open(self, subject: Subject) -> "Notes":
        self.open_now += 1
        self.subjects.append(subject)
        return Notes(self, subject)

    def close(self) -> None: ...


class Notes:
    def __init__(self, notebook: Notebook, subject: Subject):
        self.notebook, self.subject = notebook, subject
        self.lines: list[str] = []

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        self.notebook.written.append(arguments["line"])
        time.sleep(arguments.get("seconds", 0))
        self.lines.append(arguments["line"])
        mood = arguments.get("mood", "fine")
        if mood == "raise":
            raise RuntimeError("broken")
        pictures = [Image.new("RGB", (3, 2), (number, 50, 100)) for number in range(arguments.get("pictures", 0))]
        text = f"{len(self.subject.images)} images: {' '.join(self.lines)}"
        return Observation(text=text, images=pictures, ok=mood == "fine", lost=mood == "lost", timed_out=mood == "late")

    def close(self) -> None:
        self.notebook.open_now -= 1


class Notebooks(ToolBox):
    """A toolbox that holds one notebook."""

    def __init__(self, workers: int = 8):
        self.workers = workers
        self._refuse_repeats = ()
        self.notebook = Notebook()
        self._tools: dict[str, Tool] = {"note": self.notebook}


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The address where a thread serves an application."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def notebooks(
    config: ToolServerConfig | None = None, *, workers: int = 8, token: str | None = None
) -> Iterator[tuple[str, Notebook]]:
    """The address of a tool server in this process, and its notebook."""
    toolbox = Notebooks(workers)
    with served(tool_server(toolbox, config or ToolServerConfig(), token)) as address:
        yield address, toolbox.notebook


@contextmanager
def server_process(
    *command: str, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A tool server in a process of its own, and its address."""
    started = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stderr is not None
    try:
        line = started.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + started.stderr.read()
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.communicate()


def serve_tools(*flags: str) -> list[str]:
    return ["-m", "hdpo_jax", "serve-tools", "--port", "0", *flags]


NOTEBOOKS = ("-m", "tests.tools.serving")
"""The command of a server of notebooks."""


def descendants(process: int) -> set[int]:
    """Processes that it started, and those that they did."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {process}} - found:
        found |= more
    return found


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def tool_call(name: str, **arguments: Any) -> str:
    return f"<reason>Look.</reason><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def action(trajectory: str, turn: str, *, images: Sequence[bytes] = (), **fields: Any) -> dict[str, Any]:
    """A request as trainers of the authors' release send it, with one action."""
    extra = {"index": "q17", "images": [jpeg_uri(image) for image in images]}
    body = {"trajectory_ids": [trajectory], "actions": [turn], "extra_fields": [extra]}
    return body | {"finish": [False], "is_last_step": [False]} | fields


def over(trajectory: str) -> dict[str, Any]:
    """As the same trainers close a trajectory: without extra_fields."""
    return {"trajectory_ids": [trajectory], "actions": [""], "finish": [True], "is_last_step": [True]}


def jpeg_uri(image: bytes) -> str:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    settings = ToolServerConfig(drain_seconds=5)
    serve(tool_server(Notebooks(), settings), host="127.0.0.1", port=0, drain_seconds=settings.drain_seconds)
