"""The TensorRT target, as far as it goes without an engine: ``tensorrt/model.onnx``, strongly typed.

Layers with dynamic activations become nodes of the LowBitLinear plugin, their graph typed by
:mod:`qvdit.export.precision`. Static INT8 layers are plain Q/DQ, typed by NVIDIA ModelOpt's AutoCast. AutoCast runs the
model to see what would overflow, which it cannot with plugin nodes: for those we measure on the full-precision graph.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from qvdit.contract.bundle import TENSORRT_MODEL
from qvdit.contract.layer import Layer, StaticInt8Layer
from qvdit.export.files import save_model
from qvdit.export.graph import FullWeights, check
from qvdit.export.opset import lowered
from qvdit.export.plugin import plugin_model
from qvdit.export.precision import LowType, largest_values, strongly_typed


@dataclass(frozen=True)
class TracedModel:
    """A transformer's graph on disk, and what fills it."""

    placeholders: Path  # one placeholder a linear
    baseline: Path  # the same graph in full precision
    qdq: Path  # the interchange model
    layers: tuple[Layer, ...]
    full_weights: dict[str, FullWeights]  # of the linears that stay in full precision (others are ignored)
    inputs: dict[str, np.ndarray]  # float32 by name: an example to measure magnitudes on


def export_tensorrt(model: TracedModel, bundle: Path, low: LowType = "float16") -> list[Path]:
    """Write ``tensorrt/model.onnx``, checked in full; returns its files.

    low: bfloat16 needs TensorRT 10; static layers are FP16 whatever it says. Layers that the plugin does not compute
    raise QvditError, and nothing is written.
    """
    static = all(isinstance(layer, StaticInt8Layer) for layer in model.layers)
    files = save_model(_cast_by_modelopt(model) if static else with_plugin(model, low), bundle / TENSORRT_MODEL)
    check(str(bundle / TENSORRT_MODEL))
    return files


def with_plugin(model: TracedModel, low: LowType = "float16", merge: bool = True) -> onnx.ModelProto:
    """The model at opset 18 with plugin nodes; merge: one node for queries, keys and values where they allow it."""
    quantized = {layer.name: layer for layer in model.layers}
    kept = {name: weights for name, weights in model.full_weights.items() if name not in quantized}
    widths = {name: layer.shape for name, layer in quantized.items()}
    widths |= {name: (weight.shape[0], weight.shape[1]) for name, (weight, _) in kept.items()}
    largest = largest_values(model.baseline, model.inputs)
    typed = strongly_typed(onnx.load(model.placeholders), widths, low, largest)
    return lowered(plugin_model(typed, model.layers, kept, merge))


def _cast_by_modelopt(model: TracedModel) -> onnx.ModelProto:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("modelopt.onnx", "modelopt.onnx.autocast"):
            logging.getLogger(name).setLevel(logging.ERROR)  # it tells of every node it leaves in FP32
        example = Path(folder) / "inputs.npz"
        np.savez(example, **model.inputs)  # type: ignore[arg-type]
        return convert_to_mixed_precision(
            str(model.qdq),
            low_precision_type="fp16",
            keep_io_types=True,
            providers=["cpu"],
            calibration_data=str(example),
        )
