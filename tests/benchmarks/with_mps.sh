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

probe="import torch; [torch.zeros(1, device=f'cuda:{i}') for i in range(torch.cuda.device_count())]"
if nvidia-cuda-mps-control -d && timeout 60 "${PYTHON:-python3}" -c "$probe"; then
    echo "under the Multi-Process Service" >&2
else
    echo "no Multi-Process Service here: processes take turns" >&2
    cat "$CUDA_MPS_LOG_DIRECTORY"/*.log >&2 2>/dev/null || true
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
fi
"$@"
