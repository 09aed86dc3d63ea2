"""Build the kernels on a machine with a GPU, test them there, and time them: one command, a short table at its end.

    python3 tests/gpu/h200.py --cutlass .cutlass --out "$OUT"

--steps chooses among build, test, sanitize (compute-sanitizer on a few tests) and time; --cutlass is CUTLASS's include
folder. The build log, the tests' output and timings.json are left in --out. Times are medians of interleaved repeats on
random data; several input sets take turns, so that nothing is timed out of the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from qvdit.runtimes import cuda, torch_ops  # noqa: E402

BUILD = ROOT / "build" / "kernels"
PYTHON_PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
SHAPES = [  # M, N, K
    (32768, 1152, 1152),
    (32768, 3456, 1152),
    (32768, 4608, 1152),
    (32768, 1152, 4608),
    (32768, 1536, 1536),
    (32768, 8960, 1536),
    (32768, 1536, 8960),
    (32768, 5120, 5120),
    (32768, 13824, 5120),
    (16384, 3072, 3072),
    (16384, 12288, 3072),
    (512, 5120, 5120),
]


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
    chosen += " or test_nan_rows"
    ok = True
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-n", "0", "tests/gpu", "-k", chosen]
        log = out / f"{tool}.log"
        ok &= run(command, log, PYTHONPATH=PYTHON_PATH, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        print("\n".join(line for line in log.read_text().splitlines() if "SUMMARY" in line or " passed" in line))
    return ok


def captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some calls: PyTorch takes longer to start the shorter kernels than they run."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def interleaved(
    candidates: dict[str, Callable[[int], object]], repeats: int = 15, calls: int = 6
) -> dict[str, list[float]]:
    """Milliseconds a call of every candidate, repeats times, taking turns. A candidate takes a call's number."""
    graphs = {name: captured(call, calls) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 2):  # the first two warm up
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times[name].append(start.elapsed_time(end) / calls)
    return times


def time_shape(m: int, n: int, k: int) -> list[dict]:
    """One shape: bf16 against quantization, the GEMM alone for every tile, and the whole linear with 4-bit weights."""
    sets = 3
    device = {"device": "cuda"}
    xs = [torch.randn(m, k, dtype=torch.bfloat16, **device) for _ in range(sets)]
    dense = torch.randn(n, k, dtype=torch.bfloat16, **device)
    words = torch.randint(-(1 << 31), 1 << 31, (n, k * 4 // 32), dtype=torch.int32, **device)
    scale, bias = torch.rand(n, **device) / k, torch.randn(n, **device)
    alpha, beta = torch.randn(4, k, **device), torch.randn(4, n, **device) / k
    gain = torch.rand(16, **device)
    weight, _ = torch_ops.unpack_weight(words, 4, k, None, False)
    y = torch.empty(m, n, dtype=torch.bfloat16, **device)

    def quantize(i: int, rank: int) -> tuple:
        x = xs[i % sets]
        factors = {"alpha": alpha[:rank], "frame_gain": gain, "tokens_per_frame": m // 16} if rank else {}
        return torch.ops.qvdit.quantize_rows(x, 8, True, **factors)

    rows = {rank: [quantize(i, rank) for i in range(sets)] for rank in (0, 1, 4)}

    def gemm(i: int, rank: int, tile: cuda.Tile) -> None:
        x_q, row_scale, _, u, _ = rows[rank][i % sets]
        pointers = {
            "x_q": x_q.data_ptr(),
            "weight": weight.data_ptr(),
            "scale": row_scale.data_ptr(),
            "weight_scale": scale.data_ptr(),
            "u": u.data_ptr() if rank else None,
            "beta": beta.data_ptr(),
            "bias": bias.data_ptr(),
            "y": y.data_ptr(),
        }
        sizes = {"m": m, "n": n, "k_pad": k, "rank": rank, "segment": n, "y_dtype": cuda.Dtype.BF16, "tile": tile}
        cuda.library().low_bit_gemm(cuda.GemmArgs(**pointers, **sizes), torch.cuda.current_stream().cuda_stream)

    def linear(i: int, rank: int) -> torch.Tensor:
        weights = (words, 4, k, scale, None, beta[:rank] if rank else None, bias, torch.bfloat16)
        return torch.ops.qvdit.low_bit_linear(*quantize(i, rank), *weights)

    bf16_bias = bias.bfloat16()
    candidates: dict[str, Callable[[int], object]] = {
        "bf16": lambda i: torch.nn.functional.linear(xs[i % sets], dense, bf16_bias),
        "copy": lambda i: xs[i % sets].clone(),
        "unpack": lambda i: torch_ops.unpack_weight(words, 4, k, None, False),
    }
    for rank in (0, 1, 4):
        candidates[f"quantize rank {rank}"] = lambda i, rank=rank: quantize(i, rank)
        candidates[f"linear rank {rank}"] = lambda i, rank=rank: linear(i, rank)
    for tile in list(cuda.Tile)[1:]:
        for rank in (0, 1, 4) if tile in (cuda.Tile.WGMMA_128X128, cuda.Tile.WGMMA_128X256) else (1,):
            candidates[f"gemm {tile.name} rank {rank}"] = lambda i, rank=rank, tile=tile: gemm(i, rank, tile)

    found = []
    for name, times in interleaved(candidates).items():
        ms = statistics.median(times)
        row = {"m": m, "n": n, "k": k, "what": name, "ms": ms, "spread": (max(times) - min(times)) / ms}
        if name.startswith("quantize"):
            row["gb_s"] = 3 * m * k / ms / 1e6
        elif name == "copy":
            row["gb_s"] = 4 * m * k / ms / 1e6
        elif name == "unpack":
            row["gb_s"] = 1.5 * n * k / ms / 1e6
        else:
            row["tops"] = 2 * m * n * k / ms / 1e9
        found.append(row)
    return found


def time_all(out: Path) -> None:
    """Every shape; prints TOP/s and GB/s, writes timings.json."""
    rows: list[dict] = []
    for m, n, k in SHAPES:
        timed = time_shape(m, n, k)
        torch.cuda.empty_cache()
        rows += timed
        here = {r["what"]: r for r in timed}
        rate = {name: r.get("tops", r.get("gb_s")) for name, r in here.items()}
        print(f"{m} x {n} x {k}: " + ", ".join(f"{name} {value:.0f}" for name, value in rate.items()), flush=True)
        best = max((r["tops"], name) for name, r in here.items() if name.startswith("gemm") and "rank 1" in name)
        ratio = here["bf16"]["ms"] / here["linear rank 1"]["ms"]
        share = rate["quantize rank 1"] / rate["copy"]
        faster = best[0] / rate["bf16"]
        print(f"  best: {best[1]}, {faster:.2f}x bf16; linear {ratio:.2f}x; quantize {share:.0%} of copy")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    (out / "timings.json").write_text(json.dumps({**about, "rows": rows}, indent=1))


def main() -> None:
    """The steps, in order; stops after a build that fails, goes on after tests that do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "kernels")
    parser.add_argument("--cutlass", default="")
    parser.add_argument("--architectures", default="90a")
    parser.add_argument("--steps", default="build,test,time")
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
    if "time" in steps:
        time_all(arguments.out)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
