"""How large a model's values grow: what decides which of them 16 bits can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from qvdit.contract import QvditError
from qvdit.export.precision import with_peaks
from qvdit.runtimes.onnxruntime import session


def largest_values(baseline: Path, inputs: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, float]:
    """The largest magnitude of every float value while a full-precision model runs once in ONNX Runtime.

    baseline: the traced graph with plain products, float32, whose values keep the traced graph's names. inputs: float32
    by name. The model with its measuring nodes lies beside it for a moment, so that both share their weights.
    """
    model, peaks = with_peaks(onnx.load(baseline, load_external_data=False))
    outputs = [value.name for value in model.graph.output if value.name in peaks]
    measuring = baseline.with_name(f".{baseline.name}.measuring")
    try:
        measuring.write_bytes(model.SerializeToString())
        found = session(measuring, threads, soon=True).run(list(peaks.values()), dict(inputs))
    finally:
        measuring.unlink(missing_ok=True)
    largest = {name: float(value) for name, value in zip(peaks, found, strict=True)}
    bad = [name for name in outputs if not np.isfinite(largest[name])]
    if bad:
        raise QvditError(
            f"a model whose output {bad[0]!r} is not finite", "finite numbers in full precision", "check the model"
        )
    return largest
