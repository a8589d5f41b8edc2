"""The fork server: imports everything once, then forks a confined session whenever the host asks for one.

The host speaks to it over a control socket, one JSON object a packet, with a socket for the answer where it wants one;
it never runs model-written code itself.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import frames, isolation, seccomp, users
from .shell import Session
from .watch import Watch

MAX_CODE_BYTES = 1 << 24
MAX_IMAGE_BYTES = 1 << 30
FAILURE_CHARS = 200
MADV_COLLAPSE = 25
HUGE_PAGE = 1 << 21

_getpid = os.getpid


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the host wants it; see `fork_server` there."""

    isolated: bool
    """False: no namespaces, for code that is trusted."""
    control: int
    """Descriptor of the control socket."""
    host: int
    """Descriptor (pidfd) of the host process; this process ends with it."""
    folder: str
    """Where sessions that are not isolated have their folders."""
    memory_mb: int
    disk_mb: int
    processes: int
    output_chars: int
    max_images: int
    cpu_seconds: float
    """CPU time of a session from one call's begin to the next one's."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a session ended."""

    status: int = 0
    """A wait status."""
    reason: str = ""
    """What it used too much of ("memory", "CPU time"), "closed" when it lived on until it was closed, or what kept it
    from starting; empty: it ended by itself."""


