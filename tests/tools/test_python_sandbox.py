"""What the python tool does: state, images, output, timeouts, crashes."""

import contextlib
import dataclasses
import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import Subject, ToolBox, fork_server, python_sandbox
from hdpo_jax.tools.python_sandbox import PythonSession, PythonTool
from hdpo_jax.types import ToolCall

pytestmark = pytest.mark.requires_bwrap


def python_tool(box: ToolBox) -> PythonTool:
    tool = box.tool("python")
    assert isinstance(tool, PythonTool)
    return tool


def hasty(box: ToolBox, config: ToolsConfig, images: list[bytes]) -> PythonSession:
    """A session whose calls time out soon."""
    config = dataclasses.replace(config, timeout_seconds=3.0)
    return PythonSession(config, python_tool(box).server, threading.BoundedSemaphore(), images)


@pytest.fixture
def config() -> ToolsConfig:
    return ToolsConfig()


def test_state_persists_and_values_are_shown(session, run):
    assert run(session, "x = 20\nx + 1").text == "21"
    assert run(session, "print('sum', x + 2)\n{'x': x}").text == "sum 22\n{'x': 20}"
    assert run(session, "x + 1;").text == "(no output)"
    assert run(session, "math.pi, np.__name__, PIL.__name__, plt.__name__").text.startswith("(3.14")


def test_sessions_share_nothing(box, run):
    with box.session([]) as one, box.session([]) as two:
        run(one, "x = 1; import json; json.dumps = None; open('/tmp/note', 'w').write('hello')")
        assert "NameError" in run(two, "x").text
        assert run(two, "import os, json; os.listdir('/tmp'), json.dumps(1)").text == "([], '1')"


LISTEN = """
import socket
servers = [socket.socket(socket.AF_UNIX), socket.socket()]
for server, address in zip(servers, ["\\0meet", ("0.0.0.0", 5555)]):
    server.bind(address)
    server.listen()
"""
CONNECT = """
import socket
def connect(kind, address):
    try:
        socket.socket(kind).connect(address)
        return "reached"
    except OSError as error:
        return type(error).__name__
connect(socket.AF_UNIX, "\\0meet"), connect(socket.AF_INET, ("127.0.0.1", 5555))
"""
WRITE = """
import os
for descriptor in range(3, 256):
    try:
        os.pwrite(descriptor, b"SECRET", 0)
    except OSError:
        pass
"""
READ = """
import os
found = []
for descriptor in range(256):
    try:
        found.append(os.pread(descriptor, 6, 0))
    except OSError:
        pass
b"SECRET" in found
"""


def test_sessions_have_no_way_to_each_other(box, run):
    """No socket that one opens and the other finds, no file that both inherited."""
    with box.session([]) as one, box.session([]) as two:
        assert run(one, LISTEN).ok
        assert run(one, CONNECT).text.startswith("('reached'")
        assert run(two, CONNECT).text == "('ConnectionRefusedError', 'OSError')"
        run(one, "import os; mine = os.open('/tmp/mine', os.O_RDWR | os.O_CREAT)")
        run(one, WRITE)
        assert run(one, READ).text == "True"
        assert run(two, READ).text == "False"


def test_runs_are_reproducible(box, run):
    def numbers() -> str:
        with box.session([]) as session:
            return run(session, "import random; random.random(), np.random.rand(), hash('word')").text

    assert numbers() == numbers()


def test_original_images(box, picture, run):
    wide = io.BytesIO()
    Image.new("L", (3_000, 1_000), 50).save(wide, "JPEG")
    with box.session([picture, wide.getvalue()]) as session:
        shown = run(session, "image_1.size, image_2.size, image_1.mode, image_2.mode")
        assert shown.text == "((120, 80), (3000, 1000), 'RGB', 'RGB')"
        crop = run(session, "image_1.crop((10, 20, 26, 30))")
        assert crop.text == "" and crop.ok
        (image,) = crop.images
        assert (
            image.size == (16, 10) and image.getpixel((0, 0)) == (10, 20, 7) and image.getpixel((15, 9)) == (25, 29, 7)
        )


