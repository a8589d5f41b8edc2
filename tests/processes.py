"""Jobs of several processes on this machine, over loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCHEDULERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_")

CACHE = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")


def start_job(command: Sequence[str], *, processes: int = 2, devices: int = 1) -> list[subprocess.Popen[str]]:
    """Starts `python COMMAND` in each process, with so many fake devices."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*SCHEDULERS, "XLA_FLAGS")) or name.startswith(CACHE)
    }
    common = clean | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    common |= {"JAX_NUM_CPU_DEVICES": str(devices)}
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=common | job | {"JAX_PROCESS_ID": str(index)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def run_job(
    command: Sequence[str], *, processes: int = 2, devices: int = 1, seconds: float = 300
) -> list[tuple[int, str, str]]:
    """Runs `python COMMAND` in each process to its end; exit status, output and errors of each."""
    return ended(start_job(command, processes=processes, devices=devices), seconds)


def ended(workers: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process of a job, once all have ended."""
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        end(workers)
    return [(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]


def end(workers: Sequence[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
