#!/usr/bin/env bash
# Makes an engine of what this folder holds, on the machine that is to run it: no Python is needed.
#
#   ./build.sh          check the files, build the runner (and the plugin where the one that came along does not fit),
#                       build the engine, prove it, time it
#   ./build.sh verify   compare every file with the sha256 in manifest.json
#
# Needs what JetPack installs: CUDA (cuda-toolkit), TensorRT with its headers (libnvinfer-dev, libnvonnxparsers-dev),
# and CMake and g++ (apt install cmake g++). Where they lie elsewhere: TENSORRT_INCLUDE names the folder of NvInfer.h,
# TENSORRT_LIB the file libnvinfer.so, CUDACXX nvcc. OPTIONS is given to the build: OPTIONS='--optimization-level 2'.
set -euo pipefail
cd "$(dirname "$0")"

stop() { # got, expected, what to do
  echo "error: got $1; expected $2; $3" >&2
  exit 2
}

verify() {
  # The manifest is what qvdit wrote: a line for each file, sorted, one blank deeper than "files".
  local sums count
  sums=$(sed -n '/^ "files": {$/,/^ }/s/^  "\(.*\)": "\([0-9a-f]\{64\}\)",\{0,1\}$/\2  \1/p' manifest.json 2>/dev/null) || true
  [ -n "$sums" ] || stop "no manifest.json, or one without files" "the one of this folder" "copy the whole folder again"
  printf '%s\n' "$sums" | sha256sum --check --quiet --strict >/dev/null 2>&1 || {
    bad=$(printf '%s\n' "$sums" | LC_ALL=C sha256sum --check --quiet 2>/dev/null | head -n 1 | cut -d: -f1) || true
    stop "${bad:-a file} that is missing or not what manifest.json says" "every file as it was exported" \
      "copy the whole folder again"
  }
  count=$(printf '%s\n' "$sums" | wc -l)
  echo "verified $count files"
}

# The first of some paths that is there.
first() {
  local path
  for path in "$@"; do
    if [ -e "$path" ]; then
      echo "$path"
      return
    fi
  done
}

find_tensorrt() {
  local machine headers
  machine=$(uname -m)-linux-gnu
  headers=$(first ${TENSORRT_INCLUDE:+"$TENSORRT_INCLUDE/NvInfer.h"} "/usr/include/$machine/NvInfer.h" \
    /usr/include/NvInfer.h /usr/local/tensorrt/include/NvInfer.h /usr/local/TensorRT*/include/NvInfer.h)
  [ -n "$headers" ] || stop "no NvInfer.h" "TensorRT's headers" \
    "apt install libnvinfer-dev libnvonnxparsers-dev, or set TENSORRT_INCLUDE"
  include=$(dirname "$headers")
  library=$(first ${TENSORRT_LIB:+"$TENSORRT_LIB"} "/usr/lib/$machine/libnvinfer.so" \
    /usr/local/tensorrt/lib/libnvinfer.so /usr/local/TensorRT*/lib/libnvinfer.so)
  [ -n "$library" ] || stop "no libnvinfer.so" "TensorRT's library" "apt install libnvinfer-dev, or set TENSORRT_LIB"
  tensorrt=$(sed -n -E 's/^#define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? ([0-9]+).*/\4/p' \
    "$include/NvInferVersion.h" | head -n 2 | paste -s -d.)
  echo "TensorRT $tensorrt in $library"
}

# Whether the model needs no plugin, or the one that came along was compiled for this TensorRT and this processor.
plugin_fits() {
  local file=tensorrt/libqvdit_tensorrt.so
  grep -q LowBitLinear tensorrt/model.onnx || return 0
  [ -f $file ] || return 1
  grep -a -q "qvdit LowBitLinear [0-9]* for TensorRT $tensorrt\." $file || return 1
  # Bytes 18 and 19 of an ELF file: its machine, 183 on aarch64 and 62 on x86-64.
  case $(od -An -t u1 -j 18 -N 1 $file | tr -d ' ')-$(uname -m) in
    183-aarch64 | 62-x86_64) return 0 ;;
    *) return 1 ;;
  esac
}

compile() {
  local targets=(qvdit-run) kernels=OFF architecture nvcc
  command -v cmake >/dev/null || stop "no cmake" "CMake, to compile the runner" "apt install cmake g++"
  local options=("-DQVDIT_TENSORRT_INCLUDE=$include" "-DQVDIT_TENSORRT_LIB=$library" -DQVDIT_RUNNER=ON)
  nvcc=$(first ${CUDACXX:+"$CUDACXX"} "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc)
  if ! plugin_fits; then
    [ -n "$nvcc" ] || stop "no nvcc, and no plugin for TensorRT $tensorrt on $(uname -m)" "CUDA's compiler" \
      "apt install cuda-toolkit, or set CUDACXX"
    architecture=$(sed -n 's/^ "architecture": "\(.*\)",\{0,1\}$/\1/p' device.json)
    if [ -z "$architecture" ] && command -v nvidia-smi >/dev/null; then
      architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || true
    fi
    options+=(${architecture:+"-DQVDIT_ARCHITECTURES=$architecture"})
    targets+=(qvdit_tensorrt)
    kernels=ON
    echo "compiling the plugin too: a minute or several"
  fi
  [ -z "$nvcc" ] || options+=("-DCMAKE_CUDA_COMPILER=$nvcc" "-DCUDAToolkit_ROOT=$(dirname "$(dirname "$nvcc")")")
  mkdir -p build
  cmake -S csrc -B build "${options[@]}" -DQVDIT_CUDA_KERNELS=$kernels >build/log.txt 2>&1 &&
    cmake --build build --target "${targets[@]}" --parallel "$(nproc)" >>build/log.txt 2>&1 ||
    stop "$(grep -m 1 -i error build/log.txt || echo 'a build that failed')" "a build that succeeds" "look at build/log.txt"
}

verify
[ "${1:-}" != verify ] || exit 0
[ $# -eq 0 ] || stop "the argument $1" "verify, or none" "see the first lines of build.sh"
find_tensorrt
compile
LD_LIBRARY_PATH=$(dirname "$(realpath "$library")")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
# shellcheck disable=SC2086
build/qvdit-run build . ${OPTIONS:-}
build/qvdit-run parity .
build/qvdit-run bench .
build/qvdit-run bench . --graph
[ ! -f sample/plan.safetensors ] || build/qvdit-run sample . --out latents.safetensors
