"""What code can do to the process that runs it, which is its own: the host must not notice more than that.

Model-written code shares the interpreter with the code that answers for it, so it can find the socket and the token of
its call. Whatever comes then, a call comes back in time and says what happened, the next one is answered anew, other
sessions see nothing of it, and the host neither grows nor keeps a descriptor.
"""

import dataclasses
import json
import os
import resource
import threading
import time
from collections.abc import Iterator

import pytest

from hdpo_jax.tools import Subject, ToolBox, python_sandbox
from hdpo_jax.tools.python_sandbox import PythonSession, PythonTool
from hdpo_jax.types import Observation
from tests.tools.conftest import CONFIG

pytestmark = pytest.mark.requires_bwrap

SECONDS = 3.0
"""A call's timeout."""
LATEST = 30.0
"""By when any call is answered, on a busy machine too."""

FIND = """
import gc, json, os, socket, struct, sys, threading, time
sockets = [thing for thing in gc.get_objects() if isinstance(thing, socket.socket)]
wire = [thing for thing in sockets if thing.fileno() > 2][0]
frame = sys._getframe()
while 'token' not in frame.f_locals:
    frame = frame.f_back
token = bytes(frame.f_locals['token'])
def forged(header, blobs=b'', token=token):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('>16sI', token, len(header)) + header + blobs
answer = {'text': 'FORGED', 'ok': True, 'sizes': [], 'dropped': 0, 'blobs': []}
"""

ATTACKS = {
    # What answers is taken apart.
    "builtins": "import builtins\nfor name in ('len', 'print', 'bytes', 'sum'): setattr(builtins, name, None)",
    "all builtins": "import builtins\nfor name in dir(builtins): vars(builtins).pop(name)",
    "json": "import json; json.dumps = json.loads = lambda *_, **__: '{}'; json.encoder = json.decoder = None",
    "sockets": "import socket\nfor name in ('sendall', 'recv', 'recv_into'): setattr(socket.socket, name, None)",
    "os": "import os\nfor name in ('write', 'fstat', 'pread', '_exit', 'getpid', 'close'): setattr(os, name, None)",
    "clock": "import time; time.monotonic = lambda: 0.0",
    "frames": "from kernel import frames; frames.send = frames.receive = lambda *_, **__: None",
    "frames answer for it": "from kernel import frames; send = frames.send\n"
    "frames.send = lambda connection, token, header, blobs: send(connection, bytes(16), {'text': 'FORGED'}, blobs)",
    "frames wait": "import time; from kernel import frames; frames.send = lambda *_, **__: time.sleep(600)",
    "shell": "from kernel import shell; shell.Session.run = lambda *_: 1 / 0",
    "output": "from kernel import output; output.Output.take = lambda *_: 7",
    "pictures": "from kernel import shell; shell.Gallery.take = lambda *_: [((1 << 40, 1), b'')]",
    "modules": "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
    "streams": "import sys; sys.stdout = sys.stderr = sys.__stdout__ = None; del sys.stdin",
    "tracing": "import sys, threading\ndef trace(*_): raise SystemError('traced')\n"
    "sys.settrace(trace); sys.setprofile(trace)",
    "audits": "import sys\ndef audit(*_): raise SystemError('audited')\nsys.addaudithook(audit)",
    "recursion": "import sys; sys.setrecursionlimit(5 + len(__import__('inspect').stack()))",
    "signals": "import signal\ndef handler(*_): raise SystemError('signalled')\n"
    "signal.signal(signal.SIGALRM, handler); signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)",
    "no interrupts": "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(600)",
    "interrupts swallowed": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    # It ends, in every way.
    "exit": "import os; os._exit(0)",
    "exit in a thread": "import os, threading, time; threading.Timer(0.1, os._exit, (1,)).start()",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "stack overflow": "import ctypes, sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()",
    "bad frame": "import sys; exec((lambda: 0).__code__.replace(co_code=bytes(range(256)) * 2))",
    "kill all": "import os, signal; os.kill(-1, signal.SIGKILL); os.kill(os.getpid(), signal.SIGSTOP)",
    "descriptors": "import os; os.closerange(0, 256)",
    "wire to nowhere": FIND + "os.dup2(os.open('/dev/null', os.O_RDWR), wire.fileno())",
    "wire to itself": FIND + "one, other = socket.socketpair(); os.dup2(one.fileno(), wire.fileno())",
    "wire kept by a child": FIND + "if os.fork() == 0: time.sleep(600)\nwire.close()",
    "wire half shut": FIND + "wire.shutdown(socket.SHUT_WR)",
    "wire shut": FIND + "wire.shutdown(socket.SHUT_RD)",
    # It answers for itself, with the token and without.
    "forged": FIND + "wire.sendall(forged(answer))",
    "forged twice": FIND + "wire.sendall(forged(answer) * 2)",
    "forged many times": FIND
    + "threading.Thread(target=lambda: [wire.sendall(forged(answer)) for _ in range(10**6)]).start()",
    "forged, then silent": FIND + "wire.sendall(forged(answer)); time.sleep(600)",
    "forged without the token": FIND + "wire.sendall(forged(answer, token=bytes(16)))",
    "forged on every descriptor": FIND
    + "for descriptor in range(64):\n    try: os.write(descriptor, forged(answer))\n    except OSError: pass",
    "stolen requests": FIND
    + "def steal():\n    while True:\n        request = wire.recv(1 << 20)\n"
    + "        wire.sendall(forged(answer, token=request[:16]))\nthreading.Thread(target=steal).start()",
    "forged from between the calls": FIND
    + "threading.Thread(target=lambda: (time.sleep(0.2), wire.sendall(forged(answer)))).start()",
    "failure": FIND + "wire.sendall(forged({'failure': '\\ud800\\n' * 100, 'blobs': []}, token=bytes(16)))",
    "failure of another kind": FIND + "wire.sendall(forged({'failure': {'a': [1]}, 'blobs': []}, token=bytes(16)))",
    # Frames that are none.
    "noise": FIND + "wire.sendall(os.urandom(1 << 16))",
    "endless noise": FIND + "while True: wire.sendall(bytes(1 << 16))",
    "one byte": FIND + "wire.sendall(b'x'); time.sleep(600)",
    "byte by byte": FIND + "for byte in forged(answer): wire.sendall(bytes([byte])); time.sleep(1)",
    "huge header": FIND + "wire.sendall(struct.pack('>16sI', token, 2**32 - 1)); time.sleep(600)",
    "header that does not come": FIND + "wire.sendall(struct.pack('>16sI', token, 60_000)); time.sleep(600)",
    "not UTF-8": FIND + "wire.sendall(forged(b'\\xff' * 10))",
    "not JSON": FIND + "wire.sendall(forged(b'{'))",
    "a list": FIND + "wire.sendall(forged(b'[]'))",
    "deep": FIND + "wire.sendall(forged(b'[' * 50_000))",
    "deep objects": FIND + "wire.sendall(forged(b'{\"a\":' * 10_000 + b'1' + b'}' * 10_000))",
    "long number": FIND + "wire.sendall(forged(b'{\"blobs\": [], \"dropped\": ' + b'9' * 50_000 + b'}'))",
    "not a number": FIND + "wire.sendall(forged(answer | {'dropped': float('nan')}))",
    "negative": FIND + "wire.sendall(forged(answer | {'dropped': -10}))",
    "huge blobs": FIND + "wire.sendall(forged(answer | {'blobs': [2**62]})); time.sleep(600)",
    "blobs that do not come": FIND + "wire.sendall(forged(answer | {'blobs': [10**8]})); time.sleep(600)",
    "many blobs": FIND + "wire.sendall(forged(answer | {'blobs': [0] * 5000}))",
    "negative blobs": FIND + "wire.sendall(forged(answer | {'blobs': [-1]}))",
    "sizes": FIND + "wire.sendall(forged(answer | {'sizes': [[1 << 62, 1]], 'blobs': [3]}, b'abc'))",
    "other sizes": FIND + "wire.sendall(forged(answer | {'sizes': [[True, 1.0]], 'blobs': [3]}, b'abc'))",
    "no text": FIND + "wire.sendall(forged(answer | {'text': None}))",
    "surrogates": FIND + "wire.sendall(forged(answer | {'text': '\\ud800' * 1000}))",
    "descriptors sent along": FIND + "socket.send_fds(wire, [forged(answer)], [0] * 200)",
}


