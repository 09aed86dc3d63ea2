#!/usr/bin/env bash
# Builds the kernels and the plugin against TensorRT 8.6, then builds and proves the engines of bundles, on a GPU
# machine without network. TensorRT brings its own Python, without PyTorch.
#
#   tests/gpu/tensorrt86.sh --tensorrt DIR --headers DIR --out DIR [--cutlass DIR] [--architectures 90a] [--jobs 3]
#                           [--options '--optimization-level 2'] [BUNDLE …]
#
# --tensorrt: a folder with lib/libnvinfer.so.8 and an env.sh that defines trtpython; --headers: TensorRT's include
# folder. Left in --out: NAME/ with engine.json, parity.json and the log of each bundle, types.txt, tests.log.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tensorrt= headers= out= cutlass= architectures=90a jobs=3 options=
while [ $# -gt 0 ]; do
  case $1 in
    --tensorrt | --headers | --out | --cutlass | --architectures | --jobs | --options)
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) break ;;
  esac
done
[ -f "$tensorrt/env.sh" ] && [ -f "$headers/NvInferRuntime.h" ] && [ -n "$out" ] || {
  sed -n '2,10p' "$0" >&2
  exit 2
}
mkdir -p "$out"
. "$tensorrt/env.sh"
cd "$root"

cmake -S runtimes/csrc -B build/kernels -G Ninja "-DQVDIT_ARCHITECTURES=$architectures" \
  "-DQVDIT_TENSORRT_INCLUDE=$headers" "-DQVDIT_TENSORRT_LIB=$tensorrt/lib/libnvinfer.so.8" \
  ${cutlass:+"-DQVDIT_CUTLASS=$(realpath "$cutlass")"} >"$out/configure.log" 2>&1 || { cat "$out/configure.log"; exit 1; }
start=$SECONDS
cmake --build build/kernels --parallel "$(nproc)" >"$out/build.log" 2>&1 || { tail -50 "$out/build.log"; exit 1; }
echo "kernels and plugin built in $((SECONDS - start)) s"
export QVDIT_TENSORRT_PLUGIN=$root/build/kernels/libqvdit_tensorrt.so TRTPYTHONPATH=$root

prove() {
  local bundle=$1 name start=$SECONDS status=0
  name=$(basename "$bundle")
  mkdir -p "$out/$name"
  # shellcheck disable=SC2086
  trtpython -m qvdit.runtimes.tensorrt "$bundle" $options >"$out/$name/log.txt" 2>&1 || status=$?
  for file in engine.json parity.json parity.json.new; do
    [ ! -f "$bundle/tensorrt/$file" ] || cp "$bundle/tensorrt/$file" "$out/$name/"
  done
  echo "== $name: status $status, $((SECONDS - start)) s"
  tail -n 4 "$out/$name/log.txt"
}
export -f prove
export out options
[ $# -eq 0 ] || printf '%s\0' "$@" | xargs -0 -P "$jobs" -I {} bash -c 'prove "$1"' _ {}

# No conftest of the tests around it, which import PyTorch.
status=0
QVDIT_TEST_BUNDLES=$(IFS=:; echo "$*") trtpython -m pytest -q -p no:cacheprovider -o addopts= --confcutdir tests/gpu/engines \
  tests/gpu/engines >"$out/tests.log" 2>&1 || status=$?
tail -n 3 "$out/tests.log"
exit $status
