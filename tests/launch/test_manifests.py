"""launch/gke: manifests that a cluster takes, that fit each other, the configs and the code; broken ones are found."""

import copy
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from hdpo_jax.commands import ServeTools
from hdpo_jax.config import RLConfig
from hdpo_jax.tools.wire import TOKEN
from tests.launch.manifests import GKE, ROOT, SETTINGS, Manifest, containers, load_all, pod, problems, render, title
from tests.launch.runs import devices_of_mesh, parse

MANIFESTS = load_all()
LAUNCH_README = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
JOBSETS = [manifest for manifest in MANIFESTS if manifest["kind"] == "JobSet"]
DEVICES_A_CHIP = {"tpu-v5p-slice": 1, "tpu-v6e-slice": 1, "tpu7x": 2}
"""What JAX shows of one chip: v5p joins its two cores to one device, TPU7x does not."""
ACCELERATOR, TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"


def only(kind: str, name: str) -> Manifest:
    (found,) = (one for one in MANIFESTS if one["kind"] == kind and one["metadata"]["name"] == name)
    return copy.deepcopy(found)


def test_there_is_one_for_every_generation():
    assert {pod(jobset)["nodeSelector"][ACCELERATOR] for jobset in JOBSETS} == set(DEVICES_A_CHIP)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=title)
def test_manifest_is_sound(manifest: Manifest):
    assert problems(manifest) == []


def container(manifest: Manifest) -> dict[str, Any]:
    return next(containers(manifest))


def misspell(manifest: Manifest) -> None:
    container(manifest)["imagee"] = container(manifest).pop("image")


def misspell_policy(manifest: Manifest) -> None:
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3


def hyphen_in_rule(manifest: Manifest) -> None:
    manifest["spec"]["failurePolicy"]["rules"][0]["name"] = "wrong-flags"


def text_for_number(manifest: Manifest) -> None:
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "16"


def no_quota(manifest: Manifest) -> None:
    del manifest["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["nominalQuota"]


def old_cohort(manifest: Manifest) -> None:
    manifest["spec"]["cohort"] = "all"


def literal_secret(manifest: Manifest) -> None:
    container(manifest)["env"].append({"name": "WANDB_API_KEY", "value": "0123456789"})


def literal_text(manifest: Manifest) -> None:
    container(manifest)["env"].append({"name": "EXTRA", "value": "hf_abcdefghijklmnopqrstuvwxyz"})


def literal_flag(manifest: Manifest) -> None:
    container(manifest)["args"].append("--api-key=0123456789")


def secret_without_name(manifest: Manifest) -> None:
    del container(manifest)["env"][0]["valueFrom"]["secretKeyRef"]["name"]


def secret_without_key(manifest: Manifest) -> None:
    del container(manifest)["env"][0]["valueFrom"]["secretKeyRef"]["key"]


@pytest.mark.parametrize(
    ("kind", "name", "harm", "complaint"),
    [
        ("Deployment", "judge", misspell, "'imagee' was unexpected"),
        ("JobSet", "metis-8b-v5p", misspell, "'imagee' was unexpected"),
        ("JobSet", "metis-8b-v5p", misspell_policy, "'maxRestart' was unexpected"),
        ("JobSet", "metis-8b-v5p", hyphen_in_rule, "'wrong-flags' does not match"),
        ("JobSet", "metis-8b-v5p", text_for_number, "'16' is not of type 'integer'"),
        ("ClusterQueue", "hdpo", no_quota, "'nominalQuota' is a required property"),
        ("ClusterQueue", "hdpo", old_cohort, "'cohort' was unexpected"),
        ("Deployment", "judge", literal_secret, "WANDB_API_KEY is not from a secretKeyRef"),
        ("Deployment", "judge", literal_text, "looks as if it held a key"),
        ("Deployment", "judge", literal_flag, "--api-key on a command line"),
        ("Deployment", "judge", secret_without_name, "VLLM_API_KEY: a secretKeyRef needs a name and a key"),
        ("Deployment", "judge", secret_without_key, "'key' is a required property"),
    ],
)
def test_broken_manifest_is_found(kind: str, name: str, harm: Callable[[Manifest], None], complaint: str):
    manifest = only(kind, name)
    harm(manifest)
    assert any(complaint in problem for problem in problems(manifest))


def test_a_secret_in_a_file_is_found():
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "judge"}, "stringData": {"api-key": "x"}}
    assert any("does not belong into a file" in problem for problem in problems(secret))


def test_unknown_kinds_are_found():
    assert problems({"apiVersion": "v1", "kind": "Pods", "metadata": {"name": "x"}}) != []