class Zygote:
    def __init__(self, settings: Settings):
        self._settings = settings
        self._limits = isolation.Limits(
            memory_mb=settings.memory_mb, disk_mb=settings.disk_mb, processes=settings.processes
        )
        self._watch = Watch(memory=settings.memory_mb * isolation.MEBIBYTE, cpu_seconds=settings.cpu_seconds)
        self._control = socket.socket(fileno=settings.control)
        self._sessions: dict[int, int] = {}
        """Session -> process id."""
        self._ended: dict[int, End] = {}
        """Sessions that are gone, until the host closes them."""
        self._closing: dict[int, int | None] = {}
        """Sessions that are closed but not gone yet -> descriptor on which the host waits for it."""
        self._killed: dict[int, str] = {}
        """Sessions that are killed but not gone yet -> why."""
        self._namespace = os.open("/proc/self/ns/pid", os.O_RDONLY) if settings.isolated else -1
        self._users = users.spare_users()
        self._forbidden = seccomp.program() if settings.isolated else None
        self._session = Session(output_chars=settings.output_chars, max_images=settings.max_images)

    def prepare(self) -> None:
        """Warms up, then keeps memory from being written: every page written after a fork is a page copied."""
        self._session.warm_up()
        if self._settings.isolated:
            isolation.next_forks_share_a_time_namespace()
        else:
            isolation.adopt_orphans()
        gc.collect()
        gc.freeze()
        gc.disable()
        _collapse_pages()

    def serve(self) -> None:
        """Until the host is gone."""
        self._control.send(b'{"ready": true}')
        wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._private = [wake, waker]
        watched = select.poll()
        for descriptor in (self._control.fileno(), self._settings.host, wake.fileno()):
            watched.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in watched.poll(self._watch.wait() * 1e3 if self._sessions else None)}
            if self._settings.host in ready:
                return
            if wake.fileno() in ready:
                wake.recv(4096)
            self._reap()
            if self._control.fileno() in ready and not self._obey():
                return
            if self._sessions and not self._watch.wait():
                for session, reason in self._watch.advance(self._sessions).items():
                    if session in self._sessions:
                        self._killed.setdefault(session, reason)
                        self._kill(session)

    def _obey(self) -> bool:
        """One request of the host; False when the host is gone."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 4096, 1)
        if not message:
            return False
        request = json.loads(message)
        session, descriptor = request["session"], descriptors[0] if descriptors else None
        match request["do"]:
            case "open":
                self._open(session, descriptors[0])
            case "call":
                if session in self._sessions:
                    self._watch.renew(session)
            case "interrupt":
                self._signal(session, signal.SIGINT)
                _answer(descriptor, {})
            case "close":
                self._close(session, descriptor)
        return True

    def _open(self, session: int, descriptor: int) -> None:
        try:
            if self._settings.isolated:
                isolation.next_fork_opens_pid_namespace()
            try:
                process = os.fork()
                if process == 0:
                    self._live(session, descriptor)
                self._sessions[session] = process
                self._watch.renew(session)
            finally:
                if self._settings.isolated:
                    isolation.forks_stay_in(self._namespace)
        except OSError as error:
            # The host learns of it by the end of the session's socket, and asks.
            self._ended[session] = End(reason=str(error))
        os.close(descriptor)

    def _signal(self, session: int, number: int) -> None:
        process = self._sessions.get(session)
        if process is not None:
            # Not reaped yet, so the number is still this process's.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _kill(self, session: int) -> None:
        if not self._settings.isolated:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._sessions[session], signal.SIGKILL)
        self._signal(session, signal.SIGKILL)

    def _close(self, session: int, descriptor: int | None) -> None:
        self._reap()
        if session in self._sessions:
            self._closing[session] = descriptor
            self._killed.setdefault(session, "closed")
            self._kill(session)
        else:
            self._finish(session, descriptor, self._ended.pop(session, End()))

    def _finish(self, session: int, descriptor: int | None, end: End) -> None:
        if not self._settings.isolated:
            with contextlib.suppress(RecursionError):
                shutil.rmtree(self._folder(session), ignore_errors=True)
        _answer(descriptor, asdict(end))

    def _reap(self) -> None:
        sessions = {process: session for session, process in self._sessions.items()}
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                break
            session = sessions.pop(process, None)
            if session is None:
                continue
            del self._sessions[session]
            self._watch.forget(session)
            reason = self._killed.pop(session, "")
            end = End(status=status, reason=reason if _killed(status) else "")
            if session in self._closing:
                self._finish(session, self._closing.pop(session), end)
            else:
                self._ended[session] = end
        if not self._settings.isolated:
            self._sweep()

    def _sweep(self) -> None:
        """Kills what closed sessions left behind: children of this process that are no session."""
        known = set(self._sessions.values())
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            orphans = [int(number) for number in file.read().split()]
        for process in orphans:
            if process not in known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _folder(self, session: int) -> str:
        return os.path.join(self._settings.folder, str(session))

    def _live(self, session: int, descriptor: int) -> NoReturn:
        """The session's process: confined first, then one call after the other until the host hangs up."""
        connection = socket.socket(fileno=descriptor)
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for private in (self._control, *self._private):
                private.close()
            os.close(self._settings.host)
            # Not setsid: a scheduler that groups by terminal session would give each a full share of the CPU.
            os.setpgid(0, 0)
            for waiting in filter(None, self._closing.values()):
                os.close(waiting)
            if self._forbidden is not None:
                os.close(self._namespace)
                isolation.set_limits(self._limits)
                user = self._users[session % len(self._users)] if self._users else None
                isolation.confine(self._limits, user, self._forbidden)
            else:
                os.makedirs(self._folder(session))
                os.chdir(self._folder(session))
                isolation.adopt_orphans()
                isolation.set_limits(self._limits)
            self._sessions.clear()
            gc.enable()
            self._answer(connection)
        except frames.Closed:
            pass
        except BaseException as error:
            with contextlib.suppress(BaseException):
                failure = {"failure": f"{type(error).__name__}: {error}"[:FAILURE_CHARS]}
                frames.send(connection, bytes(frames.TOKEN_BYTES), failure)
        os._exit(0)

    def _answer(self, connection: socket.socket) -> None:
        process = os.getpid()
        started = False
        while True:
            token, header, blobs = frames.receive(connection, max_header=MAX_CODE_BYTES, max_bytes=MAX_IMAGE_BYTES)
            if not started:
                self._session.start(blobs)
                started = True
            reply = self._session.run(header["code"])
            if _getpid() != process:
                # A fork that the code left to itself: the answer is its parent's to give.
                return
            shown = tuple(reply.shown.pictures)
            answer = {"text": reply.text, "ok": reply.ok, "dropped": reply.shown.dropped}
            answer["sizes"] = [size for size, _ in shown]
            frames.send(connection, bytes(token), answer, [pixels for _, pixels in shown])


def _killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _answer(descriptor: int | None, answer: dict[str, Any]) -> None:
    """Sends it to a host that waits for it; the host may have given up."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(answer).encode())
        os.close(descriptor)


def _collapse_pages() -> None:
    """Huge pages under the heap: a fork copies one entry for 2 MiB instead of 512. Where the kernel can, else not."""
    madvise = ctypes.CDLL(None).madvise
    with open("/proc/self/maps") as file:
        regions = [line.split() for line in file]
    for span, rights, _, _, inode, *name in regions:
        if rights[:2] == "rw" and inode == "0" and name != ["[stack]"]:
            start, end = (int(bound, 16) for bound in span.split("-"))
            start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            for address in range(start, end, HUGE_PAGE):
                madvise(ctypes.c_void_p(address), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)


def main(arguments: list[str]) -> None:
    settings = Settings(**json.loads(arguments[0]))
    zygote = Zygote(settings)
    zygote.prepare()
    zygote.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
