#!/usr/bin/env bash
# Runs a command of hdpo on N fake CPU devices: a mesh to try sharding on, without an accelerator.
#   launch/cpu_mesh.sh 8 train my_config.py --mesh.data 2 --mesh.fsdp 4
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 DEVICES COMMAND [ARGUMENT…]    (for example: $0 8 train CONFIG)" >&2
    exit 2
fi
devices=$1
shift
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

root="$(cd "$(dirname "$0")/.." && pwd)"
if [[ -x $root/.venv/bin/hdpo ]]; then
    exec "$root/.venv/bin/hdpo" "$@"
fi
exec hdpo "$@"
