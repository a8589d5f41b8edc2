"""launch/Dockerfile, which no test builds: clean under hadolint, and of one mind with the tree and with who uses it."""

import re
import subprocess

from tests.launch.manifests import GKE, PROGRAMS, ROOT

LAUNCH = ROOT / "launch"
DOCKERFILE = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
BASE, *STAGES = DOCKERFILE.split("\nFROM ")[1:]


def test_it_is_clean():
    command = [PROGRAMS / "hadolint", LAUNCH / "Dockerfile"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stdout


def test_copies_what_the_distribution_needs_and_nothing_else():
    needed = {"LICENSE", "README.md", "pyproject.toml", "configs", "hdpo_jax", "models", "sharding"}
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[1] == "*" and {line[1:] for line in ignore if line.startswith("!")} == needed
    assert all((ROOT / source).exists() for source in needed)
    for stage in STAGES:
        copies = re.findall(r"^COPY (.*) (\S+)$", BASE + stage, re.MULTILINE)
        assert {source for sources, _ in copies for source in sources.split()} == needed
        # A folder is copied as a folder: COPY a b . would pour their files into one.
        assert all(sources == target for sources, target in copies if target != "./")


def test_targets_end_as_an_ordinary_user():
    assert [stage.split()[2] for stage in STAGES] == ["cpu", "tpu"]
    assert "ARG RUN_AS=hdpo\n" in BASE and "useradd" in BASE and "bubblewrap" in BASE
    for stage in STAGES:
        # An ARG before FROM, or of another stage only, would be empty here; `base` is what both are built from.
        assert stage.startswith("base AS ") and stage.rstrip().endswith('USER ${RUN_AS}\nENTRYPOINT ["hdpo"]')


def test_every_image_that_is_used_is_built_by_a_stated_command():
    users = [*GKE.glob("*.yaml"), LAUNCH / "tpu_vm.sh", LAUNCH / "xpk.sh"]
    used = {
        suffix
        for user in users
        for suffix in re.findall(r"\$(?:\{IMAGE\}|IMAGE)-([a-z-]+)", user.read_text(encoding="utf-8"))
    }
    documents = (ROOT / "README.md", LAUNCH / "README.md")
    built = {
        suffix
        for document in documents
        for target, suffix in re.findall(r"--target (\w+) .*-t \$IMAGE-([a-z-]+)", document.read_text(encoding="utf-8"))
        if suffix in (target, f"{target}-root")
    }
    assert used == built == {"cpu", "tpu", "tpu-root"}