@pytest.fixture(scope="module")
def hasty() -> Iterator[PythonTool]:
    with ToolBox(dataclasses.replace(CONFIG, timeout_seconds=SECONDS)) as box:
        tool = box.tool("python")
        assert isinstance(tool, PythonTool)
        yield tool


@pytest.fixture(scope="module")
def bystander(hasty: PythonTool) -> Iterator[PythonSession]:
    session = hasty.open(Subject())
    session.call({"code": "count = 0"})
    yield session
    session.close()


def timely(session: PythonSession, code: str) -> Observation:
    start = time.monotonic()
    observation = session.call({"code": code})
    assert time.monotonic() - start < LATEST
    json.dumps(dataclasses.asdict(dataclasses.replace(observation, images=())), ensure_ascii=False).encode()
    return observation


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(hasty: PythonTool, bystander: PythonSession, attack: str, monkeypatch):
    monkeypatch.setattr(python_sandbox, "TRANSFER_SECONDS", 0.5)
    monkeypatch.setattr(python_sandbox, "INTERRUPT_SECONDS", 0.2)
    count = int(timely(bystander, "count += 1; count").text)
    threads = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server = hasty.server.process_id
    session = hasty.open(Subject())
    try:
        first = timely(session, ATTACKS[attack])
        assert not first.lost
        # Its own next answers may be made up as well, where it reads what is asked; after a crash they are not.
        for _ in range(3):
            following = timely(session, "6 * 7")
            assert not following.lost
            if following.text == "42":
                break
            assert not following.ok or attack in CHANGED
    finally:
        session.close()
    assert timely(bystander, "count").text == str(count)
    assert hasty.server.process_id == server
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    # Kibibytes; a call that shows all it may takes 100 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 150_000


CHANGED = ("stolen requests", "pictures", "output", "frames")
"""What goes on answering for its own session, wrongly."""
