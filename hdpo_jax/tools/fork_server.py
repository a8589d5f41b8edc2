"""The host's end of the fork server: starts it, asks it for sessions, and starts it again when it is gone."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import bubblewrap

START_SECONDS = 60.0
ANSWER_SECONDS = 10.0
CPU_FACTOR = 4
"""CPU seconds that a session may use from one call to the next, for each second of a call's timeout: several of its
threads and processes may work."""

logger = logging.getLogger(__name__)


class ServerLost(Exception):
    """The fork server is gone and could not be started again."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A forked session: its number, its socket, and the server that it belongs to."""

    number: int
    connection: socket.socket
    server: int
    """Which start of the server made it."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a session ended."""

    status: int
    """A wait status."""
    reason: str
    """What it used too much of ("memory", "CPU time"), "closed" when it lived on until it was closed, or what kept it
    from starting; empty: it ended by itself."""


class ForkServer:
    """One process inside the sandbox, from which every session is forked. Threads may share it."""

    def __init__(self, config: ToolsConfig):
        self._config = config
        self._lock = threading.Lock()
        self._numbers = 0
        self._starts = 0
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._process_id = -1
        self._control: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        with self._lock:
            self._start()

    @property
    def process_id(self) -> int:
        """The server's process number as the host sees it."""
        return self._process_id

    def open(self) -> Kernel:
        """Forks a session. Raises ServerLost when there is no server and none can be started."""
        with self._lock:
            if self._stopped:
                raise ServerLost("the tools are closed")
            if not self._alive():
                logger.warning("the python tool's fork server is gone; starting it again")
                try:
                    self._start()
                except ConfigError as error:
                    raise ServerLost(str(error)) from None
            self._numbers += 1
            ours, theirs = socket.socketpair()
            with theirs:
                if not self._send({"do": "open", "session": self._numbers}, theirs.fileno()):
                    ours.close()
                    raise ServerLost("the fork server does not answer")
            return Kernel(number=self._numbers, connection=ours, server=self._starts)

    def begin(self, kernel: Kernel) -> None:
        """A call begins: what the session may use is counted anew."""
        with self._lock:
            if kernel.server == self._starts:
                self._send({"do": "call", "session": kernel.number})

    def interrupt(self, kernel: Kernel) -> None:
        """Ctrl-C for what the session runs. Returns when it is sent, so that it does not hit a later call."""
        self._ask(kernel, "interrupt")

    def close(self, kernel: Kernel) -> None:
        """Kills the session and everything it started; does not wait."""
        kernel.connection.close()
        with self._lock:
            if kernel.server == self._starts:
                self._send({"do": "close", "session": kernel.number})

    def end(self, kernel: Kernel) -> End | None:
        """Closes the session, waits until it is gone and says how it ended; None when that can not be known.

        A server that does not answer is killed, so that a new one can start.
        """
        kernel.connection.close()
        answer = self._ask(kernel, "close")
        if answer is not None:
            return End(**answer)
        if self._ask(kernel, "interrupt") is None:
            with self._lock:
                if kernel.server == self._starts:
                    self._kill()
        return None

    def _ask(self, kernel: Kernel, request: str) -> dict[str, Any] | None:
        """The server's answer; None when there is none in time. Others may use the server meanwhile."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                if kernel.server != self._starts or not self._alive():
                    return None
                if not self._send({"do": request, "session": kernel.number}, theirs.fileno()):
                    return None
            return _received(ours, ANSWER_SECONDS)

    def stop(self) -> None:
        """Ends the server and with it every session."""
        with self._lock:
            self._stopped = True
            self._kill()

    def _alive(self) -> bool:
        if self._process is None or self._control is None or self._process.poll() is not None:
            return False
        try:
            self._control.setblocking(False)
            return self._control.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _start(self) -> None:
        """Starts the process and waits until it is ready. Raises ConfigError, one line, when it does not get there."""
        self._kill()
        self._starts += 1
        isolated = self._config.sandbox == "bubblewrap"
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile())
            source, sink = os.pipe()
            report, reporter = stack.enter_context(open(source, "rb")), stack.enter_context(open(sink, "wb"))
            host = stack.enter_context(open(os.pidfd_open(os.getpid()), "rb", buffering=0)).fileno()
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            self._folder = tempfile.TemporaryDirectory(prefix="hdpo-tools-")
            command, variables = self._command(isolated, theirs.fileno(), host, reporter.fileno())
            # A session of its own: Ctrl-C in the terminal is the trainer's affair.
            self._process = subprocess.Popen(
                command,
                env=variables,
                cwd=self._folder.name,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), host, reporter.fileno()),
                start_new_session=True,
            )
            # bubblewrap's own number, until it has told that of the server.
            self._process_id = self._process.pid
            theirs.close()
            answer = _received(self._control, START_SECONDS)
            os.set_blocking(report.fileno(), False)
            description = report.read() if isolated else None
            if description:
                self._process_id = json.loads(description)["child-pid"]
            if answer is None or not answer.get("ready"):
                self._kill()
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines() or ["no answer"]
                reason = bubblewrap.with_a_way_out(said[-1]) if isolated else said[-1]
                raise ConfigError(f"the python tool's sandbox ({self._config.sandbox}) does not start: {reason}")

    def _command(self, isolated: bool, control: int, host: int, reporter: int) -> tuple[list[str], dict[str, str]]:
        """The server's command line and its environment."""
        kernel = bubblewrap.KERNEL_INSIDE if isolated else str(bubblewrap.KERNEL)
        variables = bubblewrap.environment(kernel)
        command = [*bubblewrap.python_command(), json.dumps(self._settings(isolated, control, host))]
        if isolated:
            return bubblewrap.sandboxed(command, variables, report=reporter), {}
        folder = "" if self._folder is None else self._folder.name
        return command, variables | {"HOME": folder, "MPLCONFIGDIR": folder}

    def _settings(self, isolated: bool, control: int, host: int) -> dict[str, Any]:
        config = self._config
        return {
            "isolated": isolated,
            "control": control,
            "host": host,
            "folder": "" if self._folder is None else self._folder.name,
            "memory_mb": config.memory_mb,
            "disk_mb": config.disk_mb,
            "processes": config.processes,
            "output_chars": config.output_chars,
            "max_images": config.max_images,
            "cpu_seconds": config.timeout_seconds * CPU_FACTOR,
        }

    def _send(self, message: dict[str, Any], descriptor: int | None = None) -> bool:
        """False when the server is gone; one that does not read for long is killed, so that a new one can start."""
        if self._control is None:
            return False
        try:
            self._control.settimeout(ANSWER_SECONDS)
            descriptors = [] if descriptor is None else [descriptor]
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except OSError:
            self._kill()
            return False
        return True

    def _kill(self) -> None:
        if self._control is not None:
            # The server ends at the end of this socket, and its sessions with it.
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process_id, signal.SIGKILL)
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _received(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The next message; None when the other end is gone, or silent for so long."""
    try:
        connection.settimeout(seconds)
        message = connection.recv(4096)
    except OSError:
        return None
    return json.loads(message) if message else None
