"""System calls that a session may not make: memory that no limit of a process counts.

A file of `memfd_create` lives in memory, outside the address space that RLIMIT_AS bounds and the disk that the
session's /tmp bounds.
"""

import ctypes
import errno
import platform

ALLOW, REFUSE = 0x7FFF_0000, 0x0005_0000 | errno.EPERM
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data

NATIVE = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
REFUSED = {"x86_64": (319, 447), "aarch64": (279, 447)}
"""memfd_create, memfd_secret."""
X32 = 0x4000_0000
"""Numbers from here on are calls of x86-64's second, 32-bit interface."""


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def _filter(machine: str) -> _Program | None:
    """The filter for this kind of processor; None where its numbers are not known."""
    if machine not in NATIVE:
        return None
    tests = [(EQUAL, number) for number in REFUSED[machine]] + [(AT_LEAST, X32)]
    last = len(tests) + 4  # where REFUSE stands
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 0, last - 2, NATIVE[machine]), (LOAD, 0, 0, NUMBER)]
    steps += [(code, last - len(steps) - place - 1, 0, k) for place, (code, k) in enumerate(tests)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))


FILTER = _filter(platform.machine())
"""Made once, by the fork server: a session only has to install it."""