@pytest.mark.parametrize("jobset", JOBSETS, ids=title)
def test_command_line_and_chips_fit_the_config(jobset: Manifest):
    (job,) = jobset["spec"]["replicatedJobs"]
    trainer = container(jobset)
    selector = pod(jobset)["nodeSelector"]
    hosts, a_host = job["template"]["spec"]["parallelism"], trainer["resources"]["limits"]["google.com/tpu"]
    chips = math.prod(map(int, selector[TOPOLOGY].split("x")))
    assert job["replicas"] == 1, "the mesh does not know of the network between slices"
    assert hosts * a_host == chips and job["template"]["spec"]["completions"] == hosts

    config = parse(trainer["args"])
    assert isinstance(config, RLConfig)
    devices = chips * DEVICES_A_CHIP[selector[ACCELERATOR]]
    assert devices_of_mesh(config, devices) == devices

    (volume,) = pod(jobset)["volumes"]
    (mount,) = trainer["volumeMounts"]
    assert mount["name"] == volume["name"] and volume["csi"]["volumeAttributes"]["bucketName"] == SETTINGS["BUCKET"]
    for path in (config.output, config.model.path, config.data.path):
        assert path.startswith(f"{mount['mountPath']}/"), "what is not in the bucket does not outlive a host"


def test_runs_do_not_share_an_output():
    outputs = [argument for jobset in JOBSETS for argument in container(jobset)["args"] if "--output" in argument]
    assert len(set(outputs)) == len(JOBSETS)