def test_images_are_upright(box, run):
    """A file that says "rotate me" is shown rotated to the policy: crops must be of that image."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    with box.session([file.getvalue()]) as session:
        assert run(session, "image_1.size").text == "(20, 40)"


def test_an_image_that_can_not_be_decoded_is_named(box, run):
    with box.session([b"not an image"]) as session:
        assert "image_1 is missing" in run(session, "1").text


def test_every_way_to_show_an_image(session, run):
    code = """
        display(Image.new("RGB", (1, 1), "red"))
        figure = plt.figure(figsize=(1, 1), dpi=20)
        plt.plot([1, 2])
        plt.show()
        Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    """
    observation = run(session, "\n".join(line.strip() for line in code.strip().splitlines()))
    assert [image.size for image in observation.images] == [(1, 1), (20, 20), (3, 3)]
    assert observation.images[2].getpixel((0, 0)) == (255, 255, 255), "transparency is white paper, not black"
    assert run(session, "plt.get_fignums()").text == "[]"


def test_surplus_images_are_left_out_whole(session, run):
    observation = run(session, "for i in range(5): display(Image.new('RGB', (i + 1, 1)))")
    assert [image.size[0] for image in observation.images] == [1, 2, 3]
    assert observation.text == "[2 more images are left out: one call returns 3, and 33 million pixels, at most.]"


def test_huge_images_are_reduced(session, run):
    (image,) = run(session, "Image.new('L', (20_000, 1_000))").images
    assert image.width * image.height <= 1 << 24 and abs(image.width / image.height - 20) < 0.1


def test_output_of_subprocesses_keeps_its_place(session, run):
    code = "import subprocess\nprint('one')\nsubprocess.run(['echo', 'two'])\nprint('three')\n!echo four 1>&2"
    assert run(session, code).text == "one\ntwo\nthree\nfour"


def test_long_output_keeps_head_and_tail(session, run):
    text = run(session, "print('start'); print('x' * 100_000); print('end')").text
    assert text.startswith("start") and text.endswith("end") and "characters cut" in text
    assert len(text) < 2_100


def test_errors_point_into_the_code(session, run):
    observation = run(session, "def half(x):\n    return x / 0\n\nhalf(1)")
    assert not observation.ok and not observation.lost
    assert observation.text == (
        'Traceback (most recent call last):\n  File "<cell 1>", line 4, in <module>\n    half(1)\n'
        '  File "<cell 1>", line 2, in half\n    return x / 0\n           ~~^~~\nZeroDivisionError: division by zero'
    )
    observation = run(session, "x = = 1")
    assert not observation.ok and "SyntaxError" in observation.text and '"<cell 2>", line 1' in observation.text
    assert "SystemExit" in run(session, "import sys; sys.exit(1)").text
    assert "EOFError" in run(session, "input()").text
    assert run(session, "exit()\nquit()").ok
    assert run(session, "1 + 1").text == "2"


def test_text_that_no_encoding_holds(session, run):
    run(session, r"print('\ud800 and \x00')").text.encode()


def test_top_level_await(session, run):
    assert run(session, "import asyncio\nawait asyncio.sleep(0, 'done')").text == "'done'"


def test_a_slow_call_is_interrupted_and_keeps_its_state(box, config, picture):
    session = hasty(box, config, [picture])
    session.call({"code": "x = 1"})
    start = time.monotonic()
    observation = session.call({"code": "import time\nprint('before')\ntime.sleep(60)"})
    assert time.monotonic() - start < 30
    assert not observation.ok and not observation.lost
    assert observation.text.startswith("before\n")
    assert observation.text.endswith("[The code ran longer than 3 s and was interrupted. Variables are kept.]")
    assert session.call({"code": "x"}).text == "1"
    session.close()


def test_an_interrupt_does_not_hit_the_next_call(box, config):
    """Code that ends just when its time is up: it is interrupted or not, the call after it never."""
    session = PythonSession(config, python_tool(box).server, threading.BoundedSemaphore(), [])
    assert session.call({"code": "import time"}).ok  # with time enough to begin
    session._config = dataclasses.replace(config, timeout_seconds=0.1)
    for number in range(20):
        session.call({"code": f"time.sleep({0.09 + number / 1000})"})
        following = session.call({"code": "for _ in range(10): time.sleep(0.001)"})
        assert following.ok or "longer than" in following.text, following.text
    session.close()


def test_code_that_ignores_interrupts_is_killed_and_the_text_says_so(box, config, picture):
    session = hasty(box, config, [picture])
    session.call({"code": "x = 1; image_1 = None"})
    start = time.monotonic()
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    observation = session.call({"code": code})
    assert time.monotonic() - start < 30
    assert "did not react" in observation.text and "All variables are lost" in observation.text
    assert session.call({"code": "image_1.size"}).text == "(120, 80)"
    assert "NameError" in session.call({"code": "x"}).text
    session.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
        ("import os; os.closerange(3, 200)", "ended"),
    ],
)
def test_a_crash_is_reported_and_the_next_call_works(session, run, code: str, words: str):
    run(session, "x = 1")
    observation = run(session, code)
    observation = run(session, "1") if observation.ok else observation
    assert not observation.ok and not observation.lost
    assert words in observation.text and "All variables are lost" in observation.text
    assert run(session, "image_1.size").text == "(120, 80)"


def test_forged_answers_are_refused(session, run):
    """Model-written code that finds the private socket can only lose its own session."""
    code = """
