"""The filter of system calls: what it decides on both kinds of processor, and that it holds inside."""

import errno
import re
import struct
from pathlib import Path

import pytest

from hdpo_jax.tools.kernel import seccomp, syscalls

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
TABLES = (syscalls.REFUSED, syscalls.MISSING, syscalls.CONDITIONAL)
ALLOWED = "allowed"
KILLED = "killed"


def decided(machine: str, number: int, *arguments: int, architecture: int | None = None) -> str:
    """What the kernel would do with a call: the name of an error, or one of the words above."""
    program = seccomp.program(machine)
    steps = [program.filter[place] for place in range(program.length)]
    architecture = seccomp.MACHINES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    place, accumulator = 0, 0
    while True:
        step = steps[place]
        place += 1
        match step.code:
            case seccomp.LOAD:
                (accumulator,) = struct.unpack_from("<I", data, step.k)
            case seccomp.MASK:
                accumulator &= step.k
            case seccomp.EQUAL:
                place += step.yes if accumulator == step.k else step.no
            case seccomp.AT_LEAST:
                place += step.yes if accumulator >= step.k else step.no
            case seccomp.ANY_BIT:
                place += step.yes if accumulator & step.k else step.no
            case seccomp.RETURN if step.k & 0xFFFF_0000 == seccomp.ERROR:
                return errno.errorcode[step.k & 0xFFFF]
            case seccomp.RETURN:
                return {seccomp.ALLOW: ALLOWED, seccomp.KILL: KILLED}[step.k]


def number(machine: str, name: str) -> int:
    (found,) = [row for table in TABLES for key, row in table.items() if key == name]
    value = found[list(seccomp.MACHINES).index(machine)]
    assert value is not None
    return value


