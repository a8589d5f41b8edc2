"""launch/cpu_mesh.sh: N processes, one job; one that fails ends it, a signal ends all."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.processes import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "cpu_mesh.sh"


def start(directory: Path, *arguments: str, patience: int = 60) -> subprocess.Popen[str]:
    """The script with the sources of this checkout, its logs in `directory`, nothing of another job around."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith((*SCHEDULERS, "XLA_FLAGS"))}
    own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(directory), "CPU_MESH_PATIENCE": str(patience)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A group of its own: whatever a failing test leaves behind can be ended.
    return subprocess.Popen([SCRIPT, *arguments], env=clean | own, process_group=0, **pipes)


def end(job: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def run(directory: Path, *arguments: str, patience: int = 60) -> tuple[int, str]:
    """Exit status and errors."""
    job = start(directory, *arguments, patience=patience)
    try:
        _, errors = job.communicate(timeout=300)
    finally:
        end(job)
    return job.returncode, errors


def write_config(directory: Path, body: str) -> str:
    """A config file that does `body` where it should say what to run."""
    path = directory / "config.py"
    path.write_text("import os, time\n\ndef get_config():\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    return str(path)


def test_one_process_has_as_many_devices_as_asked_for(tmp_path: Path):
    config = write_config(tmp_path, "import jax\nraise ValueError(f'{jax.device_count()} devices')")
    status, errors = run(tmp_path, "1x5", "train", config)
    assert status == 2
    assert errors.strip().endswith("ValueError: 5 devices")


def test_processes_join_in_one_job(tmp_path: Path):
    body = """\
import jax
from sharding.multihost import agree, start
start()
seen = f"{int(agree(jax.process_index()).sum())} of {jax.process_count()} with {jax.device_count()} devices"
raise ValueError(seen)"""
    status, errors = run(tmp_path, "2x3", "train", write_config(tmp_path, body))
    assert status == 2
    # 0 + 1, from both processes. Two jobs of one process each would instead say "0 of 1 with 3 devices".
    said = "ValueError: 1 of 2 with 6 devices"
    assert said in errors
    (log,) = tmp_path.glob("cpu_mesh.*/process_1.log")
    assert said in log.read_text()


def test_the_first_failure_ends_all_with_its_status(tmp_path: Path):
    body = """\
if os.environ["JAX_PROCESS_ID"] == "1":
    print("the disk is full", flush=True)
    os._exit(7)
time.sleep(600)"""
    began = time.monotonic()
    status, errors = run(tmp_path, "2", "train", write_config(tmp_path, body), patience=1)
    assert status == 7
    assert "cpu_mesh: process 1 ended with status 7\nthe disk is full\n" in errors
    assert time.monotonic() - began < 60


def test_ctrl_c_asks_all_to_stop_and_again_kills_them(tmp_path: Path):
    """The first process does as `hdpo train` does: it takes SIGTERM as a request, and ends with 143."""
    body = f"""\
import signal
me = os.environ["JAX_PROCESS_ID"]
signal.signal(signal.SIGTERM, lambda *_: open(r"{tmp_path}/asked_" + me, "w").close())
open(r"{tmp_path}/ready_" + me, "w").close()
while me != "0" or not os.path.exists(r"{tmp_path}/asked_0"):
    time.sleep(0.05)
os._exit(143)"""
    job = start(tmp_path, "2", "train", write_config(tmp_path, body))
    try:
        await_files(tmp_path, "ready_*", 2)
        job.send_signal(signal.SIGINT)
        await_files(tmp_path, "asked_*", 2)
        job.send_signal(signal.SIGINT)
        # Ends only once the second process, which does not listen, is gone.
        _, errors = job.communicate(timeout=60)
    finally:
        end(job)
    assert job.returncode == 143 and "process 0 ended with status 143" in errors


def await_files(directory: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(directory.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern} in {directory}"
        time.sleep(0.05)


def test_it_says_how_it_is_used(tmp_path: Path):
    for arguments in ((), ("8",), ("eight", "train"), ("0", "train"), ("2x0", "train"), ("2x", "train")):
        status, errors = run(tmp_path, *arguments)
        assert status == 2 and errors.startswith("usage: ")
