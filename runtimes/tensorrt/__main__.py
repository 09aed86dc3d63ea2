"""Builds and proves a bundle's engine, on the machine that is to run it: no PyTorch, no command-line packages.

python -m qvdit.runtimes.tensorrt BUNDLE [--video-size HxW … | --fixed] [--plugin FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qvdit.runtimes.tensorrt.arguments import add_build_arguments, build_options, exit_status
from qvdit.runtimes.tensorrt.build import BuildOptions, build_engine, parse_bytes, parse_size
from qvdit.runtimes.tensorrt.progress import shown


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m qvdit.runtimes.tensorrt", description=__doc__.splitlines()[0])
    made.add_argument("bundle", type=Path, help="a folder that qvdit-export --target tensorrt made")
    made.add_argument(
        "--video-size",
        action="append",
        default=[],
        metavar="HxW",
        help="height and width of the model's input, once for each size; the engine spans them, and is fastest at the "
        "first (default: the example's)",
    )
    made.add_argument("--batch", type=int, help="largest batch (default: the example's)")
    made.add_argument(
        "--fixed", action="store_true", help="the example's shapes and no other: quicker to build and to run"
    )
    made.add_argument("--workspace", metavar="SIZE", help="scratch memory for the build, as 512M or 4G (default: all)")
    add_build_arguments(made, cache="timing.cache beside the engine", plugin="the one beside the engine")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Build; returns the exit status."""
    given = parser().parse_args(arguments)
    return exit_status(lambda: _build(given))


def _build(given: argparse.Namespace) -> None:
    options = BuildOptions(
        video_sizes=tuple(map(parse_size, given.video_size)),
        batch=given.batch,
        fixed=given.fixed,
        workspace=parse_bytes(given.workspace),
        **build_options(given),
    )
    with shown() as (say, report):
        build_engine(given.bundle, options, given.device, say, report)


if __name__ == "__main__":
    sys.exit(main())
