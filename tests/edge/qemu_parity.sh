#!/usr/bin/env bash
# Runs the CPU part of an edge folder as an aarch64 machine without PyTorch would, without having one: ONNX Runtime's
# parity check (every layer's integers, then the whole model) in an aarch64 Python under qemu-user.
#
#   tests/edge/qemu_parity.sh FOLDER [WORK]
#
# FOLDER: OUT/edge of qvdit-export --device …, or any bundle. WORK: where QEMU, Python and the packages go, about 500 MB,
# and are found again the next time (default: build/qemu). Needs apt-get, dpkg-deb and pip; fetches from Debian's archive
# and from the package index, and installs nothing. QEMU names another qemu-aarch64: 7.2, Debian 12's, crashes as ONNX
# Runtime 1.32 starts, 10.0 runs it. Takes minutes.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
[ -d "${1:-}" ] || { sed -n '2,10p' "$0" >&2; exit 2; }
folder=$(realpath "$1") work=$(realpath -m "${2:-$root/build/qemu}")
python=${PYTHON:-python3} # of this machine, for pip
for tool in dpkg-deb apt-get; do
  command -v $tool >/dev/null || { echo "error: got no $tool; expected Debian or Ubuntu; run it there" >&2; exit 2; }
done

# unpacked RELEASE ARCHITECTURE TARGET PACKAGE…: Debian's packages in a folder, nothing installed.
unpacked() {
  local release=$1 architecture=$2 target=$3 state=$work/apt-$1-$2
  shift 3
  [ ! -f "$target/done" ] || return 0
  mkdir -p "$state"/{lists/partial,archives/partial} "$target"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main" \
    >"$state/sources.list"
  cat >"$state/apt.conf" <<EOF
APT::Architecture "$architecture";
APT::Architectures {"$architecture";};
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$state/lists";
Dir::State::status "/dev/null";
Dir::Cache "$state";
APT::Sandbox::User "root";
EOF
  APT_CONFIG=$state/apt.conf apt-get -qq update
  (cd "$state/archives" && APT_CONFIG=$state/apt.conf apt-get -qq download "$@")
  for package in "$state"/archives/*.deb; do dpkg-deb -x "$package" "$target"; done
  touch "$target/done"
}

unpacked bookworm arm64 "$work/system" libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 \
  libuuid1 libcrypt1 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
[ -n "${QEMU:-}" ] || unpacked trixie "$(dpkg --print-architecture)" "$work/qemu" qemu-user
qemu=${QEMU:-$work/qemu/usr/bin/qemu-aarch64}

# What qvdit.runtimes needs on a CPU, as it is published for aarch64.
if [ ! -f "$work/site/done" ]; then
  "$python" -m pip install --quiet --target "$work/site" --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 numpy safetensors onnx onnxruntime
  touch "$work/site/done"
fi

# The package without what needs PyTorch: two folders of this repository.
rm -rf "$work/package" && mkdir -p "$work/package/qvdit"
cp -r "$root/qvdit/contract" "$work/package/qvdit/contract"
cp -r "$root/runtimes" "$work/package/qvdit/runtimes"
touch "$work/package/qvdit/__init__.py"

cat >"$work/check.py" <<'EOF'
import platform, sys, time
from pathlib import Path
import onnxruntime
from qvdit.runtimes.parity import tell
assert platform.machine() == "aarch64" and "torch" not in sys.modules
start = time.monotonic()
print(f"Python {platform.python_version()} on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}")
proven = tell(Path(sys.argv[1]), threads=1, device="cpu")
print(f"took {time.monotonic() - start:.0f} s")
assert "torch" not in sys.modules
sys.exit(0 if proven else 1)
EOF
system=$work/system
"$qemu" -L "$system" -E LD_LIBRARY_PATH="$system/lib/aarch64-linux-gnu:$system/usr/lib/aarch64-linux-gnu" \
  -E PYTHONHOME="$system/usr" -E PYTHONPATH="$work/package:$work/site" -E PYTHONDONTWRITEBYTECODE=1 \
  "$system/usr/bin/python3.11" "$work/check.py" "$folder"
