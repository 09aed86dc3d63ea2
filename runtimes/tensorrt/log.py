"""TensorRT's messages: kept, so that an error can say why, and shown where they are asked for."""

from __future__ import annotations

import sys
from typing import Any

from qvdit.runtimes.tensorrt import plugin, versions

_KEPT = 50


def logger(verbose: bool = False) -> Any:
    """A TensorRT logger with ``why()``, the last errors' text; verbose: everything goes to stderr as well."""
    trt = versions.tensorrt()

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]  # the base is there only where TensorRT is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if verbose:
                print(f"[{getattr(severity, 'name', severity)}] {message}", file=sys.stderr)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.kept = [*self.kept, " ".join(message.split())][-_KEPT:]

        def why(self) -> str:
            """The errors since the last call, in one line, ours first: what a layer refused is the cause."""
            kept, self.kept = self.kept, []
            ours = [text for text in kept if text.startswith(plugin.NODES)]
            distinct = list(dict.fromkeys(ours or kept))
            return "; ".join(distinct[:3]) or "TensorRT gave no reason"

    return Logger()
