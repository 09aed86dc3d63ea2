#!/usr/bin/env bash
# Builds the C++ runner against TensorRT 8.6 and runs all of it, on a GPU machine without network: build, parity, bench
# (with and without a CUDA graph) and sample on copies of bundles or edge folders; then what it must refuse.
#
#   tests/gpu/runner86.sh --tensorrt DIR --headers DIR --out DIR ([--cutlass DIR] [--architectures 90a] | --kernels DIR)
#                         [--options '--optimization-level 2'] [BUNDLE …]
#
# --tensorrt: a folder with lib/libnvinfer.so.8 and lib/libnvonnxparser.so.8; --headers: TensorRT's include folder, with
# the NvOnnxParser.h of github.com/onnx/onnx-tensorrt (release/8.6-EA) in it. Kernels and plugin that tensorrt86.sh built
# are taken up; --kernels: a folder where the plugin is already. BUNDLE: a bundle, or OUT/edge of qvdit-export --device local, whose build.sh is run too. Left in --out:
# runner/NAME/ with the logs, engine.json, parity.json, bench.json and latents of each.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tensorrt= headers= out= cutlass= architectures=90a options= kernels=
while [ $# -gt 0 ]; do
  case $1 in
    --tensorrt | --headers | --out | --cutlass | --architectures | --options | --kernels)
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) break ;;
  esac
done
[ -f "$tensorrt/lib/libnvonnxparser.so.8" ] && [ -f "$headers/NvOnnxParser.h" ] && [ -n "$out" ] && [ $# -gt 0 ] || {
  sed -n '2,13p' "$0" >&2
  exit 2
}
tensorrt=$(realpath "$tensorrt") headers=$(realpath "$headers") out=$(realpath -m "$out")/runner
mkdir -p "$out"
cd "$root"

if [ -n "$kernels" ]; then
  build=build/runner library=$(realpath "$kernels")/libqvdit_tensorrt.so chosen=(-DQVDIT_CUDA_KERNELS=OFF)
else
  build=build/kernels library=$root/build/kernels/libqvdit_tensorrt.so
  chosen=("-DQVDIT_ARCHITECTURES=$architectures" ${cutlass:+"-DQVDIT_CUTLASS=$(realpath "$cutlass")"})
fi
cmake -S runtimes/csrc -B "$build" -G Ninja "-DQVDIT_TENSORRT_INCLUDE=$headers" \
  "-DQVDIT_TENSORRT_LIB=$tensorrt/lib/libnvinfer.so.8" -DQVDIT_RUNNER=ON "${chosen[@]}" \
  >"$out/configure.log" 2>&1 || { cat "$out/configure.log"; exit 1; }
start=$SECONDS
cmake --build "$build" --parallel "$(nproc)" >"$out/build.log" 2>&1 || { tail -50 "$out/build.log"; exit 1; }
echo "runner built in $((SECONDS - start)) s"
run=$root/$build/qvdit-run plugin=(--plugin "$library")
export LD_LIBRARY_PATH=$tensorrt/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

failed=0
# Says and logs one command's end; status: what it must exit with.
step() {
  local log=$1 status=$2 got=0
  shift 2
  "$@" >"$log" 2>&1 || got=$?
  tail -n 3 "$log" | tr '\r' '\n' | tail -n 3 | sed 's/^/  /'
  [ "$got" = "$status" ] || { echo "  FAILED: status $got, expected $status: $*"; failed=1; }
}