@pytest.mark.parametrize("jobset", JOBSETS, ids=title)
def test_lost_hosts_restart_the_run_and_wrong_flags_end_it(jobset: Manifest):
    (job,) = jobset["spec"]["replicatedJobs"]
    policy = jobset["spec"]["failurePolicy"]
    # Any pod's end ends the job, and any job's end restarts the set, as often as it takes for a long run on spot nodes.
    assert job["template"]["spec"]["backoffLimit"] == 0 and pod(jobset)["restartPolicy"] == "Never"
    assert policy["maxRestarts"] >= 100
    # But for status 2, which is what hdpo ends with where flags or config do not fit.
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert [(one["action"], one["onJobFailureReasons"]) for one in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    # The step under way is finished before anything is saved.
    assert pod(jobset)["terminationGracePeriodSeconds"] >= 1800
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    assert job["template"]["spec"]["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


@pytest.mark.requires_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take rights away from root")
def test_rights_of_the_trainer_are_enough_for_the_sandbox():
    """As root with no more than the manifest adds, and with a part of /proc covered, as container runtimes leave it."""
    rights = container(JOBSETS[0])["securityContext"]
    assert rights["runAsUser"] == 0 and rights["capabilities"]["drop"] == ["ALL"]
    kept = "".join(f",+{name.lower()}" for name in rights["capabilities"]["add"])
    code = """
from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import Subject
from hdpo_jax.tools.python_sandbox import PythonTool
tool = PythonTool(ToolsConfig())
print(tool.open(Subject()).call({"code": "print(6 * 7)"}).text)
tool.close()"""
    inside = f"""
mount --bind -o ro /proc/sys /proc/sys
exec setpriv --bounding-set=-all{kept} --inh-caps=-all {sys.executable} -c '{code}'"""
    outcome = subprocess.run(
        ["unshare", "--mount", "bash", "-ec", inside],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.stdout.strip() == "42", outcome.stderr[-2000:]


@pytest.mark.parametrize("jobset", JOBSETS, ids=title)
def test_queues_have_room_for_the_run(jobset: Manifest):
    metadata, spec = jobset["metadata"], pod(jobset)
    local = only("LocalQueue", metadata["labels"]["kueue.x-k8s.io/queue-name"])
    assert local["metadata"]["namespace"] == metadata["namespace"]
    cluster = only("ClusterQueue", local["spec"]["clusterQueue"])
    assert cluster["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == metadata["namespace"]
    (group,) = cluster["spec"]["resourceGroups"]
    # Kueue refuses a workload that asks for what its queue does not cover.
    assert set(container(jobset)["resources"]["limits"]) == set(group["coveredResources"])
    quotas = {
        flavor["name"]: resource["nominalQuota"] for flavor in group["flavors"] for resource in flavor["resources"]
    }
    (flavor,) = (name for name in quotas if only("ResourceFlavor", name)["spec"]["nodeLabels"] == spec["nodeSelector"])
    assert quotas[flavor] >= math.prod(map(int, spec["nodeSelector"][TOPOLOGY].split("x")))
    assert only("ServiceAccount", spec["serviceAccountName"])["metadata"]["namespace"] == metadata["namespace"]


def test_slices_differ_in_their_size_only():
    """One is read, all are known: a change to one that the others miss is found."""

    def without_slice(jobset: Manifest) -> str:
        plain = copy.deepcopy(jobset)
        plain["metadata"]["name"] = "x"
        job = plain["spec"]["replicatedJobs"][0]["template"]["spec"]
        job["parallelism"] = job["completions"] = 0
        job["template"]["spec"]["nodeSelector"] = {}
        arguments = container(plain)["args"]
        arguments[1] = "x"
        arguments[:] = [argument for argument in arguments if "--output" not in argument]
        return yaml.safe_dump(plain)

    assert len({without_slice(jobset) for jobset in JOBSETS}) == 1


@pytest.mark.parametrize("name", ["tool-server", "judge"])
def test_servers_are_reached_by_trainers_only(name: str):
    deployment, service, policy = (only(kind, name) for kind in ("Deployment", "Service", "NetworkPolicy"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    ports = {port["name"] for port in container(deployment)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    (ingress,) = policy["spec"]["ingress"]
    assert {port["port"] for port in ingress["ports"]} <= ports
    (source,) = ingress["from"]
    for jobset in JOBSETS:
        template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        assert source["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert pod(deployment)["automountServiceAccountToken"] is False
    assert {"limits", "requests"} <= set(container(deployment)["resources"])


def test_tool_server_shuts_model_written_code_in():
    deployment, policy = only("Deployment", "tool-server"), only("NetworkPolicy", "tool-server")
    spec, rights = pod(deployment), container(deployment)["securityContext"]
    assert spec["runtimeClassName"] == "gvisor" and spec["securityContext"]["runAsNonRoot"] is True
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert policy["spec"]["egress"] == [] and "Egress" in policy["spec"]["policyTypes"]
    assert only("Service", "tool-server")["spec"]["sessionAffinity"] == "ClientIP"


def test_every_command_line_is_one_of_hdpo():
    for manifest in MANIFESTS:
        if pod(manifest) and SETTINGS["IMAGE"] in container(manifest)["image"]:
            parse(container(manifest)["args"])


def test_tool_servers_and_trainers_share_a_token_and_an_address():
    deployment, service = only("Deployment", "tool-server"), only("Service", "tool-server")
    server = container(deployment)
    command = parse(server["args"])
    assert isinstance(command, ServeTools)
    assert [command.port] == [port["containerPort"] for port in server["ports"]]
    assert command.server.drain_seconds < pod(deployment)["terminationGracePeriodSeconds"]
    assert server["readinessProbe"]["httpGet"]["path"] == "/health"
    # Beyond loopback it does not start without one.
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for manifest in (deployment, *JOBSETS)
        for variable in container(manifest)["env"]
        if variable["name"] == TOKEN
    ]
    assert len(references) == 1 + len(JOBSETS)
    assert {(one["name"], one["key"]) for one in references} == {("tool-server", "token")}
    metadata = service["metadata"]
    (address,) = set(re.findall(r"--tools\.servers=(\S+?)`", LAUNCH_README))
    assert address == f"http://{metadata['name']}.{metadata['namespace']}"
    (port,) = service["spec"]["ports"]
    assert port["port"] == 80


def test_every_secret_is_made_by_a_stated_command():
    stated = re.sub(r"\\\n\s*", "", LAUNCH_README)
    made = set()
    for line in re.findall(r"kubectl create secret generic .*", stated):
        _, _, _, _, name, *flags = shlex.split(line)
        made |= {(name, flag.split("=")[1]) for flag in flags if flag.startswith("--from-literal=")}
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for manifest in MANIFESTS
        for one in containers(manifest)
        for variable in one.get("env", [])
        if "valueFrom" in variable
    ]
    assert {(reference["name"], reference["key"]) for reference in references} == made


def test_render_refuses_what_is_not_set():
    outcome = render(GKE / "v5p.yaml", settings={"IMAGE": "x"})
    assert outcome.returncode == 2 and "v5p.yaml needs BUCKET, which is not set" in outcome.stderr
    assert outcome.stdout == ""
    assert render().returncode == 2


def test_render_leaves_nothing_open():
    # "&" in a value would stand for the placeholder itself in a replacement that is not quoted.
    outcome = render(GKE / "v5p.yaml", settings={"IMAGE": "a&b", "BUCKET": "c"})
    assert "image: a&b-tpu" in outcome.stdout and "${" not in outcome.stdout
