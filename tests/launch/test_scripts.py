"""Scripts of launch/ but cpu_mesh.sh: clean under shellcheck, and the commands that they would give."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hdpo_jax.config import RLConfig
from tests.launch.manifests import PROGRAMS, ROOT
from tests.launch.runs import devices_of_mesh, parse

LAUNCH = ROOT / "launch"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-a",
    "BUCKET": "my-bucket",
    "IMAGE": "us-docker.pkg.dev/p/hdpo/hdpo:1",
}
WHERE = ["--project=my-project", "--zone=us-east5-a"]
TPUS = ["gcloud", "compute", "tpus"]
CHIPS = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}
"""What the number in a type of a TPU VM counts, per chip: v4 and v5p count cores."""


def run(script: str, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]} | SETTINGS | changed
    return subprocess.run(
        [LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def dry(script: str, *arguments: str) -> list[list[str]]:
    """The commands of a dry run, each as a list of words."""
    outcome = run(script, "--dry-run", *arguments)
    assert outcome.returncode == 0, outcome.stderr
    words, commands = shlex.split(outcome.stdout), []
    for word in words:
        if word in ("gcloud", "xpk"):
            commands.append([])
        commands[-1].append(word)
    return commands


def option(command: list[str], name: str) -> str:
    (value,) = (word.split("=", 1)[1] for word in command if word.startswith(f"--{name}="))
    return value


def test_scripts_are_clean():
    scripts = [*LAUNCH.rglob("*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 5 and all(os.access(script, os.X_OK) for script in scripts[:-1])
    outcome = subprocess.run(
        [PROGRAMS / "shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stdout


def test_tpu_vm_asks_for_a_slice():
    (command,) = dry("tpu_vm.sh", "--spot", "create", "a", "v6e-64")
    assert command == [*TPUS, "queued-resources", "create", "a", "--node-id=a", "--accelerator-type=v6e-64",
                       "--runtime-version=v2-alpha-tpuv6e", "--spot", *WHERE]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5")],
)
def test_tpu_vm_knows_the_runtime_of_a_type(kind: str, runtime: str):
    (command,) = dry("tpu_vm.sh", "create", "a", kind)
    assert option(command, "runtime-version") == runtime and "--spot" not in command


def test_tpu_vm_runs_the_same_on_every_host():
    (command,) = dry("tpu_vm.sh", "run", "a", "train", "some_config", "--output=/bucket/runs/it's mine")
    assert command[:6] == [*TPUS, "tpu-vm", "ssh", "a"] and command[7].startswith("--command=")
    # One host alone would wait for the others for ever.
    assert option(command, "worker") == "all"
    script = option(command, "command")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    *_, started = script.replace("\\\n", "").splitlines()
    words = shlex.split(started)
    assert words[:3] == ["sudo", "docker", "run"] and "--restart=on-failure:100" in words
    image = words.index("us-docker.pkg.dev/p/hdpo/hdpo:1-tpu")
    assert words[image + 1 :] == ["train", "some_config", "--output=/bucket/runs/it's mine"]
    assert "gcsfuse" in script and " my-bucket /mnt/bucket" in script and "--volume=/mnt/bucket:/bucket" in words


def test_tpu_vm_resumes_after_a_preemption():
    delete, create, wait, start = dry("tpu_vm.sh", "resume", "a", "v5p-8", "train", "x")
    assert delete == [*TPUS, "queued-resources", "delete", "a", "--force", "--quiet", *WHERE]
    assert create[3:6] == ["queued-resources", "create", "a"] and option(create, "accelerator-type") == "v5p-8"
    assert wait[3:5] == ["queued-resources", "list"] and option(wait, "filter") == "name~/a$"
    assert start == dry("tpu_vm.sh", "run", "a", "train", "x")[0]


def test_tpu_vm_stops_follows_and_deletes():
    ((*_, stop, _, _),) = dry("tpu_vm.sh", "stop", "a")
    assert stop == "--command=sudo docker stop --time=3600 hdpo"
    ((*_, logs, _, _),) = dry("tpu_vm.sh", "logs", "a")
    assert logs == "--command=sudo docker logs --follow --tail=100 hdpo"
    (delete,) = dry("tpu_vm.sh", "delete", "a")
    assert delete[3:5] == ["queued-resources", "delete"]


CLOUD = """#!/usr/bin/env bash
# A cloud that preempts once: each question about the state of things takes the next line of `script`.
echo "$*" | head -n 1 >>"$CLOUD/asked"
case "$*" in
    *"queued-resources list"* | *"docker inspect"*)
        read -r answer <"$CLOUD/script"
        sed -i 1d "$CLOUD/script"
        if [[ $answer == unreachable ]]; then exit 255; fi
        if [[ $answer != NONE ]]; then echo "$answer"; fi
        ;;
