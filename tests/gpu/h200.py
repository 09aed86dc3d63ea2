"""Build the kernels on a machine with a GPU and test them there: one command. `qvdit bench kernels` times them.

    python3 tests/gpu/h200.py --cutlass .cutlass --out "$OUT"

--steps chooses among build, test and sanitize (compute-sanitizer on a few tests); --cutlass is CUTLASS's include
folder. The build log and the tests' output are left in --out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "kernels"
PYTHON_PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def run(command: list[str], log: Path, **environment: str) -> bool:
    """Run a command with its output in a log, and the log's end on the screen if it fails; whether it did not."""
    start = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, env={**os.environ, **environment}
        )
    print(f"$ {' '.join(command)}\n  {time.monotonic() - start:.0f} s, status {done.returncode}, {log}", flush=True)
    if done.returncode:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]), flush=True)
    return done.returncode == 0


def build(out: Path, cutlass: str, architectures: str) -> bool:
    """Configure and compile; ptxas's registers and spills end up in the log."""
    configure = ["cmake", "-S", "runtimes/csrc", "-B", str(BUILD), "-G", "Ninja"]
    configure.append(f"-DQVDIT_ARCHITECTURES={architectures}")
    if cutlass:
        configure.append(f"-DQVDIT_CUTLASS={Path(cutlass).resolve()}")
    configure += ["-DCMAKE_CUDA_FLAGS=-Xptxas=-v", "-DQVDIT_LINEINFO=ON"]
    compile_all = ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count())]
    return run(configure, out / "configure.log") and run(compile_all, out / "build.log")


def test(out: Path, *arguments: str) -> bool:
    """tests/gpu, in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--maxfail=20", "tests/gpu", *arguments]
    ok = run(command, out / "tests.log", PYTHONPATH=PYTHON_PATH)
    print((out / "tests.log").read_text().splitlines()[-1], flush=True)
    return ok


def sanitize(out: Path) -> bool:
    """Memcheck and racecheck on one of each kind of kernel, without PyTorch's caching allocator: it hides overruns."""
    chosen = "(test_integers and 6-True-1152) or (test_layernorm and 1152-dtype1) or (test_accumulators and size4)"
    chosen += " or test_nan_rows or (test_attention and 17-15-72) or (test_attention and 129-200-64) or test_layouts"
    chosen += " or test_it_is_the_sum or test_swapped_rows or (test_low_rank and 3-1152-4)"
    ok = True
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-n", "0", "tests/gpu", "-k", chosen]
        log = out / f"{tool}.log"
        ok &= run(command, log, PYTHONPATH=PYTHON_PATH, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        print("\n".join(line for line in log.read_text().splitlines() if "SUMMARY" in line or " passed" in line))
    return ok


def main() -> None:
    """The steps, in order; stops after a build that fails, goes on after tests that do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "kernels")
    parser.add_argument("--cutlass", default="")
    parser.add_argument("--architectures", default="90a")
    parser.add_argument("--steps", default="build,test")
    arguments = parser.parse_args()
    steps = arguments.steps.split(",")
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["QVDIT_KERNELS"] = str(BUILD / "libqvdit_kernels.so")
    ok = "build" not in steps or build(arguments.out, arguments.cutlass, arguments.architectures)
    if not ok:
        sys.exit(1)
    if "test" in steps:
        ok = test(arguments.out)
    if "sanitize" in steps:
        ok = sanitize(arguments.out) and ok
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
