"""The portable ONNX files of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from qvdit.contract.bundle import ORT_MODEL, QDQ_MODEL
from qvdit.contract.layer import Layer
from qvdit.export import graph
from qvdit.export.files import save_model
from qvdit.export.functions import Body

_FILES: tuple[tuple[str, Body], ...] = ((QDQ_MODEL, "qdq"), (ORT_MODEL, "integer"))


def export_onnx(
    traced: Path,
    layers: tuple[Layer, ...],
    full_weights: dict[str, tuple[np.ndarray, np.ndarray | None]],
    bundle: Path,
    progress: Callable[[int, int], None],
) -> list[Path]:
    """Write the interchange and the ONNX Runtime model of a bundle, each checked in full; returns their files.

    full_weights: weight [N, K] and bias [N] of the layers that stay in full precision (others are ignored).
    """
    source = onnx.load(traced)
    quantized = {layer.name for layer in layers}
    kept = {name: arrays for name, arrays in full_weights.items() if name not in quantized}
    written: list[Path] = []
    for index, (name, body) in enumerate(_FILES):
        progress(index, len(_FILES))
        files = save_model(graph.quantized_model(source, layers, body, kept), bundle / name)
        graph.check(str(bundle / name))
        written += files
    progress(len(_FILES), len(_FILES))
    return written
