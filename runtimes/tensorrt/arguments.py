"""What the programs without PyTorch share of their command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvdit.contract import QvditError
from qvdit.contract.errors import in_one_line
from qvdit.runtimes.tensorrt.plugin import LIBRARY, VARIABLE


def add_build_arguments(parser: argparse.ArgumentParser, cache: str, plugin: str) -> None:
    """How engines are built, and where; ``cache`` and ``plugin`` say where timings and the plugin are otherwise."""
    level = "0, fast to build, to 5 (default: 3)"
    parser.add_argument("--optimization-level", type=int, choices=range(6), help=level)
    parser.add_argument("--timing-cache", type=Path, help=f"measurements to reuse (default: {cache})")
    parser.add_argument("--plugin", type=Path, help=f"{LIBRARY} (default: what {VARIABLE} names, or {plugin})")
    parser.add_argument("--verbose", action="store_true", help="all that TensorRT says, on stderr")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Which GPU."""
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")


def build_options(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of BuildOptions that :func:`add_build_arguments` asked for."""
    return {name: getattr(given, name) for name in ("optimization_level", "timing_cache", "plugin", "verbose")}


def exit_status(work: Callable[[], object]) -> int:
    """Do the work: 0, or 2 after a user's or the system's error, told on stderr in one line."""
    try:
        work()
    except (QvditError, OSError) as error:
        print(in_one_line(error), file=sys.stderr)
        return 2
    return 0