@pytest.mark.parametrize("machine", seccomp.MACHINES)
class TestDecisions:
    def test_everything_on_the_list_is_refused(self, machine: str):
        column = list(seccomp.MACHINES).index(machine)
        numbers = [row[column] for row in syscalls.REFUSED.values() if row[column] is not None]
        assert len(numbers) >= 70 and {decided(machine, number) for number in numbers if number is not None} == {
            "EPERM"
        }

    def test_calls_that_python_lives_on_are_allowed(self, machine: str):
        read_write_futex = {"x86_64": (0, 1, 202), "aarch64": (63, 64, 98)}[machine]
        assert {decided(machine, number) for number in read_write_futex} == {ALLOWED}

    def test_unknown_calls_do_not_exist(self, machine: str):
        # 0x4000_0000 + 101: ptrace by x86-64's 32-bit interface.
        for unknown in (syscalls.UNKNOWN, 467, 1_000, 0x4000_0000 + 101, 0xFFFF_FFFF):
            assert decided(machine, unknown) == "ENOSYS"
        assert decided(machine, number(machine, "clone3")) == "ENOSYS"

    def test_calls_of_another_processor_kill(self, machine: str):
        assert decided(machine, 0, architecture=0x4000_0003) == KILLED

    def test_threads_and_forks_but_no_namespaces(self, machine: str):
        clone = number(machine, "clone")
        thread, fork = 0x003D_0F00, 0x0120_0011
        assert decided(machine, clone, thread) == decided(machine, clone, fork) == ALLOWED
        for flag in (0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
            assert decided(machine, clone, fork | flag) == "EPERM"

    def test_sockets_of_three_families(self, machine: str):
        create, pair = number(machine, "socket"), number(machine, "socketpair")
        for family in (1, 2, 10):
            assert decided(machine, create, family, 1, 0) == decided(machine, pair, family, 1, 0) == ALLOWED
        assert decided(machine, create, 2, 2, 17) == ALLOWED
        # Netlink, packet, the kernel's ciphers, vsock; and the upper half of the argument, which the kernel drops.
        for family in (16, 17, 38, 40, 1 << 32 | 16):
            assert decided(machine, create, family, 3, 0) == decided(machine, pair, family, 3, 0) == "EAFNOSUPPORT"
        # Raw ones, and DCCP; the flags beside the kind are the kernel's to read.
        for kind in (3, 4, 6, 10, 0x80806):
            assert decided(machine, create, 2, kind, 0) == "ESOCKTNOSUPPORT"
        assert decided(machine, create, 1, 0x80805, 0) == ALLOWED
        # SCTP, MPTCP.
        assert decided(machine, create, 2, 1, 132) == decided(machine, create, 10, 1, 262) == "EPROTONOSUPPORT"

    def test_arguments_that_are_refused(self, machine: str):
        ioctl = number(machine, "ioctl")
        assert decided(machine, ioctl, 0, 0x5412) == decided(machine, ioctl, 0, 1 << 32 | 0x5412) == "EPERM"
        assert decided(machine, ioctl, 0, 0x5413) == ALLOWED
        fcntl = number(machine, "fcntl")
        assert decided(machine, fcntl, 0, 1024, 0) == decided(machine, fcntl, 0, 1026, 0) == "EPERM"
        assert decided(machine, fcntl, 0, 1030) == decided(machine, fcntl, 0, 6) == ALLOWED
        mapping = number(machine, "mmap")
        assert decided(machine, mapping, 0, 4096, 3, 0x22) == ALLOWED
        assert decided(machine, mapping, 0, 4096, 3, 0x40022) == "EPERM"
        personality = number(machine, "personality")
        assert decided(machine, personality, 0x0040000) == "EPERM"
        assert decided(machine, personality, 0xFFFF_FFFF) == ALLOWED
        assert decided(machine, number(machine, "prlimit64"), 0, 4) == "EPERM"
        assert decided(machine, number(machine, "setrlimit"), 4) == "EPERM"
        assert decided(machine, number(machine, "prlimit64"), 0, 7) == ALLOWED


def test_an_unknown_processor_is_refused():
    with pytest.raises(OSError, match=r"x86_64 and aarch64; found riscv64"):
        seccomp.program("riscv64")


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_the_kernels(machine: str):
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not here (linux-libc-dev)")
    text = HEADERS[machine].read_text()
    numbers = {name: int(value) for name, value in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    column = list(seccomp.MACHINES).index(machine)
    for table in TABLES:
        for name, row in table.items():
            assert row[column] is None or row[column] == numbers[name], name


PROBE = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def outcome(number, *arguments):
    # Pointers that lead nowhere: a call that is let through fails in another way.
    ctypes.set_errno(0)
    libc.syscall(number, *arguments)
    return errno.errorcode.get(ctypes.get_errno(), '')
"""


@pytest.mark.requires_bwrap
class TestInside:
    def test_calls_are_refused(self, session, run):
        run(session, PROBE)
        column = "0 if os.uname().machine == 'x86_64' else 1"
        table = dict(syscalls.REFUSED)
        code = f"{{outcome(row[{column}], -1, -1, -1, -1) for row in {table!r}.values() if row[{column}] is not None}}"
        assert run(session, code).text == "{'EPERM'}"
        # A child of a child as well, and programs that are not Python.
        child = (
            "import subprocess; subprocess.run('unshare -r true', shell=True, capture_output=True, text=True).stderr"
        )
        assert "Operation not permitted" in run(session, child).text

    def test_kernel_programs_of_other_families(self, session, run):
        code = """
import socket
found = set()
for family in range(46):
    for kind in (1, 2, 3, 5):
        try:
            socket.socket(family, kind).close()
            found.add(family)
        except OSError:
            pass
sorted(found)
"""
        assert run(session, code).text in ("[1, 2, 10]", "[1, 2]")

    def test_core_dumps_can_not_be_had(self, session, run):
        # At a limit of 1 the kernel starts no program of the host for the dump; at 0 it would.
        lower = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
        assert "not allowed" in run(session, lower).text
        limits = "import subprocess; subprocess.run('grep core /proc/self/limits', shell=True);"
        assert run(session, limits).text.split() == ["Max", "core", "file", "size", "1", "1", "bytes"]

    def test_what_people_use_still_works(self, session, run):
        code = """
import asyncio, concurrent.futures, multiprocessing, subprocess, threading, sqlite3, tempfile, mmap
context = multiprocessing.get_context('fork')
with context.Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(list(pool.map(abs, [-3])))
async def child():
    process = await asyncio.create_subprocess_exec('echo', 'four', stdout=-1)
    return (await process.communicate())[0]
print(asyncio.run(child()))
queue = context.Queue()
context.Process(target=queue.put, args=(5,)).start()
print(queue.get())
shared = mmap.mmap(-1, 4096)
print(np.linalg.svd(np.ones((64, 64)))[1][0].round(), len(np.sort(np.random.rand(100_000))))
print(subprocess.run(['sh', '-c', 'echo six | cat'], capture_output=True, text=True).stdout)
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=4096); block.buf[0] = 7; print(block.buf[0]); block.unlink()
print(sqlite3.connect(':memory:').execute('select 8').fetchone(), tempfile.mkstemp()[0] > 0)
"""
        observation = run(session, code)
        assert observation.text == "[1, 2]\n[3]\nb'four\\n'\n5\n64.0 100000\nsix\n\n7\n(8,) True", observation.text

    def test_processes_started_anew_work(self, session, run):
        code = """
import subprocess, sys
program = '''
import multiprocessing, os
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        print(pool.map(abs, [-9]))
'''
open('spawning.py', 'w').write(program)
subprocess.run([sys.executable, 'spawning.py'])
import numpy; numpy.__name__;
"""
        assert run(session, code).text == "[9]"
