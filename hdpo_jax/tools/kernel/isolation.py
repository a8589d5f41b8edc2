"""What a session gives up before it runs a line of model-written code: its own processes, files and rights.

The fork server lives inside bubblewrap and keeps CAP_SYS_ADMIN of the sandbox's user namespace (as root: of the
sandbox's mounts). Each session gets a PID namespace (killing its first process kills all it started), a mount
namespace with a bounded /tmp and a /proc that shows only itself, an IPC namespace, a network namespace with nothing in
it, not even loopback, and at last a user namespace without any capability, in which processes are counted.
"""

import ctypes
import os
import resource
from dataclasses import dataclass

from .syscalls import FILTER

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x0002_0000, 0x0800_0000, 0x4000_0000
CLONE_NEWUSER, CLONE_NEWPID = 0x1000_0000, 0x2000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 38, 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
LINUX_CAPABILITY_VERSION_3 = 0x2008_0522
NOBODY = 65_534
MEBIBYTE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a session may use; sizes in MiB."""

    memory_mb: int
    """Address space of each process, beyond what the session starts with."""
    disk_mb: int
    processes: int
    """Processes and threads."""
    files: int = 256


def _check(result: int, action: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")


def next_fork_opens_pid_namespace() -> None:
    """The next child of this process is the first process of a PID namespace of its own."""
    _check(_libc.unshare(CLONE_NEWPID), "a PID namespace")


def forks_stay_in(namespace: int) -> None:
    """Undoes the above: children go to the PID namespace of this descriptor (/proc/self/ns/pid) again."""
    _check(_libc.setns(namespace, CLONE_NEWPID), "returning to the own PID namespace")


def adopt_orphans() -> None:
    """Processes that a session leaves behind become children of this process, not of the host's init."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "becoming a reaper")


def confine(limits: Limits) -> None:
    """Turns the calling process, the first of its PID namespace, into a session without rights."""
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET), "mount, IPC and network namespaces")
    options = f"size={limits.disk_mb}m,nr_inodes=16384,mode=1777".encode()
    _check(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, options), "mounting /tmp")
    _check(_libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mounting /proc")
    os.chdir("/tmp")
    if os.getuid() == 0:
        # The kernel never counts processes of the host's root.
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(_libc.unshare(CLONE_NEWUSER), "a user namespace")
    # No further user namespaces: they would hand out capabilities again.
    descriptor = os.open("/proc/sys/user/max_user_namespaces", os.O_WRONLY)
    os.write(descriptor, b"0")
    os.close(descriptor)
    _drop_capabilities()
    if FILTER is not None:
        _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(FILTER), 0, 0), "filtering system calls")
    # After the user namespace exists: its creation would make this the limit of all sessions together.
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))


def set_limits(limits: Limits) -> None:
    """Bounds that hold for each process of the session."""
    with open("/proc/self/statm") as status:
        present = int(status.read().split()[0]) * resource.getpagesize()
    bounds = {
        resource.RLIMIT_AS: present + limits.memory_mb * MEBIBYTE,
        resource.RLIMIT_FSIZE: limits.disk_mb * MEBIBYTE,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        value = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (value, value))


def bound_cpu(seconds: int) -> None:
    """CPU seconds that this process may still use; a busy thread left behind by a call ends the session then."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    bound = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


def _drop_capabilities() -> None:
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up new privileges")
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "dropping capabilities")
