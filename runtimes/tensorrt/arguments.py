"""What the programs without PyTorch share of their command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvdit.contract import QvditError


def add_build_arguments(parser: argparse.ArgumentParser, cache: str) -> None:
    """How engines are built, and where; ``cache`` says where timings are kept otherwise."""
    level = "0, fast to build, to 5 (default: 3)"
    parser.add_argument("--optimization-level", type=int, choices=range(6), help=level)
    parser.add_argument("--timing-cache", type=Path, help=f"measurements to reuse (default: {cache})")
    parser.add_argument("--plugin", type=Path, help="libqvdit_tensorrt.so")
    parser.add_argument("--verbose", action="store_true", help="all that TensorRT says, on stderr")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Which GPU."""
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")


def build_options(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of BuildOptions that :func:`add_build_arguments` asked for."""
    return {name: getattr(given, name) for name in ("optimization_level", "timing_cache", "plugin", "verbose")}


def exit_status(work: Callable[[], object]) -> int:
    """Do the work: 0, or 2 after a user's error, told on stderr."""
    try:
        work()
    except QvditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
