"""A session's filter of system calls, in the kernel's classic BPF."""

import ctypes
import errno
import platform
from collections.abc import Sequence

from . import syscalls

ALLOW, KILL, ERROR = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
LOAD, MASK, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
MACHINES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

Step = tuple[int, int, int, int]
"""Code; how many steps to leave out when its test holds, and when not; the constant."""


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def program(machine: str = platform.machine()) -> Program:
    """The filter for a kind of processor. Raises OSError where its numbers are not known."""
    if machine not in MACHINES:
        known = " and ".join(MACHINES)
        raise OSError(errno.ENOSYS, f"system calls can be filtered on {known}; found {machine}")
    return assembled(_steps(list(MACHINES).index(machine), MACHINES[machine]))


def assembled(steps: Sequence[Step]) -> Program:
    """As the kernel takes it."""
    return Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))


def _steps(column: int, architecture: int) -> list[Step]:
    """`column`: of the tables of numbers."""
    conditions = {
        "clone": [*_load(0), (ANY_BIT, 0, 1, syscalls.NAMESPACES), *_error(errno.EPERM)],
        "socket": [
            *_none_but(0, syscalls.SOCKETS, errno.EAFNOSUPPORT),
            *_none_but(1, syscalls.KINDS, errno.ESOCKTNOSUPPORT, mask=0xF),
            *_none_but(2, syscalls.TRANSPORTS, errno.EPROTONOSUPPORT),
        ],
        "socketpair": _none_but(0, syscalls.SOCKETS, errno.EAFNOSUPPORT),
        "ioctl": _all_but(1, syscalls.TERMINALS, errno.EPERM),
        "fcntl": _all_but(1, syscalls.LEASES, errno.EPERM),
        "mmap": [*_load(3), (ANY_BIT, 0, 1, syscalls.HUGE_PAGES), *_error(errno.EPERM)],
        "personality": _none_but(0, syscalls.PERSONALITIES, errno.EPERM),
        "setrlimit": _all_but(0, (syscalls.RLIMIT_CORE,), errno.EPERM),
        "prlimit64": _all_but(1, (syscalls.RLIMIT_CORE,), errno.EPERM),
    }
    numbers = {name: row[column] for name, row in syscalls.CONDITIONAL.items()}
    blocks = {number: [*conditions[name], *_allow()] for name, number in numbers.items()}
    blocks |= {row[column]: _error(errno.ENOSYS) for row in syscalls.MISSING.values()}
    blocks |= {row[column]: _error(errno.EPERM) for row in syscalls.REFUSED.values()}
    # Calls of another kind of processor: of programs for 32 bits.
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    steps += [(AT_LEAST, 0, 1, syscalls.UNKNOWN), *_error(errno.ENOSYS)]
    for number, block in blocks.items():
        if number is not None:
            steps += [(EQUAL, 0, len(block), number), *block]
    return [*steps, *_allow()]


def _load(argument: int) -> list[Step]:
    """The lower half of an argument, which is all that the kernel reads of these."""
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument)]


def _none_but(argument: int, values: tuple[int, ...], error: int, mask: int = 0xFFFF_FFFF) -> list[Step]:
    tests = [(EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*_load(argument), (MASK, 0, 0, mask), *tests, *_error(error)]


def _all_but(argument: int, values: tuple[int, ...], error: int) -> list[Step]:
    tests = [step for value in values for step in ((EQUAL, 0, 1, value), *_error(error))]
    return [*_load(argument), *tests]


def _error(number: int) -> list[Step]:
    return [(RETURN, 0, 0, ERROR | number)]


def _allow() -> list[Step]:
    return [(RETURN, 0, 0, ALLOW)]
