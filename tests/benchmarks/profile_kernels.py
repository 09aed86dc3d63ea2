"""What bounds the kernels: Nsight Compute's counters of the quantizers, of unpacking and of the GEMM at a few sizes.

    python tests/benchmarks/profile_kernels.py --out profile.json      # needs ncu, and leave to read counters

A row a kernel: its size, what it was asked for and, as Nsight Compute calls them, its duration and the shares of the
GPU's peaks that it reached. Clocks are as they are; one launch each, after three unprofiled ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from qvdit.bench.candidates import LowBit
from qvdit.bench.shapes import Shape, parse
from qvdit.contract.files import write_json
from qvdit.runtimes import cuda, torch_ops
from qvdit.runtimes.tensorrt.device import Device

KERNELS = ("quantize", "unpack", "gemm")
SHAPES = "32768x4608x1152,32768x1152x4608,512x5120x5120"
SECTIONS = ("SpeedOfLight", "Occupancy", "SchedulerStats", "WarpStateStats", "LaunchStats")
KEPT = {  # Nsight Compute's name: ours
    "Duration": "duration",
    "DRAM Throughput": "dram",
    "Memory Throughput": "memory",
    "L1/TEX Cache Throughput": "l1",
    "L2 Cache Throughput": "l2",
    "Compute (SM) Throughput": "compute",
    "Achieved Occupancy": "occupancy",
    "Issue Slots Busy": "issue_slots",
    "One or More Eligible": "cycles_with_eligible_warps",
    "Warp Cycles Per Issued Instruction": "warp_cycles_per_instruction",
    "Registers Per Thread": "registers",
}

Launch = tuple[dict[str, Any], Callable[[], object]]


def launches(shape: Shape) -> Iterator[Launch]:
    """What is profiled at a size, one kernel each, and what it is."""
    device = torch.device("cuda")
    ours = LowBit.random(shape, 1, False, device)
    x = torch.randn(shape.m, shape.k, dtype=torch.bfloat16, device=device)
    y = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device)
    for rank, prologue in ((0, "plain"), (1, "plain"), (4, "plain"), (1, "gelu"), (1, "layernorm")):
        yield {"what": "quantize", "rank": rank, "prologue": prologue}, partial(ours.quantize, x, rank, prologue)
    yield {"what": "unpack"}, partial(torch_ops.unpack_weight, ours.words[4][0], 4, shape.k, None, False)
    for rank in (0, 1, 4):
        rows = ours.quantize(x, rank)
        yield {"what": "gemm", "rank": rank}, partial(ours.gemm, rows, 0, y, rank, cuda.Tile.AUTO)


def run(shapes: tuple[Shape, ...], kernels: tuple[str, ...]) -> None:
    """Under Nsight Compute: a line of JSON for every launch that it profiles."""
    for shape in shapes:
        for what, launch in launches(shape):
            if what["what"] not in kernels:
                continue
            for _ in range(3):
                launch()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            launch()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(json.dumps({"m": shape.m, "n": shape.n, "k": shape.k, **what}), flush=True)


def rows_of(output: str) -> list[dict[str, Any]]:
    """The launches that a run under Nsight Compute told of, with the counters of its CSV, in the same order."""
    lines = output.splitlines()
    told = [json.loads(line) for line in lines if line.startswith('{"m"')]
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise SystemExit(f"Nsight Compute told of no kernel:\n{output[-2000:]}")
    counters: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[header:]):
        found = counters.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("<")[0].split("(")[0]})
        if row["Metric Name"] in KEPT:
            name, unit = KEPT[row["Metric Name"]], {"%": "_percent", "us": "_us", "ns": "_ns"}
            found[name + unit.get(row["Metric Unit"], "")] = float(row["Metric Value"].replace(",", ""))
    if len(counters) != len(told):
        raise SystemExit(f"{len(counters)} kernels were profiled, {len(told)} launched")
    return [{**what, **found} for what, found in zip(told, counters.values(), strict=True)]


def main() -> None:
    """Profile, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    parser.add_argument("--shapes", default=SHAPES, help="MxNxK, separated by commas")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="some of them, separated by commas")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        run(parse(arguments.shapes), tuple(arguments.kernels.split(",")))
        return
    if shutil.which("ncu") is None:
        raise SystemExit("no ncu on the PATH: it comes with CUDA, as Nsight Compute")
    command = ["ncu", "--csv", "--page", "details", "--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, "--launch", "--shapes", arguments.shapes, "--kernels", arguments.kernels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    gpu = Device().facts()
    about = {"command": shlex.join(["python", *sys.argv]), "gpu": gpu.name, "driver": gpu.driver}
    write_json(arguments.out, {**about, "date": date.today().isoformat(), "rows": rows_of(done.stdout)})


if __name__ == "__main__":
    main()
