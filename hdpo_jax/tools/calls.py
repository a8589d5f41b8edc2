"""A pool for tool calls that gives up on what never answers."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any


class GivenUp(Exception):
    """A call did not answer in time. (A tool may raise TimeoutError itself, and then it has answered.)"""


@dataclass(eq=False)
class _Job:
    run: Callable[[], Any]
    future: Future = field(default_factory=Future)
    thread: threading.Thread | None = None
    started: float | None = None


class CallPool:
    """Runs calls in daemon threads, `workers` at a time, none for longer than `seconds`.

    A thread that does not come back can not be stopped: its call fails with GivenUp, another thread takes its place,
    and it neither holds up the pool nor keeps the program from ending. (The standard library's pools do both.)
    """

    def __init__(self, workers: int, seconds: float):
        self._seconds = seconds
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._cancelled = False
        self._threads = [self._thread() for _ in range(workers)]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The call's future; after `cancel`, one that is cancelled."""
        job = _Job(lambda: function(*arguments))
        if self._cancelled:
            job.future.cancel()
        else:
            self._jobs.append(job)
            self._queue.put(job)
        return job.future

    def expire(self) -> float:
        """Gives up on calls whose time is over; the seconds until the next one's is, or the whole of them."""
        now = time.monotonic()
        self._jobs = [job for job in self._jobs if not job.future.done()]
        left = self._seconds
        for job in self._jobs:
            ends = (job.started or now) + self._seconds
            if ends <= now and job.thread and _settle(job.future.set_exception, GivenUp()):
                self._threads.remove(job.thread)
                self._threads.append(self._thread())
            left = min(left, max(0.0, ends - now))
        return left

    def cancel(self) -> None:
        """Nothing begins any more."""
        self._cancelled = True
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.cancel()

    def close(self, seconds: float = 5.0) -> None:
        """Cancels what has not begun; waits for the rest no longer than that."""
        self.cancel()
        for _ in self._threads:
            self._queue.put(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, name="tool", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.thread, job.started = threading.current_thread(), time.monotonic()
            try:
                settled = _settle(job.future.set_result, job.run())
            except BaseException as error:
                settled = _settle(job.future.set_exception, error)
            if not settled:  # given up: another thread is in this one's place
                return


def _settle(settle: Callable[[Any], None], value: Any) -> bool:
    """Whether it was the first to settle the future."""
    try:
        settle(value)
    except InvalidStateError:
        return False
    return True
