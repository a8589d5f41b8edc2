"""Jobs of two real processes that lose one: the other ends within a minute, and says which."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from sharding.watch import EX_TEMPFAIL, PATIENCE_SECONDS
from tests.processes import end, start_job

WORKER = str(Path(__file__).with_name("watch_worker.py"))
ADVICE = "this one can not go on without it; start all of them again, and the run goes on from its last checkpoint"
LOST = {
    "is killed": (1, signal.SIGKILL, "has not been heard of for 30 s"),
    "stops": (1, signal.SIGSTOP, "has not been heard of for 30 s"),
    "coordinates and is killed": (0, signal.SIGKILL, "is gone"),
    "coordinates and stops": (0, signal.SIGSTOP, "has not answered for 30 s"),
    "aborts": (1, None, "gave up (it aborted)"),
    "fails": (1, None, "gave up (OSError: disk full)"),
}


class End(NamedTuple):
    """Of a process; `seconds` after the trouble began."""

    status: int
    errors: str
    seconds: float


@pytest.fixture(scope="module")
def ends() -> dict[str, list[End]]:
    """How each process of each job ended; all jobs run at once, for they mostly wait."""
    troubles = [*LOST, "is slow"]
    with ThreadPoolExecutor(len(troubles)) as pool:
        return dict(zip(troubles, pool.map(job_in_trouble, troubles), strict=True))


def job_in_trouble(trouble: str) -> list[End]:
    workers = start_job([WORKER, trouble])
    try:
        for worker in workers:
            assert worker.stdout and worker.stdout.readline() == "here\n"
        time.sleep(3)  # they meet
        number, how, _ = LOST.get(trouble, (1, None, ""))
        if how:
            workers[number].send_signal(how)
        started, found = time.monotonic(), {}
        for one in (1 - number, number):
            if one == number:
                workers[one].send_signal(signal.SIGCONT)
            _, errors = workers[one].communicate(timeout=75)
            found[one] = End(workers[one].returncode, errors, time.monotonic() - started)
        return [found[0], found[1]]
    finally:
        end(workers)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", LOST)
def test_the_other_ends_within_a_minute_and_says_why(ends, trouble):
    number, how, what = LOST[trouble]
    status, errors, seconds = ends[trouble][1 - number]
    assert status == EX_TEMPFAIL, errors
    assert seconds < 60
    said = [line for line in errors.splitlines() if line.startswith("process ")]
    assert len(said) == 1 and said[0] == errors.splitlines()[-1]
    assert said[0].startswith(f"process {number} of 2 on ") and said[0].endswith(f" {what}: {ADVICE}")
    assert "Traceback" not in errors
    lost, errors, seconds = ends[trouble][number]
    if how == signal.SIGSTOP:  # once it goes on, it finds that it is alone
        assert lost not in (0, -signal.SIGKILL)
    elif trouble == "aborts":
        assert lost == -signal.SIGABRT
    elif trouble == "fails":
        assert lost == 1 and errors.splitlines()[-1] == "OSError: disk full" and seconds < 60


@pytest.mark.slow
def test_one_that_is_slow_is_waited_for(ends):
    """For longer than one may be silent."""
    for status, errors, seconds in ends["is slow"]:
        assert status == 0, errors
        assert seconds > PATIENCE_SECONDS
