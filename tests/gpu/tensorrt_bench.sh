#!/usr/bin/env bash
# `qvdit bench tensorrt` on a GPU machine without network, where TensorRT 8.6 brings a Python of its own.
#
#   tests/gpu/tensorrt_bench.sh --tensorrt DIR --headers DIR --out DIR [--models …] [--engines …] [--level 3]
#                               [--cutlass DIR] [--steps build,prepare,engines,measure] [--gpus 1] [--jobs 1]
#                               [--cases build/bench] [--to-prepare '--also-fp16 LayerNormalization'] [--to-measure '--profile']
#
# --tensorrt: a folder with lib/libnvinfer.so.8 and an env.sh that defines trtpython; --headers: TensorRT's include
# folder; --jobs: engines are built by that many processes, on --gpus GPUs of one kind; they are timed on the first, alone.
# What is prepared and built stays in --cases: the same command goes on where it was stopped. Left in --out: tensorrt.json,
# the logs of the steps and, with --profile, every engine's time by layer.
set -euo pipefail
# shellcheck disable=SC2086  # options are words
root=$(cd "$(dirname "$0")/../.." && pwd)
tensorrt= headers= out= cutlass= models=wan-shapes,latte-shapes,latte-xl-slice
engines=fp16,int8_qdq,w8a8,w4a8,w4a8_no_tqe,w3a6 level=3 steps=build,prepare,engines,measure gpus=1 jobs=1
cases=build/bench to_prepare= to_measure=
while [ $# -gt 0 ]; do
  case $1 in
    --tensorrt | --headers | --out | --cutlass | --models | --engines | --level | --steps | --gpus | --jobs | --cases | --to-prepare | --to-measure)
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      shift 2
      ;;
    *)
      sed -n '2,13p' "$0" >&2
      exit 2
      ;;
  esac
done
[ -f "$tensorrt/env.sh" ] && [ -n "$out" ] || {
  sed -n '2,13p' "$0" >&2
  exit 2
}
mkdir -p "$out"
. "$tensorrt/env.sh"
cd "$root"
export TRTPYTHONPATH=$root PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
has() { [[ ,$steps, == *,$1,* ]]; }
told() { # name, command …
  local name=$1 start=$SECONDS status=0
  shift
  "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "== $name: status $status, $((SECONDS - start)) s"
  tail -n 3 "$out/$name.log"
  return $status
}

if has build; then
  told configure cmake -S runtimes/csrc -B build/kernels -G Ninja -DQVDIT_ARCHITECTURES=90a \
    "-DQVDIT_TENSORRT_INCLUDE=$headers" "-DQVDIT_TENSORRT_LIB=$tensorrt/lib/libnvinfer.so.8" \
    ${cutlass:+"-DQVDIT_CUTLASS=$(realpath "$cutlass")"}
  told build cmake --build build/kernels --parallel "$(nproc)"
fi
export QVDIT_TENSORRT_PLUGIN=${QVDIT_TENSORRT_PLUGIN:-$root/build/kernels/libqvdit_tensorrt.so}

if has prepare; then
  for model in ${models//,/ }; do
    told "prepare-$model" python3 -c "from qvdit.cli import main; main()" bench tensorrt --prepare-only --cases "$cases" --models "$model" \
      --engines "$engines" $to_prepare &
  done
  wait
fi

# Engines first, several at once; measuring then builds what is still missing.
if has engines; then
  share() { # job, its engines
    CUDA_VISIBLE_DEVICES=$(($1 % gpus)) trtpython -m qvdit.bench.tensorrt "$cases" --out "$out/unused.json" \
      --models "$models" --engines "$2" --optimization-level "$level" --timing-cache "$cases/timing-$1.cache" --build-only
  }
  names=(${engines//,/ })
  for ((job = 0; job < jobs; job++)); do
    mine=
    for ((i = job; i < ${#names[@]}; i += jobs)); do mine+=${mine:+,}${names[i]}; done
    [ -z "$mine" ] || told "engines-$job" share "$job" "$mine" &
  done
  wait
fi

if has measure; then
  told measure trtpython -m qvdit.bench.tensorrt "$cases" --out "$out/tensorrt.json" --models "$models" \
    --engines "$engines" --optimization-level "$level" --timing-cache "$cases/timing-0.cache" $to_measure
  cat "$out/measure.log"
  for file in "$cases"/*/*/profile.json; do
    [ ! -f "$file" ] || { name=${file#"$cases"/}; cp "$file" "$out/${name//\//-}"; }
  done
fi
