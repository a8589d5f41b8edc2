#!/usr/bin/env bash
# Runs a command of hdpo in N processes of this machine that are one job, as the hosts of a pod are, on fake CPU devices.
#   launch/cpu_mesh.sh 8 train my_config.py --mesh.data 2 --mesh.fsdp 4     8 processes, one device each
#   launch/cpu_mesh.sh 2x4 train my_config.py --mesh.fsdp 8                 2 processes, 4 devices each
#   launch/cpu_mesh.sh 1x8 train my_config.py --mesh.tensor 8               1 process, 8 devices
# The first process speaks here, the others into a log each. Where one fails the others are ended, and its status is
# that of the job. Ctrl-C and SIGTERM tell all to save and stop; again, all are killed.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^([1-9][0-9]*)(x([1-9][0-9]*))?$ ]]; then
    echo "usage: $0 PROCESSES[xDEVICES] COMMAND [ARGUMENT…]    (for example: $0 2x4 train CONFIG)" >&2
    exit 2
fi
processes=${BASH_REMATCH[1]}
devices=${BASH_REMATCH[3]:-1}
shift
# How long the others may take to end by themselves once one of them failed.
patience=${CPU_MESH_PATIENCE:-30}

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
hdpo="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/hdpo"
if [[ ! -x $hdpo ]]; then hdpo=hdpo; fi
if ((processes == 1)); then exec "$hdpo" "$@"; fi

is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + RANDOM % 10000))
while is_taken "$port"; do port=$((port + 1)); done
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes

logs=$(mktemp -d "${TMPDIR:-/tmp}/cpu_mesh.XXXXXX")
echo "cpu_mesh: $processes processes; all but the first write to $logs" >&2

running=()
tell_all() { if ((${#running[@]})); then kill -s "$1" "${running[@]}" 2>/dev/null || true; fi; }
# What the next Ctrl-C means.
signal=TERM
trap 'tell_all "$signal"; signal=KILL' INT TERM
trap 'tell_all KILL' EXIT

for ((index = 0; index < processes; index++)); do
    export JAX_PROCESS_ID=$index
    if ((index == 0)); then
        "$hdpo" "$@" &
    else
        "$hdpo" "$@" >"$logs/process_$index.log" 2>&1 &
    fi
    running[index]=$!
done

status=0
failed_at=
while ((${#running[@]})); do
    for index in "${!running[@]}"; do
        if kill -0 "${running[index]}" 2>/dev/null; then continue; fi
        ended=0
        wait "${running[index]}" || ended=$?
        unset "running[index]"
        if ((ended == 0 || status != 0)); then continue; fi
        status=$ended failed_at=$SECONDS
        echo "cpu_mesh: process $index ended with status $ended" >&2
        if ((index > 0)); then tail -n 5 "$logs/process_$index.log" >&2; fi
    done
    if [[ -n $failed_at ]] && ((SECONDS - failed_at >= patience)); then tell_all KILL; fi
    sleep 0.2
# In one line with what comes last: bash reads on where it was, and the file may have changed meanwhile.
done; exit "$status"
