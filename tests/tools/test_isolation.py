"""What model-written code can not do, each shown by trying."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import hdpo_jax
from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import ToolBox, bubblewrap
from hdpo_jax.tools.python_sandbox import PythonTool

SECRET = "correct-horse-battery-staple"


def descendants(process: int) -> list[int]:
    """Live processes below one, seen from the host."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(entry)] = int(parent)
    found = [process]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]


def spaces(process: int, kinds: list[str]) -> dict[str, str]:
    return {kind: os.readlink(f"/proc/{process}/ns/{kind}") for kind in kinds}


def wait_until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def server_of(box: ToolBox) -> int:
    tool = box.tool("python")
    assert isinstance(tool, PythonTool)
    return tool.server.process_id


@pytest.mark.requires_bwrap
class TestSandbox:
    def test_every_kind_of_namespace(self, box, run):
        """None is the host's; those that a session could see another one through are its own."""
        kinds = sorted(set(os.listdir("/proc/self/ns")) & {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"})
        with box.session([]) as one, box.session([]) as two:
            assert run(one, "1").ok and run(two, "1").ok
            found = [spaces(process, kinds) for process in (os.getpid(), *descendants(server_of(box)))]
        host, *sessions = found
        assert len(sessions) == 2 and len(kinds) >= 7
        for kind in kinds:
            assert host[kind] not in (sessions[0][kind], sessions[1][kind]), kind
        shared = {kind for kind in kinds if sessions[0][kind] == sessions[1][kind]}
        assert shared <= {"cgroup", "time"}

    def test_nothing_of_the_machine_is_in_proc(self, session, run):
        assert run(session, "import os; sorted(os.listdir('/proc'))").text == "['1', 'self', 'thread-self']"

    def test_proc_can_not_be_written(self, session, run):
        """The weight of all sessions' processes is there, and who goes first when memory runs out."""
        loop = "for name in autogroup oom_score_adj comm; do echo 19 > /proc/self/$name; done"
        assert (
            run(session, f"import subprocess; subprocess.getoutput({loop!r})").text.count("Read-only file system") == 3
        )

    def test_no_priority_over_others(self, session, run):
        code = """
import os
outcome = []
for action in (lambda: os.nice(-1), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))):
    try:
        action()
    except PermissionError:
        outcome.append('refused')
print(outcome)
import subprocess; print(subprocess.getoutput('grep priority /proc/self/limits').split())
"""
        refused, limits = run(session, code).text.splitlines()
        assert refused == "['refused', 'refused']"
        assert limits == str(["Max", "nice", "priority", "0", "0", "Max", "realtime", "priority", "0", "0"])

    def test_no_network(self, session, run):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
            assert "unreachable" in run(session, code).text
        assert "unreachable" in run(session, "socket.create_connection(('1.1.1.1', 80), 2)").text

    def test_host_files_are_invisible(self, session, run, tmp_path):
        repository = Path(next(iter(hdpo_jax.__path__))).parent
        with (
            tempfile.NamedTemporaryFile("w", dir=Path.home()) as at_home,
            tempfile.NamedTemporaryFile("w") as temporary,
        ):
            (tmp_path / "secret").write_text(SECRET)
            paths = [str(tmp_path / "secret"), at_home.name, temporary.name, str(repository / "pyproject.toml")]
            paths += ["/etc/passwd", "/etc/hostname", "/var", "/home", "/sys", "/run", "/proc/1/root/etc/passwd"]
            paths += [
                f"{sys.prefix}/pyvenv.cfg",
                "/proc/cmdline",
                "/proc/cpuinfo",
                "/proc/keys",
                "/proc/sys",
                "/proc/net",
            ]
            code = f"import os\n[path for path in {paths} if os.path.exists(path)]"
            assert run(session, code).text == "[]"

    def test_no_secrets_in_the_environment(self, session, run):
        code = """
import os, glob
seen = str(dict(os.environ))
for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):
    try:
        seen += open(path, errors='replace').read()
    except PermissionError:
        pass
print(sorted(os.environ))
print('horse' in seen)
"""
        names, found = run(session, code).text.splitlines()
        assert found == "False"
        assert not any(word in names for word in ("TOKEN", "KEY", "SECRET", "PASSWORD"))

    def test_only_its_own_processes_are_visible(self, box, run):
        with box.session([]) as other, box.session([]) as session:
            run(other, "1")
            code = "import os\n[name for name in os.listdir('/proc') if name.isdigit()] == [str(os.getpid())]"
            assert run(session, code).text == "True"
            run(session, "import os, signal\nos.kill(-1, signal.SIGKILL)")
            assert run(other, "2").text == "2"

    def test_no_rights(self, session, run):
        code = """
import ctypes, os
status = dict(line.split(':\\t', 1) for line in open('/proc/self/status').read().splitlines())
print(*(int(status[name], 16) for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')), status['NoNewPrivs'])
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None), os.getuid() != 0)
"""
        assert run(session, code).text == "0 0 0 0 1\n-1 -1 True"

    def test_the_system_is_read_only(self, session, run):
        code = """
import os, sys
for folder in ('/', '/usr', '/etc', '/dev', '/kernel', sys.prefix, os.path.dirname(np.__file__), '/proc/sys/kernel'):
    try:
        open(os.path.join(folder, 'x'), 'w')
        print('wrote to', folder)
    except OSError:
        pass
"""
        assert run(session, code).text == "(no output)"

    def test_memory_is_bounded(self, session, run):
        for code in ("bytearray(1 << 29)", "np.ones(1 << 26)", "import mmap; mmap.mmap(-1, 1 << 29)"):
            observation = run(session, code)
            assert not observation.ok and any(word in observation.text for word in ("MemoryError", "allocate memory"))
        assert run(session, "len(bytearray(1 << 26))").text == str(1 << 26)

    def test_no_memory_outside_the_bounds(self, session, run):
        # A file in memory counts to no process's address space and to no disk.
        assert "PermissionError" in run(session, "import os; os.memfd_create('x')").text
        child = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import os; os.memfd_create(\"x\")'])"
        assert "PermissionError" in run(session, child).text
        assert (
            run(session, "os.getppid() >= 0, open('/proc/self/status').read().count('Seccomp:\\t2')").text
            == "(True, 1)"
        )

    def test_processes_are_bounded(self, box, session, run):
        code = """
import os, time
count = 0
try:
    while count < 1000:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except OSError as error:
    print(count, error.strerror)
"""
        # 12 allowed, one of which is the session itself.
        assert run(session, code).text == "11 Resource temporarily unavailable"
        with box.session([]) as other:
            assert run(other, "import subprocess\nsubprocess.run(['echo', 'fine'])\n;").text == "fine"
        assert len(descendants(server_of(box))) >= 12
        session.close()
        assert wait_until(lambda: not descendants(server_of(box)))

    def test_disk_is_bounded(self, session, run):
        code = """
for path in ('/tmp/a', '/tmp/b', '/dev/shm/c'):
    try:
        with open(path, 'wb') as file:
            for _ in range(100): file.write(bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
import shutil; print(shutil.disk_usage('/tmp').total >> 20)
"""
        *problems, size = run(session, code).text.splitlines()
        assert len(problems) == 3 and size == "8"
        assert run(session, "import os; os.remove('/tmp/a'); print('alive')").text == "alive"

    def test_closing_ends_everything_that_was_started(self, box, run):
        session = box.session([])
        code = "import subprocess\nfor _ in range(3): subprocess.Popen('setsid sleep 300 & sleep 300', shell=True)"
        assert run(session, code).ok
        assert wait_until(lambda: len(descendants(server_of(box))) >= 7)
        session.close()
        assert wait_until(lambda: not descendants(server_of(box)))

    def test_closing_the_tools_ends_the_sandbox(self, run):
        box = ToolBox(ToolsConfig())
        server = server_of(box)
        session = box.session([])
        run(session, "import subprocess; subprocess.Popen(['sleep', '300'])")
        everything = [server, *descendants(server)]
        box.close()
        assert wait_until(lambda: not any(os.path.exists(f"/proc/{process}") for process in everything))
        assert run(session, "1").lost

    @pytest.mark.slow
    def test_the_sandbox_ends_with_the_trainer_however_it_dies(self):
        code = (
            "import time\nfrom hdpo_jax.config import ToolsConfig\n"
            "from hdpo_jax.tools import Subject\nfrom hdpo_jax.tools.python_sandbox import PythonTool\n"
            "tool = PythonTool(ToolsConfig()); session = tool.open(Subject())\n"
            "session.call({'code': 'import subprocess; subprocess.Popen([\"sleep\", \"300\"])'})\n"
            "print(tool.server.process_id, flush=True); time.sleep(300)"
        )
        trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert trainer.stdout is not None
        server = int(trainer.stdout.readline())
        everything = [server, *descendants(server)]
        assert len(everything) >= 3
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
        trainer.stdout.close()
        assert wait_until(lambda: not any(os.path.exists(f"/proc/{process}") for process in everything))


@pytest.mark.requires_bwrap
def test_packages_may_be_installed_below_tmp(run, monkeypatch):
    """As those of a clone in /tmp are, which a session's own /tmp would hide."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        Path(folder, "site_of_tmp.py").write_text("WHERE = 'below /tmp'")
        roots, path = bubblewrap.python_folders(), bubblewrap.search_path()
        monkeypatch.setattr(bubblewrap, "python_folders", lambda: (*roots, Path(folder)))
        monkeypatch.setattr(bubblewrap, "search_path", lambda: [*path, folder])
        with ToolBox(ToolsConfig(workers=1)) as box, box.session([]) as session:
            assert run(session, "import site_of_tmp; site_of_tmp.WHERE").text == "'below /tmp'"


class TestWithoutSandbox:
    def test_it_works_and_warns(self, run, picture, capfd):
        with ToolBox(ToolsConfig(sandbox="none")) as box:
            assert "WITHOUT a sandbox" in " ".join(capfd.readouterr().err.split())
            with box.session([picture]) as session:
                assert run(session, "x = 1\nimage_1.crop((0, 0, 9, 9))").images[0].size == (9, 9)
                assert run(session, "x").text == "1"
                assert "exit code 3" in run(session, "import os; os._exit(3)").text
                code = (
                    "import subprocess\nfor _ in range(2): subprocess.Popen('setsid sleep 300 & sleep 300', shell=True)"
                )
                assert run(session, code).ok
                assert wait_until(lambda: len(descendants(server_of(box))) >= 5)
            assert wait_until(lambda: not descendants(server_of(box)))


START = """
import sys
from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import ToolBox
try:
    ToolBox(ToolsConfig())
except ConfigError as error:
    print(error)
"""
INSTEAD = ("apt-get install bubblewrap", "of `hdpo serve-tools`", "gVisor (runsc)", "--tools.sandbox none")
NO_NAMESPACES = """
import ctypes, os, sys
from hdpo_jax.tools.kernel import seccomp
NUMBERS = {"x86_64": (56, 435, 272), "aarch64": (220, 435, 97)}[os.uname().machine]
clone = [*seccomp._load(0), (seccomp.ANY_BIT, 0, 1, FLAGS), *seccomp._error(1), *seccomp._allow()]
blocks = dict(zip(NUMBERS, (clone, seccomp._error(38), seccomp._error(1))))
steps = [(seccomp.LOAD, 0, 0, seccomp.NUMBER)]
for number, block in blocks.items():
    steps += [(seccomp.EQUAL, 0, len(block), number), *block]
program = seccomp.assembled([*steps, *seccomp._allow()])
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class TestRefusals:
    """Where model-written code can not be isolated, one line says so, and what to take instead."""

    @pytest.mark.requires_bwrap
    def test_no_more_user_namespaces(self):
        script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
        message = refusal(["unshare", "--user", "--map-root-user", "bash", "-c", script, sys.executable, START])
        assert "namespaces are forbidden here" in message

    @pytest.mark.requires_bwrap
    @pytest.mark.parametrize("flags", ["0x7E02_0080", "0"])
    def test_a_filter_that_forbids_them(self, flags: str):
        """As container runtimes have by default; and one that stops sessions alone."""
        message = refusal([sys.executable, "-c", NO_NAMESPACES.replace("FLAGS", flags), "-c", START])
        assert "namespaces are forbidden here" in message

    def test_bubblewrap_is_missing(self, tmp_path):
        message = refusal([sys.executable, "-c", START], PATH=str(tmp_path))
        assert "bubblewrap (bwrap) is not installed" in message


def refusal(command: list[str], **variables: str) -> str:
    """The one line that a start of the tools in such an environment prints."""
    root = Path(next(iter(hdpo_jax.__path__))).parent
    environment = os.environ | {"PYTHONPATH": str(root)} | variables
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert printed.returncode == 0, printed.stderr
    (message,) = printed.stdout.splitlines()
    for words in INSTEAD:
        assert words in message
    return message


def test_unknown_tools_are_refused():
    with pytest.raises(ConfigError, match=r"tools.names holds 'pyton'; expected names among python"):
        ToolBox(ToolsConfig(names=("pyton",)))
