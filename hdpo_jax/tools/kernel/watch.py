"""What a session's processes use together: memory and CPU, which limits of single processes do not bound.

The fork server looks at /proc from time to time: at all processes below it in one pass, and where these may use too
much memory at exact figures, process by process, so that nobody waits for long meanwhile.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

SHORTEST, LONGEST = 0.1, 1.0
"""Seconds between two looks."""
SHARE = 0.05
"""Of one core, spent on looking where that is possible within the longest pause."""
TICK = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
SOCKET_BYTES = 425_984
"""What can wait in a socket's buffer, which is memory of no process."""


class _Process(NamedTuple):
    """Of /proc/PID/stat."""

    parent: int
    running: bool
    cpu: int
    """Ticks, of all its threads."""
    resident: int
    """Bytes; those shared with others are counted in each."""


@dataclass
class _Account:
    """One session's."""

    cpu: float = 0.0
    """Seconds since its call began."""
    ticks: dict[int, int] = field(default_factory=dict)
    """Of each of its processes, at the last look."""


@dataclass
class _Suspect:
    """A session whose memory is counted exactly."""

    session: int
    left: dict[int, int]
    """Processes not counted yet -> resident bytes."""
    used: int


class Watch:
    def __init__(self, *, memory: int, cpu_seconds: float):
        """`memory`: bytes of a session; `cpu_seconds`: of a session, from a call's begin to the next one's."""
        self._memory = memory
        self._cpu_seconds = cpu_seconds
        self._accounts: dict[int, _Account] = {}
        self._suspects: list[_Suspect] = []
        self._looked = self._due = time.monotonic()
        self._cost = 0.0

    def renew(self, session: int) -> None:
        """A call begins."""
        if not self._accounts:
            self._looked = time.monotonic()
            self._due = self._looked + SHORTEST
        self._accounts.setdefault(session, _Account()).cpu = 0.0

    def forget(self, session: int) -> None:
        self._accounts.pop(session, None)

    def wait(self) -> float:
        """Seconds until there is something to do."""
        return max(self._due - time.monotonic(), 0.0)

    def advance(self, sessions: Mapping[int, int]) -> dict[int, str]:
        """Does the next piece of a look at sessions (number -> first process).

        Returns: what some of them have used too much of, "memory" or "CPU time".
        """
        begun = time.process_time()
        spent = self._examine() if self._suspects else self._look(sessions)
        self._cost += time.process_time() - begun
        if not self._suspects:
            self._due = time.monotonic() + min(max(self._cost / SHARE, SHORTEST), LONGEST)
            self._cost = 0.0
        return spent

    def _look(self, sessions: Mapping[int, int]) -> dict[int, str]:
        now = time.monotonic()
        since, self._looked = now - self._looked, now
        found = _processes()
        below: dict[int, list[int]] = {}
        for number, process in found.items():
            below.setdefault(process.parent, []).append(number)
        spent: dict[int, str] = {}
        for session, first in sessions.items():
            own = {number: found[number] for number in _descendants(first, below) if number in found}
            resident = {number: process.resident for number, process in own.items()}
            sockets = _sockets(first) * SOCKET_BYTES if len(own) > 1 else 0
            if self._charged(session, own, since) > self._cpu_seconds:
                spent[session] = "CPU time"
            elif sum(resident.values()) + sockets > self._memory:
                self._suspects.append(_Suspect(session, resident, sockets))
        return spent

    def _examine(self) -> dict[int, str]:
        suspect = self._suspects[-1]
        if suspect.left:
            suspect.used += _used(*suspect.left.popitem())
        if suspect.used > self._memory:
            self._suspects.pop()
            return {suspect.session: "memory"}
        if not suspect.left:
            self._suspects.pop()
        return {}

    def _charged(self, session: int, processes: Mapping[int, _Process], since: float) -> float:
        """CPU seconds of the session's call, after those of this look."""
        account = self._accounts.setdefault(session, _Account())
        for number, process in processes.items():
            before = account.ticks.get(number)
            if before is not None:
                account.cpu += max(process.cpu - before, 0) * TICK
            elif process.running:
                # Processes that come and go between two looks leave no other trace: the one that is seen stands for
                # those that were not.
                account.cpu += max(since * _share_on_cpu(number), process.cpu * TICK)
            else:
                account.cpu += process.cpu * TICK
        account.ticks = {number: process.cpu for number, process in processes.items()}
        return account.cpu


def _processes() -> dict[int, _Process]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            text = _read(f"/proc/{name}/stat")
            if text:
                # The name, in parentheses, may hold anything.
                fields = text.rpartition(b")")[2].split()
                cpu, resident = int(fields[11]) + int(fields[12]), int(fields[21]) * PAGE
                found[int(name)] = _Process(int(fields[1]), fields[0] == b"R", cpu, resident)
    return found


def _descendants(first: int, below: Mapping[int, Iterable[int]]) -> set[int]:
    """With the first process: those that lost their parent are its children."""
    found = {first}
    waiting = [first]
    while waiting:
        children = set(below.get(waiting.pop(), ())) - found
        found |= children
        waiting += children
    return found


def _share_on_cpu(process: int) -> float:
    """Of the time that it wanted a CPU, the share in which it had one."""
    figures = (_read(f"/proc/{process}/schedstat") or b"").split()
    had, waited = (int(figures[0]), int(figures[1])) if figures else (0, 0)
    return (had + 1) / (had + waited + 1)


def _sockets(process: int) -> int:
    """In its network, which all processes of its session share."""
    return max((_read(f"/proc/{process}/net/unix") or b"").count(b"\n") - 1, 0)


def _used(process: int, resident: int) -> int:
    """Bytes: its own, and its part of what it shares with others. `resident`: where that can not be known."""
    text = _read(f"/proc/{process}/smaps_rollup")
    if text is None:
        return resident
    lines = text.splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith((b"Pss:", b"SwapPss:")))


def _read(path: str) -> bytes | None:
    """Empty where the process is gone, or the kernel has no such file; None where it may not be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return None
    except OSError:
        return b""
    try:
        pieces = []
        while piece := os.read(descriptor, 65_536):
            pieces.append(piece)
        return b"".join(pieces)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
