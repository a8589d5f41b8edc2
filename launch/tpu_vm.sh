#!/usr/bin/env bash
# TPU VMs without Kubernetes, v4 to v6e (TPU7x is served by GKE only). The same command runs on every host of a slice.
#   launch/tpu_vm.sh keep   NAME TYPE COMMAND…   all of the below: creates, runs, resumes after a preemption, and ends
#                                                when `hdpo COMMAND…` has ended; it may be stopped and called again
#   launch/tpu_vm.sh create NAME TYPE            asks for a slice, for example v5litepod-16 or v5p-128
#   launch/tpu_vm.sh wait   NAME                 until it is there
#   launch/tpu_vm.sh run    NAME COMMAND…        starts `hdpo COMMAND…` on all hosts, in the background
#   launch/tpu_vm.sh logs   NAME                 follows the first host
#   launch/tpu_vm.sh stop   NAME                 the step under way is finished and saved
#   launch/tpu_vm.sh resume NAME TYPE COMMAND…   after a preemption: delete, create, wait, run
#   launch/tpu_vm.sh delete NAME
# Before the action: --spot, and --dry-run, which prints the gcloud commands and runs none. From the environment:
# PROJECT, ZONE, BUCKET (mounted as /bucket) and IMAGE (IMAGE-tpu is what runs).
set -euo pipefail

fail() {
    echo "$0: $1" >&2
    exit "${2:-2}"
}

usage() { fail "expected [--dry-run] [--spot] create|wait|run|logs|stop|resume|keep|delete NAME …; see its first lines"; }

dry_run=''
spot=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=yes ;;
        --spot) spot=(--spot) ;;
        *) usage ;;
    esac
    shift
done
(($# >= 2)) || usage
for needed in PROJECT ZONE BUCKET IMAGE; do
    [[ -n ${!needed:-} ]] || fail "$needed is not set; expected PROJECT, ZONE, BUCKET and IMAGE in the environment"
done
action=$1 name=$2
shift 2

quoted() {
    local word
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "${word//\'/"'\\''"}"; fi
    done
}

tpus() {
    local command=(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE")
    if [[ -z $dry_run ]]; then "${command[@]}"; else printf '%s\n' "$(quoted "${command[@]}")"; fi
}

on_all_hosts() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }
on_first_host() { tpus tpu-vm ssh "$name" --worker=0 --command="$1"; }

create() {
    local runtime
    case $1 in
        v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) fail "$1 is no type of a TPU VM; expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
    esac
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$1" --runtime-version="$runtime" "${spot[@]}"
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

# What has become of the request; NONE where there is none.
state() {
    local found
    found=$(tpus queued-resources list --filter="name~/$name\$" --format='value(state.state)') || return 1
    echo "${found:-NONE}"
}

await() {
    local now
    while true; do
        now=$(state)
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | NONE) fail "$name is $now; expected ACTIVE" 1 ;;
        esac
        echo "$now"
        if [[ -n $dry_run ]]; then return; fi
        sleep 30
    done
}

# Mounts the bucket and starts the container, which starts again after a crash, on all hosts alike. No metadata of the
# bucket is cached: a host must see what another has just written.
run() {
    local used=$IMAGE-tpu apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    on_all_hosts "set -e
if ! command -v gcsfuse >/dev/null; then
    curl -fsSL $apt/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo deb [signed-by=$key] $apt gcsfuse-jammy main | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
fi
sudo mkdir -p /mnt/bucket
mountpoint -q /mnt/bucket || sudo gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $BUCKET /mnt/bucket
sudo gcloud auth configure-docker ${used%%/*} --quiet
sudo docker pull --quiet $used
sudo docker rm --force hdpo 2>/dev/null || true
sudo docker run --detach --name=hdpo --restart=on-failure:100 --privileged --network=host --user=root \\
    --volume=/mnt/bucket:/bucket --env=JAX_COMPILATION_CACHE_DIR=/bucket/jax-cache \\
    $used $(quoted "$@")"
}

resume() {
    local type=$1
    shift
    delete
    create "$type"
    await
    run "$@"
}

# "running", "exited 0" and the like, on the first host; "none" before `run`.
container() {
    on_first_host "sudo docker inspect --format='{{.State.Status}} {{.State.ExitCode}}' hdpo 2>/dev/null || echo none"
}

keep() {
    local type=$1 now
    shift
    if [[ -n $dry_run ]]; then
        state
        create "$type"
        container
        run "$@"
        return
    fi
    while true; do
        # A laptop loses its network now and then: what can not be asked is asked again.
        now=$(state) || now=unknown
        if [[ $now == ACTIVE ]]; then now=$(container) || now=unreachable; fi
        echo "$(date +%T) $name: $now"
        case $now in
            NONE) create "$type" ;;
            FAILED | SUSPENDED)
                delete
                create "$type"
                ;;
            none*) run "$@" || true ;;
            'exited 0'*) return ;;
            exited*) fail "hdpo ended on $name with status ${now#exited }; see: $0 logs $name" 1 ;;
        esac
        sleep 60
    done
}

case $action:$# in
    create:1) create "$1" ;;
    wait:0) await ;;
    run:[1-9]*) run "$@" ;;
    logs:0) on_first_host 'sudo docker logs --follow --tail=100 hdpo' ;;
    stop:0) on_all_hosts 'sudo docker stop --time=3600 hdpo' ;;
    resume:[2-9]* | resume:1[0-9]*) resume "$@" ;;
    keep:[2-9]* | keep:1[0-9]*) keep "$@" ;;
    delete:0) delete ;;
    *) usage ;;
# In one line: bash reads on where it was, and after days of `keep` the file may have changed.
esac; exit
