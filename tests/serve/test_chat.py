"""`hdpo chat` in a terminal's place: what is typed, what is shown, and Ctrl-C."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.parrot import write_parrot
from tests.serve.servers import SMALL, started
from tests.small_signs import write_small_signs

pytestmark = [pytest.mark.slow, pytest.mark.requires_bwrap]

CALL = '<reason>look</reason><tool_call>{"name": "python", "arguments": {"code": "image_1.size"}}</tool_call>'
FLAGS = [flag for flag in SMALL if flag not in ("--name", "tiny")]


def read_until(process: subprocess.Popen[str], words: str, seconds: float = 240.0) -> str:
    assert process.stdout is not None
    descriptor, said, until = process.stdout.fileno(), "", time.monotonic() + seconds
    while words not in said:
        assert time.monotonic() < until, said
        piece = os.read(descriptor, 65_536).decode(errors="replace")
        assert piece, f"it ended: {said}"
        said += piece
    return said


def test_calls_and_results_are_shown_and_mistakes_end_nothing(tmp_path):
    model = write_parrot(tmp_path / "model", CALL)
    Image.new("RGB", (44, 28)).save(tmp_path / "a.png")
    lines = [
        "/image /no/such/file",
        f"/image {tmp_path / 'a.png'}",
        "how large is it?",
        "word " * 3000,
        "/help",
        "/quit",
    ]
    command = ["chat", "--model", str(model), *FLAGS, "--rollout.capacity", "1200", "--agent.max-calls", "1"]
    with started([*command, "--agent.max-observation-tokens", "100"], stdin=subprocess.PIPE) as process:
        said, errors = process.communicate("\n".join(lines) + "\n", timeout=240)
    assert process.returncode == 0, errors
    assert "can not be read" in said and "image 1: 44 x 28" in said
    assert "(44, 28)" in said  # from the sandbox
    assert said.count("<reason>look</reason>") == 2 and "one call more than it may send" in said
    assert "expected at most" in said and "/new begins again" in said


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path):
    write_small_signs(tmp_path, conversations=48, boards=8)
    command = ["chat", "--model", str(tmp_path / "model"), *FLAGS, "--rollout.capacity", "4000"]
    with started(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        read_until(process, "you ")
        process.stdin.write("talk\n")
        process.stdin.flush()
        read_until(process, "model ")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert "(stopped)" in read_until(process, "you ")
        process.send_signal(signal.SIGINT)  # nothing is being said
        read_until(process, "Ctrl-D to leave")
        _, errors = process.communicate("/quit\n", timeout=60)
    assert process.returncode == 0, errors
