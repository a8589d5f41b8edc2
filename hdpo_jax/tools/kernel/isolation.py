"""What a session gives up before it runs a line of model-written code: its own processes, files and rights.

The fork server lives inside bubblewrap and keeps CAP_SYS_ADMIN of the sandbox's user namespace (as root: of the
sandbox's mounts). Each session gets a PID namespace (killing its first process kills all it started), a mount
namespace with a bounded /tmp and a /proc that shows its own processes and nothing of the machine, IPC and UTS
namespaces, a network namespace with nothing in it, not even loopback, and at last a user namespace without any
capability, in which processes are counted, and a filter of system calls.
"""

import contextlib
import ctypes
import os
import resource
from dataclasses import dataclass

from .seccomp import Program

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0000_0080, 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 38, 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
LINUX_CAPABILITY_VERSION_3 = 0x2008_0522
COUNTED = {
    **{f"max_{kind}_namespaces": 0 for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")},
    **{f"max_{kind}": 16 for kind in ("inotify_instances", "fanotify_groups")},
    **{f"max_{kind}": 1_024 for kind in ("inotify_watches", "fanotify_marks")},
}
"""What a session may have of what the kernel counts in its user namespace."""
SIGNALS = 1_024
"""That wait to be handled."""
MEBIBYTE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a session may use; sizes in MiB."""

    memory_mb: int
    """Address space of each process, beyond what the session starts with; `watch` bounds all of them together."""
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


def next_forks_share_a_time_namespace() -> None:
    """Later children of this process have their clocks apart from the host's, where the kernel can do that."""
    _libc.unshare(CLONE_NEWTIME)


def confine(limits: Limits, user: int | None, forbidden: Program) -> None:
    """Turns the calling process, the first of its PID namespace, into a session without rights.

    `user`: as whom root goes on. `forbidden`: the filter of its system calls.
    """
    # When the machine runs out of memory, a session goes before the host's own processes.
    _write("/proc/self/oom_score_adj", 1_000)
    spaces = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUTS
    _check(_libc.unshare(spaces), "mount, IPC, network and UTS namespaces")
    options = f"size={limits.disk_mb}m,nr_inodes=16384,mode=1777".encode()
    _check(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, options), "mounting /tmp")
    _mount_proc(0, None)
    settings = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY)
    # Not to be written: the share of the CPU that all sessions have together is set there, among others.
    _mount_proc(MS_RDONLY, b"subset=pid")
    os.chdir("/tmp")
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _check(_libc.unshare(CLONE_NEWUSER), "a user namespace")
    # No further namespaces: they would hand out capabilities again.
    for name, bound in COUNTED.items():
        with contextlib.suppress(FileNotFoundError):  # the kernel has no such kind
            _write(f"user/{name}", bound, settings)
    os.close(settings)
    _drop_capabilities()
    _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(forbidden), 0, 0), "filtering system calls")
    # After the user namespace exists: its creation would make these the limits of all sessions together.
    for kind, bound in ((resource.RLIMIT_NPROC, limits.processes), (resource.RLIMIT_SIGPENDING, SIGNALS)):
        resource.setrlimit(kind, (bound, bound))


def _mount_proc(flags: int, options: bytes | None) -> None:
    flags |= MS_NOSUID | MS_NODEV | MS_NOEXEC
    _check(_libc.mount(b"proc", b"/proc", b"proc", flags, options), "mounting /proc, which wants Linux 5.8")


def _write(path: str, number: int, folder: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, b"%d" % number)
    finally:
        os.close(descriptor)


def set_limits(limits: Limits) -> None:
    """Bounds that hold for each process of the session."""
    with open("/proc/self/statm") as status:
        present = int(status.read().split()[0]) * resource.getpagesize()
    bounds = {
        resource.RLIMIT_AS: present + limits.memory_mb * MEBIBYTE,
        resource.RLIMIT_FSIZE: limits.disk_mb * MEBIBYTE,
        resource.RLIMIT_NOFILE: limits.files,
        # Not 0, at which the kernel still starts the host's program for core dumps, but at 1 it does not.
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        value = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (value, value))


def _drop_capabilities() -> None:
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up new privileges")
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "dropping capabilities")
