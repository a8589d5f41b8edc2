"""Manifests of launch/gke as the cluster would see them, and what is wrong with one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
GKE = ROOT / "launch" / "gke"
PROGRAMS = Path(sys.executable).parent
"""Where packages of the test extra put shellcheck and hadolint."""
RENDER = GKE / "render.sh"
SETTINGS = {"IMAGE": "us-docker.pkg.dev/my-project/hdpo/hdpo:abc1234", "BUCKET": "my-bucket"}
KUBERNETES = "1.34"
"""The first release with nodes of TPU7x."""
SCHEMAS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in (Path(__file__).parent / "schemas").glob("*.json")
}
"""Custom resources by kind, in lower case."""
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
SECRET_FLAG = re.compile(r"--[\w.-]*(key|token|secret|password)[\w.-]*(=|$)", re.IGNORECASE)
SECRET_TEXT = re.compile(r"\b(hf_\w{20,}|sk-[\w-]{20,}|AIza[\w-]{30,}|ghp_\w{30,}|ya29\.[\w-]+)|PRIVATE KEY-----")

Manifest = dict[str, Any]


def render(*files: Path, settings: Mapping[str, str] = SETTINGS) -> subprocess.CompletedProcess[str]:
    """What launch/gke/render.sh says, told nothing but `settings`."""
    path = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [RENDER, *files], env=path | dict(settings), capture_output=True, text=True, timeout=60, check=False
    )


def load_all() -> list[Manifest]:
    """Every manifest of every file, rendered."""
    outcome = render(*sorted(GKE.glob("*.yaml")))
    assert outcome.returncode == 0, outcome.stderr
    return [manifest for manifest in yaml.safe_load_all(outcome.stdout) if manifest]


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest, in words: fields, types, and secrets that stand in it."""
    return [*schema_problems(manifest), *secret_problems(manifest)]


def schema_problems(manifest: Manifest) -> list[str]:
    schema = SCHEMAS.get(str(manifest.get("kind")).lower())
    if schema is None:
        return _core_problems(manifest)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    found = [f"{error.json_path}: {error.message}" for error in errors]
    if found or manifest["kind"] != "JobSet":
        return found
    for entry in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": entry["name"]}, **entry["template"]}
        found += _core_problems(job)
    return found


def _core_problems(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def secret_problems(manifest: Manifest) -> list[str]:
    found = []
    if manifest.get("kind") == "Secret":
        found.append("a Secret does not belong into a file; expected a reference to one that is in the cluster")
    for container in containers(manifest):
        for variable in container.get("env", []):
            found += _variable_problems(variable)
        for argument in [*container.get("command", []), *container.get("args", [])]:
            if SECRET_FLAG.match(argument):
                found.append(f"{argument.partition('=')[0]} on a command line; expected a variable from a secretKeyRef")
    if SECRET_TEXT.search(json.dumps(manifest)):
        found.append("looks as if it held a key")
    return found


def _variable_problems(variable: Mapping[str, Any]) -> list[str]:
    name, reference = variable["name"], variable.get("valueFrom", {}).get("secretKeyRef")
    if SECRET_NAME.search(name) and reference is None:
        return [f"{name} is not from a secretKeyRef"]
    if reference is not None and not (reference.get("name") and reference.get("key")):
        return [f"{name}: a secretKeyRef needs a name and a key"]
    return []


def pod(manifest: Manifest) -> dict[str, Any]:
    """The spec of the pods that a workload makes; empty for what makes none."""
    spec = manifest.get("spec", {})
    if manifest.get("kind") == "JobSet":
        (job,) = spec["replicatedJobs"]
        spec = job["template"]["spec"]
    return spec.get("template", {}).get("spec", {})


def containers(manifest: Manifest) -> Iterator[dict[str, Any]]:
    spec = pod(manifest)
    yield from spec.get("initContainers", [])
    yield from spec.get("containers", [])
