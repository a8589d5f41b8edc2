"""What a session's processes use together: memory and CPU, which limits of single processes do not bound.

The fork server looks at /proc from time to time: at all processes below it, in one pass, and at exact figures where
the rough ones come near a bound. A look takes a twentieth of the time at most.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PERIOD = 0.1
SHARE = 0.05
"""Of one core, spent on looking, at most."""
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
    """Bytes, shared ones included."""


@dataclass
class _Account:
    """One session's."""

    cpu: float = 0.0
    """Seconds since its call began."""
    ticks: dict[int, int] = field(default_factory=dict)
    """Of each of its processes, at the last look."""


class Watch:
    def __init__(self, *, memory: int, cpu_seconds: float):
        """`memory`: bytes of a session; `cpu_seconds`: of a session, from a call's begin to the next one's."""
        self._memory = memory
        self._cpu_seconds = cpu_seconds
        self._accounts: dict[int, _Account] = {}
        self._looked = self._due = time.monotonic()

    def renew(self, session: int) -> None:
        """A call begins."""
        if not self._accounts:
            self._looked = time.monotonic()
            self._due = self._looked + PERIOD
        self._accounts.setdefault(session, _Account()).cpu = 0.0

    def forget(self, session: int) -> None:
        self._accounts.pop(session, None)

    def wait(self) -> float:
        """Seconds until the next look."""
        return max(self._due - time.monotonic(), 0.0)

    def look(self, sessions: Mapping[int, int]) -> dict[int, str]:
        """What sessions (number -> first process) have used too much of: "memory" or "CPU time"."""
        begun = time.monotonic()
        since, self._looked = begun - self._looked, begun
        found = _processes()
        below: dict[int, list[int]] = {}
        for number, process in found.items():
            below.setdefault(process.parent, []).append(number)
        spent: dict[int, str] = {}
        for session, first in sessions.items():
            own = {number: found[number] for number in _descendants(first, below) if number in found}
            if self._charged(session, own, since) > self._cpu_seconds:
                spent[session] = "CPU time"
            elif sum(process.resident for process in own.values()) > self._memory and _used(own) > self._memory:
                spent[session] = "memory"
        ended = time.monotonic()
        self._due = ended + max(PERIOD, (ended - begun) / SHARE)
        return spent

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
                account.cpu += max(since, process.cpu * TICK)
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


def _used(processes: Mapping[int, _Process]) -> int:
    """Bytes that these processes use: what they share with each other once, what they share with others in part."""
    used = sockets = 0
    for number, process in processes.items():
        try:
            lines = _read(f"/proc/{number}/smaps_rollup").splitlines()
        except PermissionError:
            used += process.resident
            continue
        used += sum(int(line.split()[1]) << 10 for line in lines if line.startswith((b"Pss:", b"SwapPss:")))
        # All of them are in one network.
        sockets = sockets or max(_read(f"/proc/{number}/net/unix").count(b"\n") - 1, 0)
    return used + sockets * SOCKET_BYTES


def _read(path: str) -> bytes:
    """Nothing where the process is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    try:
        pieces = []
        while piece := os.read(descriptor, 65_536):
            pieces.append(piece)
        return b"".join(pieces)
    except ProcessLookupError:
        return b""
    finally:
        os.close(descriptor)
