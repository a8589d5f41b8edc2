"""The command line of the sandbox: what bubblewrap shows of the host, read-only, and nothing else."""

import importlib.util
import os
import shutil
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdpo_jax.config import ConfigError
from hdpo_jax.tools.kernel.users import spare_users

KERNEL = Path(__file__).parent / "kernel"
KERNEL_INSIDE = "/kernel/kernel"
NEEDED = ("numpy", "PIL", "IPython", "matplotlib")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
PARTS = ("bin", "lib", "lib64", "share")
"""Of a Python installation; settings that lie beside them (pip.conf) may hold passwords."""
INSTEAD = (
    "it needs bubblewrap (apt-get install bubblewrap) and user namespaces; instead take a tool server elsewhere "
    "(--tools.servers http://HOST:PORT of `hdpo serve-tools`) or --tools.sandbox none: inside gVisor (runsc), or for "
    "code that you trust"
)


def with_a_way_out(problem: str) -> str:
    """What keeps the sandbox from working here, and what to take instead, in one line."""
    problem = " ".join(problem.split()).rstrip(".")
    return f"{f'namespaces are forbidden here ({problem})' if 'namespace' in problem else problem}; {INSTEAD}"


def python_folders() -> tuple[Path, ...]:
    """The folders that hold this Python and its packages, without those that others contain."""
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)}
    found = {prefix / part for prefix in prefixes for part in PARTS if (prefix / part).is_dir()}
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(f"the python tool needs {name}, which is not installed (pip install {name})")
        found.add(Path(spec.origin).parent.parent)
    folders = {path.resolve() for path in found} | {path.absolute() for path in found}
    homes = {Path(os.path.expanduser("~")).resolve(), Path("/")}
    for folder in folders:
        if any(home.is_relative_to(folder) for home in homes):
            raise ConfigError(f"Python is installed in {folder}, which would show the home directory; use a virtualenv")
    inside = [Path(path) for path in SYSTEM]
    roots = [folder for folder in folders if not any(folder.is_relative_to(path) for path in inside)]
    return tuple(sorted(r for r in roots if not any(r != other and r.is_relative_to(other) for other in roots)))


def search_path() -> list[str]:
    """Where the session's Python finds packages, beside its standard library."""
    visible = [*python_folders(), *(Path(path) for path in SYSTEM)]
    candidates = [*sys.path, *site.getsitepackages()]
    packages = [Path(entry) for entry in candidates if entry and Path(entry).name in ("site-packages", "dist-packages")]
    shown = [str(path) for path in packages if any(path.is_relative_to(root) for root in visible)]
    return list(dict.fromkeys(shown))


def environment(kernel: str) -> dict[str, str]:
    """All that a session knows of the host's environment: nothing but this."""
    path = [str(Path(sys.prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
    return {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(Path(kernel).parent), *search_path()]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "HOME": "/tmp",
        "USER": "user",
        "LOGNAME": "user",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": "/tmp",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def python_command() -> list[str]:
    """The interpreter itself, without the links of a virtual environment, which may lead out of the sandbox."""
    return [os.path.realpath(sys.executable), "-s", "-S", "-P", "-m", "kernel.zygote"]


def sandboxed(command: Sequence[str], variables: Mapping[str, str], *, report: int) -> list[str]:
    """`command` inside bubblewrap: no network, no processes and files of the host, no rights outside.

    `report` is a descriptor to which bubblewrap writes JSON that holds the process number of the command.
    """
    program = shutil.which("bwrap")
    if program is None:
        problem = "bubblewrap (bwrap) is not installed, so model-written code can not be isolated"
        raise ConfigError(with_a_way_out(problem))
    arguments = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--as-pid-1", "--new-session", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL"]
    # For the namespaces of sessions, and to see what their processes use.
    arguments += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SYS_PTRACE"]
    if spare_users() is not None:
        # Root needs no user namespace here: sessions become others, whom the kernel can hold to a process limit.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            arguments += ["--cap-add", capability]
    else:
        arguments += ["--unshare-user"]
    for name, value in variables.items():
        paths = name in ("PATH", "PYTHONPATH")
        inside = os.pathsep.join(map(_inside, value.split(os.pathsep))) if paths else value
        arguments += ["--setenv", name, inside]
    for path in SYSTEM:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    folders = {folder: Path(_inside(str(folder))) for folder in python_folders()}
    # Made beforehand: those that bubblewrap makes by itself are closed to others, and sessions are others.
    for parent in dict.fromkeys(parent for folder in folders.values() for parent in reversed(folder.parents[:-1])):
        arguments += ["--dir", str(parent)]
    for folder, place in folders.items():
        arguments += ["--ro-bind", str(folder), str(place)]
    arguments += ["--dir", os.path.dirname(KERNEL_INSIDE), "--dir", "/etc"]
    for path in SETTINGS:
        arguments += ["--ro-bind-try", path, path]
    arguments += ["--ro-bind", str(KERNEL), KERNEL_INSIDE]
    arguments += ["--tmpfs", "/dev"]
    for device in DEVICES:
        arguments += ["--dev-bind", device, device]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/tmp", "/dev/shm", "--remount-ro", "/dev"]
    arguments += ["--proc", "/proc", "--tmpfs", "/tmp", "--remount-ro", "/", "--info-fd", str(report)]
    return [*arguments, "--chdir", "/tmp", "--", _inside(command[0]), *command[1:]]


def _inside(path: str) -> str:
    """Where a folder of the host stands in the sandbox: in its place, but not in /tmp, which each session has anew."""
    return f"/host{path}" if Path(path).is_relative_to("/tmp") else path