esac
"""


def test_tpu_vm_keeps_a_run_until_it_is_done(tmp_path: Path):
    """Against a stand-in for gcloud: the cloud itself is not to be had in a test."""
    (tmp_path / "gcloud").write_text(CLOUD)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    seen = ["NONE", "PROVISIONING", "ACTIVE", "none", "ACTIVE", "unreachable", "unreachable", "ACTIVE", "running 0"]
    seen += ["SUSPENDED", "PROVISIONING", "ACTIVE", "none", "ACTIVE", "exited 0"]
    (tmp_path / "script").write_text("\n".join(seen) + "\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    outcome = run("tpu_vm.sh", "keep", "a", "v5p-8", "train", "x", PATH=path, CLOUD=str(tmp_path))
    assert outcome.returncode == 0, outcome.stderr
    asked = (tmp_path / "asked").read_text()
    did = re.findall(r"resources (create|delete) a|--worker=(all)", asked)
    assert ["".join(one) for one in did] == ["create", "all", "delete", "create", "all"]
    assert (tmp_path / "script").read_text() == ""


def test_tpu_vm_says_when_a_run_has_failed(tmp_path: Path):
    (tmp_path / "gcloud").write_text(CLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "script").write_text("ACTIVE\nexited 2\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    outcome = run("tpu_vm.sh", "keep", "a", "v5p-8", "train", "x", PATH=path, CLOUD=str(tmp_path))
    assert outcome.returncode == 1 and "hdpo ended on a with status 2" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "a"], "expected [--dry-run]"),
        (["create", "a", "tpu7x-128"], "tpu7x-128 is no type of a TPU VM"),
        (["run", "a"], "expected [--dry-run]"),
        (["--quick", "wait", "a"], "expected [--dry-run]"),
        (["nonsense", "a"], "expected [--dry-run]"),
    ],
)
def test_tpu_vm_refuses(arguments: list[str], complaint: str):
    outcome = run("tpu_vm.sh", *arguments)
    assert outcome.returncode == 2 and complaint in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_settings_that_are_missing_are_named(script: str):
    outcome = run(script, "--dry-run", "keep", "a", "v5p-8", "train", "x", ZONE="")
    assert outcome.returncode == 2 and "ZONE is not set" in outcome.stderr


def stated(script: str) -> list[list[str]]:
    """The calls of a script that README.md states, as lists of words."""
    text = re.sub(r"\\\n\s*", "", README)
    return [shlex.split(line)[1:] for line in re.findall(rf"^    (launch/{script} .*)$", text, re.MULTILINE)]


def chips_of(kind: str) -> int:
    generation, number = kind.split("-")
    return int(number) // CHIPS[generation]


def check_run(kind: str, arguments: list[str]) -> None:
    config = parse(arguments)
    assert isinstance(config, RLConfig)
    assert devices_of_mesh(config, chips_of(kind)) == chips_of(kind)
    for path in (config.output, config.model.path, config.data.path):
        assert path.startswith("/bucket/"), "what is not in the bucket does not outlive a host"


def test_tpu_vm_run_of_the_readme_fits_its_config():
    (arguments,) = (call for call in stated("tpu_vm.sh") if "keep" in call)
    keep = arguments[arguments.index("keep") :]
    assert dry("tpu_vm.sh", *arguments)
    check_run(keep[2], keep[3:])


def test_xpk_run_of_the_readme_fits_its_config():
    (arguments,) = stated("xpk.sh")
    (command,) = dry("xpk.sh", *arguments)
    assert command[:3] == ["xpk", "workload", "create"]
    words = shlex.split(option(command, "command"))
    # The shell that XPK starts must become the run: signals reach the shell only.
    assert words[:2] == ["exec", "hdpo"]
    check_run(option(command, "tpu-type"), words[2:])
    assert option(command, "docker-image").endswith("-tpu-root") and int(option(command, "max-restarts")) >= 100
    # XPK's own limit.
    assert len(option(command, "workload")) <= 40


def test_cpu_mesh_of_the_readme_fits_its_config():
    for job, *arguments in stated("cpu_mesh.sh"):
        processes, _, devices = job.partition("x")
        config = parse(arguments)
        count = int(processes) * int(devices or 1)
        assert isinstance(config, RLConfig) and devices_of_mesh(config, count) == count
    assert stated("cpu_mesh.sh")


def test_manifests_of_the_readme_are_there():
    calls = stated("gke/render.sh")
    assert calls and all((ROOT / word).is_file() for words in calls for word in words[: words.index("|")])


def test_hdpo_commands_of_the_readme_parse():
    lines = re.findall(r"^    (hdpo (?:export-hf|report|eval|generate) .*)$", README, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        parse(shlex.split(line)[1:])
