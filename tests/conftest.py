"""What every test runs under: eight fake CPU devices and no network. A GPU is for processes that tests start."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Most of a test's time is the compiler's, and what tests compute is small: a quarter of the time, for programs that run
# a little slower. The processes that tests start get the compiler as users do.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Newer ones do not know it, and a flag that is not known ends the process.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jax") < "0.11" else []),
)
users_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = " ".join(filter(None, [users_flags, *QUICK_TO_COMPILE]))

import functools
import shutil
import subprocess

import jax
import pytest

# Before any array exists: the number of devices is fixed when the backend starts.
jax.config.update("jax_num_cpu_devices", 8)
# Which is here, and with it the flags are read.
jax.devices()
if users_flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = users_flags


@functools.cache
def bubblewrap_problem() -> str | None:
    """Why model-written code can not be isolated on this machine; None where it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    probe = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "true"]
    outcome = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    return None if outcome.returncode == 0 else f"bubblewrap does not work here: {outcome.stderr.strip()}"


@functools.cache
def chromium_problem() -> str | None:
    """Why pages can not be rendered on this machine; None where they can."""
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return None if found else "chromium is not installed (apt-get install chromium)"


REQUIREMENTS = {"requires_bwrap": bubblewrap_problem, "requires_chromium": chromium_problem}


LONGEST = ("tests/train", "tests/rollout", "tests/test_quickstart.py")
"""What is begun with: else a worker would be left alone with whole runs at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def late(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))

    items.sort(key=late)


def pytest_configure(config: pytest.Config) -> None:
    for name in REQUIREMENTS:
        config.addinivalue_line("markers", f"{name}: skipped where it is missing; an error under CI=true")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A missing program skips a test on a laptop and fails it in CI, where nothing may be skipped unseen."""
    for name, problem_of in REQUIREMENTS.items():
        if item.get_closest_marker(name) is None:
            continue
        problem = problem_of()
        if problem and os.environ.get("CI") == "true":
            pytest.fail(problem, pytrace=False)
        if problem:
            pytest.skip(problem)
