"""The data and the checkpoint that whole runs start from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.small_signs import write_small_signs


@dataclass(frozen=True)
class Task:
    model: Path
    conversations: Path
    prompts: Path


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Iterator[Task]:
    directory = tmp_path_factory.mktemp("signs")
    files = write_small_signs(directory, conversations=40, boards=24)
    with pytest.MonkeyPatch.context() as environment:
        # Runs are started again and again: what one has compiled is there for the next.
        environment.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))
        environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        yield Task(directory / "model", files.cold_start[0], files.train)
