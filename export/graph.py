"""Filling the placeholders of a traced graph: LowBitLinear nodes, plain static Q/DQ, or the full-precision MatMul."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.contract import FrameRows, LowBitLayer, StaticInt8Layer
from qvdit.contract.layer import Layer
from qvdit.export.functions import ATTRIBUTES, DOMAIN, INPUTS, NODE, Body, Variant, function

Fill = Callable[[onnx.NodeProto, "GraphEditor"], list[onnx.NodeProto]]
"""Given a placeholder, the nodes that stand in its place; they read its input and write its output."""


FullWeights = tuple[np.ndarray, np.ndarray | None]
"""Weight [N, K] and bias [N] of a linear in full precision."""


class GraphEditor:
    """Initializers and nodes that a fill adds to a graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = graph
        self._shared: dict[tuple[tuple[int, ...], bytes], str] = {}  # by a constant's shape and bytes

    def constant(self, name: str, value: np.ndarray, data_type: int | None = None) -> str:
        """Add an initializer; ``data_type`` INT4 packs an int8 array two values a byte. Returns its name."""
        if data_type == TensorProto.INT4:
            value = value.astype(ml_dtypes.int4)
        tensor = onnx.numpy_helper.from_array(value, name)
        self.graph.initializer.append(tensor)
        return name

    def shared_constant(self, name: str, value: np.ndarray) -> str:
        """Add a float32 initializer, or return the name of one that is the same.

        ONNX Runtime finds that two nodes compute the same thing where they read the same constants, not where they read
        equal ones: linears that read one input and share its factors then transform and quantize it once.
        """
        key = value.shape, value.tobytes()
        if key not in self._shared:
            self._shared[key] = self.constant(name, value)
        return self._shared[key]

    def describe_like(self, name: str, like: str, features: int) -> None:
        """Note a value's type and shape: those of ``like``, if they are noted, with another last dimension."""
        for value in [value for value in self.graph.value_info if value.name == like]:
            described = self.graph.value_info.add(name=name, type=value.type)
            described.type.tensor_type.shape.dim[-1].dim_value = features


