#!/usr/bin/env bash
# Runs a command under NVIDIA's Multi-Process Service: kernels of its processes then run on the GPU at the same time,
# where otherwise they take turns. No setting of the GPU changes. Without a service that works, the command runs alone.
#
#     tests/benchmarks/with_mps.sh qvdit compare --processes 14 --out out/table
set -euo pipefail

folder=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"

stop() {
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap stop EXIT

# The service sees the GPUs that are visible to it, and numbers them from 0: so must its clients.
start() {
    nvidia-cuda-mps-control -d || return 1
    local named
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra named <<<"$CUDA_VISIBLE_DEVICES"
        CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((${#named[@]} - 1)))
    fi
}

visible=${CUDA_VISIBLE_DEVICES:-}
probe="import torch; [torch.zeros(1, device=f'cuda:{i}') for i in range(torch.cuda.device_count())]"
if start && timeout 60 "${PYTHON:-python3}" -c "$probe"; then
    echo "under the Multi-Process Service" >&2
else
    echo "no Multi-Process Service here: processes take turns" >&2
    cat "$CUDA_MPS_LOG_DIRECTORY"/*.log >&2 2>/dev/null || true
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    trap 'rm -rf "$folder"' EXIT  # another service is none of ours
    [ -z "$visible" ] || CUDA_VISIBLE_DEVICES=$visible
fi
"$@"