import json, os, struct
text = json.dumps({"text": "42", "ok": True, "sizes": [], "dropped": 0, "blobs": []}).encode()
for descriptor in range(1, 64):
    try:
        os.write(descriptor, struct.pack(">16sI", bytes(16), len(text)) + text)
    except OSError:
        pass
"""
    observation = run(session, code)
    assert not observation.ok and "42" not in observation.text
    assert "an answer that was not asked for" in observation.text
    assert run(session, "1 + 1").text == "2"


@pytest.mark.parametrize("junk", ["os.urandom(4096)", "struct.pack('>16sI', bytes(16), 2**32 - 1)", "b'x' * 5"])
def test_junk_on_the_socket_never_hangs(box, config, junk: str, monkeypatch):
    monkeypatch.setattr(python_sandbox, "TRANSFER_SECONDS", 0.5)
    session = hasty(box, config, [])
    code = f"""
import os, socket, struct, time
for descriptor in range(3, 64):
    try:
        socket.socket(fileno=os.dup(descriptor)).send({junk})
    except OSError:
        pass
time.sleep(60)
"""
    start = time.monotonic()
    observation = session.call({"code": code})
    assert time.monotonic() - start < 30 and not observation.ok
    assert session.call({"code": "1 + 1"}).text == "2"
    session.close()


def test_many_sessions_at_a_time(box, picture, run):
    sessions = [box.session([picture]) for _ in range(24)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: run(item[1], f"x = {item[0]}"), enumerate(sessions)))
        texts = list(threads.map(lambda session: run(session, "x").text, sessions))
    for session in sessions:
        session.close()
    assert texts == [str(i) for i in range(24)]


def test_descriptors_do_not_leak(box, run):
    def used() -> int:
        return len(os.listdir("/proc/self/fd"))

    def visit() -> None:
        with box.session([]) as session:
            run(session, "1")
            run(session, "import os; os._exit(0)")
            run(session, "1")

    visit()
    before = used()
    for _ in range(10):
        visit()
    assert used() == before


def test_a_closed_session_starts_nothing(box, run):
    session = box.session([])
    assert run(session, "1").text == "1"
    session.close()
    late = run(session, "2")
    assert late.lost and not late.ok and late.text == "The trajectory has ended."


def test_unknown_tools_and_wrong_arguments_are_observations(session):
    unknown = session.call(ToolCall(name="browser", arguments={}))
    assert unknown.text == "There is no tool 'browser'. Tools: python." and not unknown.ok
    wrong = session.call(ToolCall(name="python", arguments={"code": ["1"]}))
    assert wrong.text == "python: argument `code` is an array; expected a string." and not wrong.ok
    malformed = session.call(ToolCall(name="", arguments={}, error="The tool call is malformed: it is empty."))
    assert "it is empty" in malformed.text and not malformed.ok


def test_a_closed_session_says_so(box, run):
    session = python_tool(box).open(Subject())
    session.call({"code": "1"})
    session.close()
    session.close()
    assert session.call({"code": "1"}).lost


def test_the_fork_server_is_replaced_when_it_dies(config):
    """Whose state is gone is told, and its rollout dropped; others go on."""
    with ToolBox(config) as box:
        old, untouched = python_tool(box).open(Subject()), python_tool(box).open(Subject())
        old.call({"code": "x = 1"})
        server = python_tool(box).server.process_id
        os.kill(server, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(server, 0)
                time.sleep(0.01)
        observation = old.call({"code": "x"})
        assert observation.lost and not observation.ok and "All variables are lost" in observation.text
        assert untouched.call({"code": "1 + 1"}).text == "2"
        assert old.call({"code": "1 + 2"}).text == "3"


def test_the_fork_server_is_replaced_when_it_hangs(config, monkeypatch):
    monkeypatch.setattr(fork_server, "ANSWER_SECONDS", 0.5)
    with ToolBox(config) as box:
        session = python_tool(box).open(Subject())
        session.call({"code": "x = 1"})
        os.kill(python_tool(box).server.process_id, signal.SIGSTOP)
        # What it does not need the server for goes on.
        assert session.call({"code": "x"}).text == "1"
        observation = session.call({"code": "import os; os._exit(0)"})
        assert observation.lost and "All variables are lost" in observation.text
        assert session.call({"code": "1 + 1"}).text == "2"
