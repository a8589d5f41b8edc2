"""Jobs of several processes on this machine, over loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCHEDULERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_")


def run_job(command: Sequence[str], *, processes: int = 2, seconds: float = 300) -> list[tuple[int, str, str]]:
    """Runs `python COMMAND` in each process; exit status, output and errors of each."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith((*SCHEDULERS, "XLA_FLAGS"))}
    common = clean | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    workers = [
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
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