def fill(traced: onnx.ModelProto, fills: dict[str, Fill]) -> onnx.ModelProto:
    """A copy of the traced graph with every placeholder replaced by its layer's fill."""
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    editor = GraphEditor(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if is_layer(node):
            nodes += fills[placeholder_name(node)](node, editor)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def quantized_model(
    traced: onnx.ModelProto, layers: tuple[Layer, ...], body: Body, kept: dict[str, FullWeights] | None = None
) -> onnx.ModelProto:
    """The quantized model: LowBitLinear nodes with functions of the given body, or plain Q/DQ for static layers.

    kept: weights of the linears that stay in full precision.
    """
    if body == "qdq":
        layers = tuple(_with_zeros(layer) if isinstance(layer, LowBitLayer) else layer for layer in layers)
    fills = {
        layer.name: _low_bit(layer) if isinstance(layer, LowBitLayer) else static_int8(layer, body) for layer in layers
    }
    fills |= {name: plain(*weights) for name, weights in (kept or {}).items()}
    model = fill(traced, fills)
    variants = {Variant.of(layer): None for layer in layers if isinstance(layer, LowBitLayer)}
    model.functions.extend(function(variant, body) for variant in variants)
    if not variants:  # a static model has no node of ours
        drop_domain(model)
    return model


def _with_zeros(layer: LowBitLayer) -> LowBitLayer:
    """The layer with zero points that are 0, where its INT8 weights have none.

    On x86 without VNNI ONNX Runtime (1.31) makes such weights unsigned, gives those without zero points a single one,
    and then refuses that beside a scale for every output or group.
    """
    if layer.weight_zero is not None or weight_type(layer.weight_bits) != TensorProto.INT8:
        return layer
    return replace(layer, weight_zero=np.zeros(layer.weight_scale.shape, np.int8))


def baseline_model(traced: onnx.ModelProto, weights: dict[str, FullWeights]) -> onnx.ModelProto:
    """The full-precision model: a MatMul and an Add in every placeholder."""
    model = fill(traced, {name: plain(*arrays) for name, arrays in weights.items()})
    drop_domain(model)
    return model


def plain(weight: np.ndarray, bias: np.ndarray | None) -> Fill:
    """A linear in full precision, weight [N, K] and bias [N]: a MatMul and an Add."""

    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        out = node.output[0]
        transposed = editor.constant(f"{out}:weight", np.ascontiguousarray(weight.T))
        if bias is None:
            return [onnx.helper.make_node("MatMul", [node.input[0], transposed], [out])]
        added = editor.constant(f"{out}:bias", bias)
        return [
            onnx.helper.make_node("MatMul", [node.input[0], transposed], [f"{out}:product"]),
            onnx.helper.make_node("Add", [f"{out}:product", added], [out]),
        ]

    return build


def plain_fills(typed: onnx.ModelProto, weights: dict[str, FullWeights]) -> dict[str, Fill]:
    """:func:`plain` for placeholders whose outputs have types of their own: the weights get these types."""
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    fills = {}
    for node in typed.graph.node:
        if is_layer(node) and placeholder_name(node) in weights:
            weight, bias = weights[placeholder_name(node)]
            kind = onnx.helper.tensor_dtype_to_np_dtype(types[node.output[0]])
            fills[placeholder_name(node)] = plain(weight.astype(kind), None if bias is None else bias.astype(kind))
    return fills


def is_layer(node: onnx.NodeProto) -> bool:
    """Whether a node is a placeholder, or what a runtime's operator takes its place."""
    return bool(node.domain == DOMAIN and node.op_type == NODE)


def placeholder_name(node: onnx.NodeProto) -> str:
    """The layer that a placeholder of a traced graph stands for."""
    return onnx.helper.get_node_attr_value(node, "layer").decode()


def weight_type(bits: int) -> int:
    """ONNX has no 3- or 6-bit integers: 2, 3 and 4 bits travel as INT4, 6 and 8 as INT8."""
    return TensorProto.INT4 if bits <= 4 else TensorProto.INT8


def check(path: str) -> None:
    """onnx.checker's full check, shape inference included, of a file with its external data."""
    onnx.checker.check_model(path, full_check=True)


def drop_domain(model: onnx.ModelProto) -> None:
    """Take our domain out of a model that has no node of it."""
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _low_bit(layer: LowBitLayer) -> Fill:
    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        integers = weight_type(layer.weight_bits)
        held = {"x": node.input[0]}
        for name in INPUTS[1:-1]:
            value = getattr(layer, name)
            if value is not None:
                kind = integers if name in ("weight_q", "weight_zero") else None
                if value.dtype == np.float16:  # a stored half; the bodies compute in float32
                    value = value.astype(np.float32)
                named = f"{layer.name}:{name}"
                if name == "inv_smooth":
                    held[name] = editor.shared_constant(named, value)
                else:
                    held[name] = editor.constant(named, value, kind)
        before: list[onnx.NodeProto] = []
        if Variant.of(layer).frame_gain:
            held["tokens_per_frame"], before = tokens_per_frame(layer, node.input[0], editor)
        inputs = [held.get(name, "") for name in INPUTS]
        while not inputs[-1]:
            inputs.pop()
        values: dict[str, Any] = {name: int(getattr(layer, name)) for name in ATTRIBUTES}
        call = onnx.helper.make_node(
            NODE, inputs, list(node.output), layer.name, domain=DOMAIN, overload=Variant.of(layer).overload, **values
        )
        return [*before, call]

    return build


def tokens_per_frame(layer: LowBitLayer, x: str, editor: GraphEditor) -> tuple[str, list[onnx.NodeProto]]:
    """P of a layer's input [..., L, K] as a value of the graph, and the nodes that compute it."""
    assert layer.frame_gain is not None
    if layer.rows is FrameRows.TEMPORAL:
        return editor.constant(f"{layer.name}:tokens_per_frame", np.array([1], np.int64)), []
    length = f"{layer.name}:length"
    nodes = [onnx.helper.make_node("Shape", [x], [length], start=-2, end=-1)]
    if layer.rows is FrameRows.SPATIAL:
        return length, nodes
    frames = editor.constant(f"{layer.name}:frames", np.array([len(layer.frame_gain)], np.int64))
    per_frame = f"{layer.name}:tokens_per_frame"
    return per_frame, [*nodes, onnx.helper.make_node("Div", [length, frames], [per_frame])]


def static_int8(layer: StaticInt8Layer, body: Body, float_weights: bool = False) -> Fill:
    """A static layer as plain Q/DQ around a float32 MatMul.

    float_weights: weights are stored as what they stand for, and quantized in the graph, to the same integers: TensorRT
    8.6 reads INT8 constants and fails on them later.
    """
    # TensorRT wants signed activations and zero point 0; ONNX Runtime on x86 is eight times as fast with unsigned ones.
    zero_point = np.array(0, np.int8) if body == "qdq" else np.array(128, np.uint8)

    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        name, x, make = layer.name, node.input[0], onnx.helper.make_node
        nodes = []
        if layer.inv_smooth is not None:
            nodes.append(make("Mul", [x, editor.constant(f"{name}:inv_smooth", layer.inv_smooth)], [f"{name}:smooth"]))
            x = f"{name}:smooth"
        act_scale = editor.constant(f"{name}:act_scale", layer.act_scale)
        act_zero = editor.constant(f"{name}:act_zero", zero_point)
        # Stored [K, N], as a MatMul reads it: runtimes fuse Q/DQ with a MatMul, seldom across a Transpose.
        integers = np.ascontiguousarray(layer.weight_q.T)
        weight_scale = editor.constant(f"{name}:weight_scale", layer.weight_scale)
        weight_zero = editor.constant(f"{name}:weight_zero", np.zeros(len(layer.weight_scale), np.int8))
        if float_weights:
            exact = editor.constant(f"{name}:weight", integers.astype(np.float32) * layer.weight_scale)
            weight = f"{name}:weight_q"
            nodes.append(make("QuantizeLinear", [exact, weight_scale, weight_zero], [weight], axis=1))
        else:
            weight = editor.constant(f"{name}:weight_q", integers)
        out = node.output[0]
        product = out if layer.bias is None else f"{name}:product"
        nodes += [
            make("QuantizeLinear", [x, act_scale, act_zero], [f"{name}:x_q"]),
            make("DequantizeLinear", [f"{name}:x_q", act_scale, act_zero], [f"{name}:x_dq"]),
            make("DequantizeLinear", [weight, weight_scale, weight_zero], [f"{name}:weight_dq"], axis=1),
            make("MatMul", [f"{name}:x_dq", f"{name}:weight_dq"], [product]),
        ]
        if layer.bias is not None:
            nodes.append(make("Add", [product, editor.constant(f"{name}:bias", layer.bias)], [out]))
        return nodes

    return build
