#!/usr/bin/env bash
# Builds and proves the engines of bundles with TensorRT 8.6, on a GPU machine without network. TensorRT brings its own
# Python, without PyTorch; `python3` is PyTorch's.
#
#   tests/gpu/tensorrt86.sh --tensorrt DIR --out DIR (--headers DIR [--cutlass DIR] [--architectures 90a] | --kernels DIR)
#                           [--levels '0 2'] [--options --fixed] [--jobs 5] [--limit 150] [--seconds 600] [--plans DIR]
#                           BUNDLE …
#
# All builds share OUT/timing.cache: one bundle of each model is built first, low-bit and static INT8, the others find
# its layers timed. Builds side by side (--jobs) take the machine's GPUs in turn, or those of CUDA_VISIBLE_DEVICES.
#
# --tensorrt: a folder with lib/libnvinfer.so.8 and an env.sh that defines trtpython. --headers: TensorRT's include
# folder, to build kernels and plugin with; --kernels: the folder where both libraries are already. --levels: the
# optimization levels to build at, one after the other; a later engine takes an earlier one's place once it is proven.
# --limit: seconds for one build; --seconds: for everything. --plans: what tests/gpu/videos.py plan made, to sample.
#
# Left in --out: NAME/level-N/ with the log, engine.json and parity.json of each bundle; videos.json and the videos;
# half.log, tests.log. The exit status is 1 where an engine was not proven at any level, or something else failed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tensorrt= headers= kernels= out= cutlass= architectures=90a levels='0 2' options=--fixed jobs=5 limit=150 seconds=600 plans=
while [ $# -gt 0 ]; do
  case $1 in
    --tensorrt | --headers | --kernels | --out | --cutlass | --architectures | --levels | --options | --jobs | --limit | \
      --seconds | --plans)
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) break ;;
  esac
done
[ -f "$tensorrt/env.sh" ] && [ -f "$headers/NvInferRuntime.h" -o -f "$kernels/libqvdit_tensorrt.so" ] && [ -n "$out" ] &&
  [ $# -gt 0 ] || {
  sed -n '2,20p' "$0" >&2
  exit 2
}
mkdir -p "$out"
out=$(realpath "$out") deadline=$(($(date +%s) + seconds)) status=0
. "$tensorrt/env.sh"
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRTPYTHONPATH=$root

if [ -z "$kernels" ]; then
  kernels=$root/build/kernels start=$SECONDS
  cmake -S runtimes/csrc -B "$kernels" -G Ninja "-DQVDIT_ARCHITECTURES=$architectures" \
    "-DQVDIT_TENSORRT_INCLUDE=$headers" "-DQVDIT_TENSORRT_LIB=$tensorrt/lib/libnvinfer.so.8" \
    ${cutlass:+"-DQVDIT_CUTLASS=$(realpath "$cutlass")"} >"$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
  cmake --build "$kernels" --parallel "$(nproc)" >>"$out/build.log" 2>&1 || { tail -50 "$out/build.log"; exit 1; }
  echo "kernels and plugin built in $((SECONDS - start)) s"
fi
kernels=$(realpath "$kernels")
export QVDIT_KERNELS=$kernels/libqvdit_kernels.so QVDIT_TENSORRT_PLUGIN=$kernels/libqvdit_tensorrt.so

# Seconds that something may take; fails where too few are left.
allowed() {
  local left=$((deadline - $(date +%s)))
  [ $left -ge 15 ] && echo $((left < $1 ? left : $1))
}

