"""The TensorRT target, as far as it goes without an engine: ``tensorrt/model.onnx``, strongly typed, opset 17.

Layers with dynamic activations become nodes of the LowBitLinear plugin; static INT8 layers are plain Q/DQ, for which
TensorRT has kernels of its own. NVIDIA ModelOpt's AutoCast cannot type the former (it runs the model to see what would
overflow) and rounds the latter's scales to FP16, so both are typed by :mod:`qvdit.export.precision`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.helper

from qvdit.contract.bundle import TENSORRT_INT4_MODEL, TENSORRT_LAYERS, TENSORRT_MODEL
from qvdit.contract.layer import Layer, LowBitLayer, StaticInt8Layer
from qvdit.export.files import save_model
from qvdit.export.functions import DOMAIN
from qvdit.export.graph import (
    Fill,
    FullWeights,
    GraphEditor,
    check,
    drop_domain,
    fill,
    placeholder_name,
    plain_fills,
    static_int8,
)
from qvdit.export.headwise_attention import with_attention
from qvdit.export.layers import layers_model, static_layers_model
from qvdit.export.opset import TENSORRT_OPSET, lowered
from qvdit.export.plugin import plugin_model
from qvdit.export.precision import LowType, strongly_typed
from qvdit.export.prologue import with_prologues
from qvdit.export.residual import with_residuals
from qvdit.export.weight_only import WEIGHT_ONLY_OPSET, weight_only_model


@dataclass(frozen=True)
class TracedModel:
    """A transformer's graph, and what fills and types it."""

    graph: Path  # one placeholder a linear
    layers: tuple[Layer, ...]
    full_weights: dict[str, FullWeights]  # of the linears that stay in full precision (others are ignored)
    largest: dict[str, float]  # magnitude of each value in full precision, as measured


def export_tensorrt(
    model: TracedModel,
    bundle: Path,
    low: LowType = "float16",
    also_low: Collection[str] = (),
    own_attention: bool = True,
) -> list[Path]:
    """Write ``tensorrt/model.onnx``, checked in full, and ``tensorrt/layers.onnx``; returns their files.

    low: bfloat16 needs TensorRT 10. also_low: operators in the low type that are float32 otherwise. own_attention: by
    the plugin, where it has layers. Layers that the plugin does not compute raise QvditError, and nothing is written.
    """
    made = tensorrt_model(model, low, also_low=also_low, own_attention=own_attention)
    files = save_model(made, bundle / TENSORRT_MODEL)
    check(str(bundle / TENSORRT_MODEL))
    return [*files, *_export_layers(model.layers, bundle)]


def export_weight_only(model: TracedModel, bundle: Path, low: LowType = "float16") -> list[Path]:
    """Write ``tensorrt/model.int4.onnx``, for TensorRT 10 and later, checked in full; returns its files.

    Layers that do not fit raise QvditError, and nothing is written.
    """
    typed, kept = _typed(model, low)
    files = save_model(
        weight_only_model(lowered(typed, WEIGHT_ONLY_OPSET), model.layers, kept), bundle / TENSORRT_INT4_MODEL
    )
    check(str(bundle / TENSORRT_INT4_MODEL))
    return files


def _export_layers(layers: Sequence[Layer], bundle: Path) -> list[Path]:
    static = [layer for layer in layers if isinstance(layer, StaticInt8Layer)]
    if len(static) == len(layers):
        return save_model(static_layers_model(static, TENSORRT_OPSET), bundle / TENSORRT_LAYERS)
    written = onnx.load(bundle / TENSORRT_MODEL, load_external_data=False)
    return save_model(layers_model(written), bundle / TENSORRT_LAYERS)


def tensorrt_model(
    model: TracedModel,
    low: LowType = "float16",
    merge: bool = True,
    also_low: Collection[str] = (),
    own_attention: bool = True,
) -> onnx.ModelProto:
    """The model for TensorRT; merge: one plugin node for queries, keys and values where they allow it."""
    static = [layer for layer in model.layers if isinstance(layer, StaticInt8Layer)]
    typed, kept = _typed(model, low, also_low)
    if len(static) == len(model.layers):
        return static_model(lowered(typed), static, kept)
    low_bit = [layer.name for layer in model.layers if isinstance(layer, LowBitLayer)]
    typed = with_prologues(typed, low_bit)
    typed = with_attention(typed, model.largest) if own_attention else typed
    typed = with_residuals(typed)
    return plugin_model(lowered(typed), model.layers, kept, merge)


def _typed(
    model: TracedModel, low: LowType, also_low: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, FullWeights]]:
    """The strongly typed graph at the trace's opset, and the weights of the linears that stay in full precision."""
    quantized = {layer.name: layer for layer in model.layers}
    kept = {name: weights for name, weights in model.full_weights.items() if name not in quantized}
    widths = {name: layer.shape for name, layer in quantized.items()}
    widths |= {name: (weight.shape[0], weight.shape[1]) for name, (weight, _) in kept.items()}
    static = [layer.name for layer in model.layers if isinstance(layer, StaticInt8Layer)]
    return strongly_typed(onnx.load(model.graph), widths, low, model.largest, static, also_low=also_low), kept


def static_model(
    typed: onnx.ModelProto, layers: Sequence[StaticInt8Layer], kept: dict[str, FullWeights]
) -> onnx.ModelProto:
    """A strongly typed graph with Q/DQ in the placeholders, float32 inside and cast to their output's type."""
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    outputs = {placeholder_name(node): node.output[0] for node in typed.graph.node if node.domain == DOMAIN}
    fills = {
        layer.name: _cast_after(static_int8(layer, "qdq", float_weights=True), types[outputs[layer.name]])
        for layer in layers
    }
    model = fill(typed, fills | plain_fills(typed, kept))
    drop_domain(model)
    return model


def _cast_after(inner: Fill, kind: int) -> Fill:
    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        (y,) = node.output
        node.output[0] = f"{y}:exact"
        return [*inner(node, editor), onnx.helper.make_node("Cast", [f"{y}:exact"], [y], to=kind)]

    return build
