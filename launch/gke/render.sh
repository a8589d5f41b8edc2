#!/usr/bin/env bash
# Prints manifests with ${IMAGE} and ${BUCKET} filled in from the environment.
#   IMAGE=REPOSITORY:TAG BUCKET=NAME launch/gke/render.sh launch/gke/v5p.yaml | kubectl apply -f -
set -euo pipefail

if (($# == 0)); then
    echo "usage: IMAGE=REPOSITORY:TAG BUCKET=NAME $0 FILE…" >&2
    exit 2
fi
for file; do
    text=$(<"$file")
    for name in IMAGE BUCKET; do
        if [[ $text != *"\${$name}"* ]]; then continue; fi
        if [[ -z ${!name:-} ]]; then
            echo "$0: $file needs $name, which is not set" >&2
            exit 2
        fi
        text=${text//"\${$name}"/"${!name}"}
    done
    printf -- '---\n%s\n' "$text"
done
