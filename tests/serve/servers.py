"""`hdpo serve` as a process of its own, as users start it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from openai import OpenAI

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    *("--rollout.slots", "8", "--rollout.patches", "256", "--rollout.page", "16"),
    *("--rollout.chunk", "8", "--rollout.shapes", "4", "64", "0", "4", "64", "64", "4", "128", "256"),
    *("--dtype", "float32", "--mesh.fsdp", "1", "--name", "tiny"),
)


class Served(NamedTuple):
    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@contextmanager
def serving(model: Path, *flags: str, capacity: int = 320, env: dict[str, str] | None = None) -> Iterator[Served]:
    """The server, once it answers; killed at the end if it is still there."""
    size = ("--rollout.capacity", str(capacity))
    with started(("serve", "--model", str(model), "--port", "0", *SMALL, *size, *flags), env) as process:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        assert greeting.startswith("listening on "), f"{greeting}{process.communicate()[1]}"
        yield Served(process, greeting.removeprefix("listening on ").strip())


@contextmanager
def started(
    command: Sequence[str], env: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_NUM_CPU_DEVICES": "1", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-m", "hdpo_jax", *command],
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