for bundle in "$@"; do
  name=$(basename "$bundle") start=$SECONDS
  [ "$name" != edge ] || name=$(basename "$(dirname "$(realpath "$bundle")")")
  folder=$(mktemp -d)/$name
  mkdir -p "$folder/tensorrt" "$out/$name"
  for part in tensorrt parity sample; do [ ! -d "$bundle/$part" ] || cp -r "$bundle/$part" "$folder/"; done
  rm -f "$folder"/tensorrt/*.plan "$folder"/tensorrt/engine.json "$folder"/tensorrt/libqvdit_tensorrt.so
  echo "== $name"
  # shellcheck disable=SC2086
  step "$out/$name/build.txt" 0 "$run" build "$folder" "${plugin[@]}" $options
  echo "  built in $((SECONDS - start)) s"
  [ -f "$folder/tensorrt/model.plan" ] || continue
  step "$out/$name/parity.txt" 0 "$run" parity "$folder" "${plugin[@]}"
  step "$out/$name/bench.txt" 0 "$run" bench "$folder" "${plugin[@]}" --out "$out/$name/bench.json"
  step "$out/$name/bench-graph.txt" 0 "$run" bench "$folder" "${plugin[@]}" --graph --out "$out/$name/bench-graph.json"
  if [ -f "$folder/sample/plan.safetensors" ]; then
    step "$out/$name/sample.txt" 0 "$run" sample "$folder" "${plugin[@]}" --out "$out/$name/latents.safetensors"
    step "$out/$name/sample-graph.txt" 0 "$run" sample "$folder" "${plugin[@]}" --graph \
      --out "$out/$name/latents-graph.safetensors"
  fi
  cp "$folder"/tensorrt/*.json "$out/$name/"

  # What must be refused, in one line and with status 2; the engine that is there stays as it is.
  before=$(sha256sum <"$folder/tensorrt/model.plan")
  bad=$out/$name/refused.txt
  head -c 1000 "$folder/tensorrt/model.plan" >"$folder/short" && mv "$folder/tensorrt/model.plan" "$folder/whole"
  cp "$folder/short" "$folder/tensorrt/model.plan"
  step "$bad" 2 "$run" bench "$folder" "${plugin[@]}"
  mv "$folder/whole" "$folder/tensorrt/model.plan"
  cp "$folder/tensorrt/engine.json" "$folder/facts"
  sed -i 's/"gpu": "[^"]*"/"gpu": "Orin"/' "$folder/tensorrt/engine.json"
  step "$bad" 2 "$run" bench "$folder" "${plugin[@]}"
  sed 's/"tensorrt": "[^"]*"/"tensorrt": "10.3.0"/' "$folder/facts" >"$folder/tensorrt/engine.json"
  step "$bad" 2 "$run" bench "$folder" "${plugin[@]}"
  cp "$folder/facts" "$folder/tensorrt/engine.json"
  cp "$folder/parity/reference.safetensors" "$folder/reference"
  head -c 5000 "$folder/reference" >"$folder/parity/reference.safetensors"
  step "$bad" 2 "$run" build "$folder" "${plugin[@]}" $options
  cp "$folder/reference" "$folder/parity/reference.safetensors"
  step "$bad" 2 "$run" build "$folder" "${plugin[@]}" --max hidden_states=2x3
  ! grep -q LowBitLinear "$folder/tensorrt/model.onnx" ||
    step "$bad" 2 "$run" build "$folder" --plugin "$tensorrt/lib/libnvinfer.so.8"
  [ "$before" = "$(sha256sum <"$folder/tensorrt/model.plan")" ] || { echo "  FAILED: a good engine was replaced"; failed=1; }
  step "$out/$name/after.txt" 0 "$run" parity "$folder" "${plugin[@]}"
  echo "  $name took $((SECONDS - start)) s"
  # The whole folder as it is copied to a device, by its own script; where it is for this GPU, and once: it compiles.
  if [ -f "$bundle/build.sh" ] && [ ! -f "$out/script.txt" ] && ! grep -q '"architecture": "[^9]' "$bundle/device.json"; then
    cp -r "$bundle" "$folder-copied"
    start=$SECONDS
    step "$out/script.txt" 0 env "TENSORRT_INCLUDE=$headers" "TENSORRT_LIB=$tensorrt/lib/libnvinfer.so.8" \
      "OPTIONS=$options" "$folder-copied/build.sh"
    echo "  build.sh took $((SECONDS - start)) s"
    cp "$folder-copied"/latents.safetensors "$folder-copied"/build/log.txt "$out/" || failed=1
  fi
  rm -rf "$(dirname "$folder")"
done
exit $failed
