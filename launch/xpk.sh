#!/usr/bin/env bash
# A run of `hdpo train` through XPK (pip install xpk), which writes the JobSet itself. Restarts go on from the bucket.
#   launch/xpk.sh [--dry-run] CLUSTER TYPE CONFIG [FLAG…]
#   launch/xpk.sh my-cluster v5p-128 metis_30b_a3b_v5p_128 --model.path=/bucket/hf/Qwen3-VL-30B-A3B-Instruct
# Once a cluster, the bucket: xpk storage attach bucket --type=gcsfuse --bucket=… --mount-point=/bucket --readonly=false
#   --auto-mount=false --mount-options=metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0 …
# --dry-run prints the command. From the environment: PROJECT, ZONE and IMAGE. XPK can not say who runs in a container, and another user than root can
# not shut model-written code in there: IMAGE-tpu-root is built with --build-arg RUN_AS=root.
set -euo pipefail

dry_run=''
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
if (($# < 3)); then
    echo "usage: $0 [--dry-run] CLUSTER TYPE CONFIG [FLAG…]" >&2
    exit 2
fi
for needed in PROJECT ZONE IMAGE; do
    if [[ -z ${!needed:-} ]]; then
        echo "$0: $needed is not set; expected PROJECT, ZONE and IMAGE in the environment" >&2
        exit 2
    fi
done
cluster=$1 type=$2 config=$3
shift 3

# exec: XPK sends SIGTERM to the shell that it starts, and the run must hear it to save.
# Status 1 is what a lost peer ends with; XPK restarts those of signals by itself, and not 2: flags that do not fit.
printf -v command '%q ' exec hdpo train "$config" "--output=/bucket/runs/$config" --train.checkpoint-every=5 "$@"
create=(
    xpk workload create
    --project="$PROJECT" --zone="$ZONE" --cluster="$cluster"
    --workload="${config//_/-}" --tpu-type="$type" --num-slices=1
    --docker-image="$IMAGE-tpu-root" --storage=bucket
    --max-restarts=100 --restart-on-exit-codes=1 --termination-grace-period-seconds=3600
    --env=JAX_COMPILATION_CACHE_DIR=/bucket/jax-cache
    --command="$command"
)
if [[ -z $dry_run ]]; then exec "${create[@]}"; fi
printf '%q ' "${create[@]}"
echo
