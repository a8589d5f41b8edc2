"""Ends the processes of a job once one of them is gone, where each would wait for it for ever.

Each tells the coordinator (process 0) every few seconds that it lives, and asks after the others. What is seen to be
gone is named in one line. The next start of all goes on from the last checkpoint.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # what the public API has no word for: the store that processes share

from sharding import multihost

EX_TEMPFAIL = 75
"""Exit status of a process that ends because another is gone: a failure that the next start may not see."""
BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 30
"""Silence after which a process counts as gone. A program that holds the interpreter for as long would count, too."""
LAST_WORDS_SECONDS = 5
"""How long a process may take to fail by itself after another has, and say so in its own words."""
_FOLDER = "hdpo_jax/alive"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def job() -> Iterator[None]:
    """All that the processes of a job do together. Joins them (`multihost.start`), and watches while it is entered.

    Where a process dies, stops, or leaves by an error of its own, the others log one line that names it and exit with
    status 75 (EX_TEMPFAIL), within a minute. Nothing is watched where there is one process.
    """
    multihost.start()
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
    except BaseException as error:
        if _of_a_program(error):
            _let_the_watch_speak()
        watch.leave(gave_up=f"{type(error).__name__}: {error}")
        _exit_soon(lead=not global_state.process_id)
        raise
    watch.leave(gave_up=None)


class _Watch:
    """Two threads: one tells and asks, which may hang where the coordinator does; the other judges."""

    def __init__(self):
        self._client: Any = global_state.client
        self._me, self._count = global_state.process_id, global_state.num_processes
        self._lock = threading.Lock()
        self._told = 0
        self._last_words: dict[str, Any] = {}
        self._said: dict[int, dict[str, Any]] = {number: {"host": None} for number in range(self._count)}
        # Counted in the judge's own seconds: one that was stopped itself has not been waiting for the others.
        self._silent = dict.fromkeys(range(self._count), 0)
        self._unanswered = 0
        self._left = threading.Event()
        self._tell()
        self._abort = _on_abort(self._aborted)
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def leave(self, *, gave_up: str | None) -> None:
        """Nobody waits for this process any more; the others hear what it `gave_up` for (None: it is done)."""
        self._left.set()
        self._last_words = {"left": True, "gave_up": gave_up}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell()
        _on_abort(None)

    def _tell(self) -> None:
        with self._lock:
            self._told += 1
            # With the last words once there are any: a beat that was on its way does not take them back.
            beat = {"beat": self._told, "host": socket.gethostname(), **self._last_words}
            self._client.key_value_set(f"{_FOLDER}/{self._me}", json.dumps(beat), allow_overwrite=True)

    def _talk(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._tell()
                said = self._client.key_value_dir_get(_FOLDER)
            except jax.errors.JaxRuntimeError:
                continue  # the judge counts the seconds without an answer
            self._unanswered = 0
            for key, text in said:
                number, beat = int(key.rpartition("/")[2]), json.loads(text)
                if beat != self._said[number]:
                    self._said[number], self._silent[number] = beat, 0

    def _judge(self) -> None:
        while not self._left.wait(1):
            self._unanswered += 1
            if self._unanswered > PATIENCE_SECONDS and self._me:
                self._end(0, f"has not answered for {PATIENCE_SECONDS} s")
            for number, said in self._said.items():
                self._silent[number] += 1
                if said.get("gave_up") and self._silent[number] > LAST_WORDS_SECONDS:
                    self._end(number, f"gave up ({said['gave_up']})")
                if not said.get("left") and number != self._me and self._silent[number] > PATIENCE_SECONDS:
                    self._end(number, f"has not been heard of for {PATIENCE_SECONDS} s")

    def _aborted(self) -> None:
        """Called while this process aborts: JAX has it so where it loses the coordinator, Gloo where it loses another.

        Who that was, the watch says within its patience; where it finds nobody gone, the abort was this one's own.
        """
        host, _, port = str(global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._end(0, "is gone")
        _let_the_watch_speak()
        self.leave(gave_up="it aborted")

    def _end(self, number: int, what: str) -> NoReturn:
        host = self._said[number]["host"]
        where = f" on {host}" if host else ""
        what = " ".join(what.split())
        log.critical(
            "process %d of %d%s %s: this one can not go on without it; start all of them again, "
            "and the run goes on from its last checkpoint",
            *(number, self._count, where, what),
        )
        sys.stderr.flush()
        # Not sys.exit: the main thread waits in a program that will never end.
        os._exit(EX_TEMPFAIL)


def _let_the_watch_speak() -> None:
    """Waits where somebody's end may be why a program failed: who that was is what there is to say."""
    time.sleep(PATIENCE_SECONDS + 2 * BEAT_SECONDS)


def _exit_soon(*, lead: bool) -> None:
    """Bounds what is left of a process that gave up: JAX's own shutdown waits for the others, minutes where they fail.

    The coordinator goes last: whom it leaves behind, JAX aborts.
    """
    timer = threading.Timer(3 * LAST_WORDS_SECONDS if lead else LAST_WORDS_SECONDS - 2, os._exit, [1])
    timer.daemon = True
    timer.start()


def _of_a_program(error: BaseException) -> bool:
    """Whether XLA says it, whose words begin with a status whatever class JAX gives them; not for want of memory."""
    status = str(error).partition(": ")[0]
    return isinstance(error, RuntimeError | ValueError) and status.isupper() and status != "RESOURCE_EXHAUSTED"


def _on_abort(handler: Any) -> Any:
    """Has `handler` called when the process aborts (None: no more); what it returns has to be kept while that may be.

    By the C library: where a thread of JAX aborts, a handler of Python's own would wait for the main thread.
    """
    library = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    called = kind(lambda _: handler()) if handler else kind()
    library.signal(signal.SIGABRT, ctypes.cast(called, ctypes.c_void_p))
    return called
