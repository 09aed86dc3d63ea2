"""Measures cases where there is no PyTorch: the same as `qvdit bench tensorrt` without preparing or drawing.

python -m qvdit.bench.tensorrt CASES --out FILE [--models …] [--engines …] [--build-only] [--optimization-level 3]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qvdit.bench.tensorrt import cases, measure
from qvdit.bench.tensorrt.results import Results, Row
from qvdit.contract import QvditError
from qvdit.contract.errors import in_one_line
from qvdit.runtimes.tensorrt.build import BuildOptions


class Lines:
    """A line for everything, with nothing but print."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def measured(self, results: Results, rows: Sequence[Row]) -> None:
        for row in rows:
            weights = f"weights {row.weight_bytes:,} bytes, engine {row.engine_bytes:,}, GPU {row.device_bytes:,}"
            integers = f"{row.xq_mismatches} x_q and {row.acc_mismatches} acc of {row.layers_compared} layers differ"
            print(
                f"{row.model} as {row.engine}: {row.ms:.4f} ms ± {100 * row.spread:.1f} %, {weights}, relative error "
                f"{row.rel_err}, error ratio {row.error_ratio}, {integers}",
                flush=True,
            )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m qvdit.bench.tensorrt", description=__doc__.splitlines()[0])
    made.add_argument("cases", type=Path, help="the folder that `qvdit bench tensorrt --prepare-only` wrote")
    made.add_argument("--out", type=Path, required=True, help="the JSON to write")
    made.add_argument("--models", default=",".join(cases.USUAL_MODELS))
    made.add_argument("--engines", default=",".join(cases.ENGINES))
    made.add_argument("--repeats", type=int, default=measure.REPEATS, help="timings of each, taken in turns")
    made.add_argument("--optimization-level", type=int, choices=range(6), help="0, fast to build, to 5 (default: 3)")
    made.add_argument("--timing-cache", type=Path, help="measurements to reuse (default: CASES/timing.cache)")
    made.add_argument("--plugin", type=Path, help="libqvdit_tensorrt.so")
    made.add_argument("--device", default="cuda", help="cuda or cuda:N")
    made.add_argument("--no-cuda-graph", action="store_true", help="enqueue every run instead of replaying a graph")
    made.add_argument("--build-only", action="store_true", help="build and compare, time nothing")
    made.add_argument("--profile", action="store_true", help="leave each engine's time by layer as ENGINE/profile.json")
    made.add_argument("--verbose", action="store_true", help="all that TensorRT says, on stderr")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    given = parser().parse_args(arguments)
    try:
        settings = measure.Settings(
            root=given.cases,
            models=cases.parse(given.models, cases.MODELS, "--models"),
            engines=cases.parse(given.engines, cases.ENGINES, "--engines"),
            repeats=given.repeats,
            options=BuildOptions(
                optimization_level=given.optimization_level,
                timing_cache=given.timing_cache,
                plugin=given.plugin,
                verbose=given.verbose,
            ),
            cuda_graph=not given.no_cuda_graph,
            device=given.device,
            build_only=given.build_only,
            profile=given.profile,
        )
        command = shlex.join(["python", "-m", "qvdit.bench.tensorrt", *(arguments or sys.argv[1:])])
        measure.run(settings, given.out, command, Lines())
    except (QvditError, OSError) as error:
        print(in_one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