# prove LEVEL BUNDLE
prove() {
  local level=$1 bundle=$2 begin code=0 most name folder devices
  name=$(basename "$bundle") begin=$(date +%s)
  folder=$out/$name/level-$level
  most=$(allowed "$limit") || { echo "== $name, level $level: no time left"; return 1; }
  mkdir -p "$folder"
  IFS=, read -ra devices <<<"$gpus"
  # shellcheck disable=SC2086
  CUDA_VISIBLE_DEVICES=${devices[SLOT % ${#devices[@]}]} timeout -k 5 "$most" \
    bash -c 'trtpython -m qvdit.runtimes.tensorrt "$@"' _ "$bundle" --optimization-level "$level" \
    --timing-cache "$out/timing.cache" $options >"$folder/log.txt" 2>&1 || code=$?
  find "$bundle/tensorrt" -maxdepth 1 -name '*.json*' -newermt "@$begin" -exec cp -t "$folder" {} +
  echo "== $name, level $level: status $code, $(($(date +%s) - begin)) s"
  tail -n 3 "$folder/log.txt" | cut -c1-700
  return $code
}

# videos BUNDLE
videos() {
  local model
  model=$(sed -n 's/^ "model": "\(.*\)",$/\1/p' "$1/manifest.json")
  timeout 90 bash -c 'trtpython -m qvdit.runtimes.tensorrt.sample "$@"' _ "$1" "$plans/$model"/*.safetensors \
    --out "$out/$(basename "$1")-engine.safetensors"
}
export -f allowed prove videos
gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
export out options limit deadline plans gpus

# each COMMAND ARGUMENT … -- BUNDLE …: side by side; fails where one did
each() {
  local command=()
  while [ "$1" != -- ]; do command+=("$1"); shift; done
  shift
  printf '%s\0' "$@" | xargs -0 -P "$jobs" --process-slot-var=SLOT -I {} bash -c '"$@"' _ "${command[@]}" {}
}

# What engines are measured by comes before them.
export OMP_NUM_THREADS=4
printf '%s\0' "$@" | xargs -0 -P 4 -n 3 timeout 90 python3 -m qvdit.half >"$out/half.log" 2>&1 || status=1
grep 'FP16 run\|rror' "$out/half.log" | cut -c1-300 || true
echo "PyTorch's FP16 runs: $SECONDS s after the start"
if [ -n "$plans" ]; then
  timeout 200 python3 tests/gpu/videos.py pytorch "$plans" "$out" "$@" >"$out/videos.log" 2>&1 &
fi

read -r first others <<<"$levels"
declare -A seen=()
leading=() following=()
for bundle in "$@"; do
  name=$(basename "$bundle") kind=low-bit
  [[ $name != *-int8-static ]] || kind=static
  model=${name%-int8-static} model=${model%-w[0-9]a[0-9]}
  if [ -z "${seen[$model $kind]:-}" ]; then leading+=("$bundle"); else following+=("$bundle"); fi
  seen[$model $kind]=yes
done
each prove "$first" -- "${leading[@]}" || true
[ ${#following[@]} -eq 0 ] || each prove "$first" -- "${following[@]}" || true
built=()
for bundle in "$@"; do [ ! -f "$bundle/tensorrt/model.plan" ] || built+=("$bundle"); done
if [ ${#built[@]} -gt 0 ]; then
  # No conftest of the tests around it, which import PyTorch.
  QVDIT_TEST_BUNDLES=$(IFS=:; echo "${built[*]}") timeout 120 bash -c 'trtpython -m pytest "$@"' _ -q \
    -p no:cacheprovider -o addopts= --confcutdir tests/gpu/engines tests/gpu/engines >"$out/tests.log" 2>&1 || status=1
  tail -n 12 "$out/tests.log" | cut -c1-400
  [ -z "$plans" ] || each videos -- "${built[@]}" >"$out/sample.log" 2>&1 || { status=1; tail -n 3 "$out/sample.log"; }
fi
echo "tests and videos: $SECONDS s after the start"
for level in $others; do each prove "$level" -- "$@" || true; done

for bundle in "$@"; do
  [ -f "$bundle/tensorrt/model.plan" ] || { echo "FAILED: no engine of $(basename "$bundle")"; status=1; }
done
if [ -n "$plans" ]; then
  wait
  tail -n 3 "$out/videos.log" | cut -c1-300
  python3 tests/gpu/videos.py judge "$plans" "$out" "$@" || status=1
fi
exit $status
