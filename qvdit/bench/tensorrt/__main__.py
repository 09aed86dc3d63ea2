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
from qvdit.runtimes.tensorrt.arguments import add_build_arguments, build_options, exit_status
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
    add_build_arguments(made, cache="CASES/timing.cache", plugin="the one built here")
    made.add_argument("--no-cuda-graph", action="store_true", help="enqueue every run instead of replaying a graph")
    made.add_argument("--build-only", action="store_true", help="build and compare, time nothing")
    made.add_argument("--profile", action="store_true", help="leave each engine's time by layer as ENGINE/profile.json")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    given = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "qvdit.bench.tensorrt", *(arguments or sys.argv[1:])])
    return exit_status(lambda: measure.run(_settings(given), given.out, command, Lines()))


def _settings(given: argparse.Namespace) -> measure.Settings:
    return measure.Settings(
        root=given.cases,
        models=cases.parse(given.models, cases.MODELS, "--models"),
        engines=cases.parse(given.engines, cases.ENGINES, "--engines"),
        repeats=given.repeats,
        options=BuildOptions(**build_options(given)),
        cuda_graph=not given.no_cuda_graph,
        device=given.device,
        build_only=given.build_only,
        profile=given.profile,
    )


if __name__ == "__main__":
    sys.exit(main())
