"""``tensorrt/model.int4.onnx``: INT4 weights, activations in floating point; for TensorRT 10 and later, no plugin.

Those versions have kernels for a MatMul whose weight is a DequantizeLinear of INT4 (IDequantizeLayer in NvInfer.h, and
the ONNX parser, from 10.3 on): the weight is constant and 2-D, blocked along its input features; scales are positive
constants, in the type that the product has; zero points are zero. ONNX has INT4 and ``block_size`` since opset 21.
The model is not the one that the bundle's parity check proves: its layers are, with x in place of s_x (x_q - z_x).

Symbols: K input features, N output features, B features of a block, R rank, T frames, P tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
from onnx import TensorProto

from qvdit.contract import LowBitLayer, QvditError
from qvdit.contract.layer import Layer
from qvdit.export.functions import Variant
from qvdit.export.graph import Fill, FullWeights, GraphEditor, drop_domain, fill, plain_fills, tokens_per_frame

WEIGHT_ONLY_OPSET = 21  # the first with INT4 and blocks
BLOCKS = (128, 64)  # B, as NVIDIA's ModelOpt writes them; the larger one where it divides K
_SMALLEST: dict[int, float] = {TensorProto.FLOAT16: 2.0**-24}  # positive number


def weight_only_model(typed: onnx.ModelProto, layers: Sequence[Layer], kept: dict[str, FullWeights]) -> onnx.ModelProto:
    """A strongly typed graph of opset 21 with a MatMul of dequantized weights in each placeholder.

    kept: weights of the linears that stay in full precision. Layers that do not fit raise QvditError.
    """
    refuse_unfit({layer.name: unfit(layer) for layer in layers})
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    fills = {layer.name: _product(layer, types) for layer in layers if isinstance(layer, LowBitLayer)}
    model = fill(typed, fills | plain_fills(typed, kept))
    drop_domain(model)
    return model


def refuse_unfit(reasons: dict[str, str | None]) -> None:
    """Raise QvditError, naming the first, if a layer has no such form; reasons: by layer, None where it has one."""
    unfit = {name: reason for name, reason in reasons.items() if reason}
    if unfit:
        name, reason = next(iter(unfit.items()))
        raise QvditError(
            f"--weight-only with {len(unfit)} layers that TensorRT's INT4 weights cannot hold, as {name} ({reason})",
            "weights of 4 bits and fewer, symmetric, not rotated, in rows or groups of 64 or 128 features",
            "leave --weight-only out, or choose another recipe or --bits",
        )


def unfit(layer: Layer) -> str | None:
    """Why a layer has no weight-only form, or None."""
    if not isinstance(layer, LowBitLayer):
        return "static INT8"
    symmetric = layer.weight_zero is None
    return unfit_shape(layer.weight_bits, symmetric, layer.rotation, layer.shape[1], layer.group)


def unfit_shape(bits: int, symmetric: bool, rotation: int, k: int, group: int) -> str | None:
    """:func:`unfit` of a layer to be: weight bits, symmetric weights, B of its rotation, K, features of a scale."""
    if bits > 4:
        return f"{bits} bits"
    if not symmetric:
        return "zero points"
    if rotation:
        return f"a rotation of {rotation} features"
    if block_size(k, group) is None:
        return f"{k} input features" if group == k else f"groups of {group} features"
    return None


def block_size(k: int, group: int) -> int | None:
    """B: the layer's own groups, or where a row has one scale, blocks that divide it; None where neither fits."""
    if group < k:
        return group if group in BLOCKS else None
    return next((block for block in BLOCKS if k % block == 0), None)


def blocked_scale(layer: LowBitLayer) -> np.ndarray:
    """float32 [K/B, N]: a row's one scale stands for each of its blocks, which changes nothing."""
    n, k = layer.shape
    block = block_size(k, layer.group)
    assert block is not None
    return np.ascontiguousarray(np.broadcast_to(layer.weight_scale.reshape(n, -1), (n, k // block)).T)


def balanced(layer: LowBitLayer) -> tuple[np.ndarray, np.ndarray]:
    """TQE's vectors, float32 [K, R] and [R, N], with max |beta| = 1 in each row: FP16 then holds x · alpha.

    The factor is as large as the largest output that the term corrects, whose sum the low type holds.
    """
    assert layer.alpha is not None
    assert layer.beta is not None
    alpha, beta = layer.alpha.astype(np.float32), layer.beta.astype(np.float32)
    size = np.abs(beta).max(axis=1, keepdims=True)
    size[size == 0] = 1
    return alpha * size.T, beta / size


def _product(layer: LowBitLayer, types: dict[str, int]) -> Fill:
    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        x, (y,) = node.input[0], node.output
        return _Linear(layer, types[y], editor).nodes(x, y)

    return build


class _Linear:
    """The nodes of one layer, everything but the integers in the type of its output."""

    def __init__(self, layer: LowBitLayer, kind: int, editor: GraphEditor):
        self.layer, self.kind, self.editor = layer, kind, editor
        self.made: list[onnx.NodeProto] = []

    def nodes(self, x: str, y: str) -> list[onnx.NodeProto]:
        layer = self.layer
        if layer.inv_smooth is not None:
            x = self.node("Mul", [x, self.constant("inv_smooth", layer.inv_smooth)], "smooth")
        terms = [self.node("MatMul", [x, self.weight()], "product")]
        if layer.rank:
            terms.append(self.correction(x))
        if layer.bias is not None:
            terms.append(self.constant("bias", layer.bias))
        total = terms[0]
        for index, term in enumerate(terms[1:]):
            total = self.node("Add", [total, term], f"sum{index}")
        self.made[-1].output[0] = y  # the last one made is the total's
        return self.made

    def weight(self) -> str:
        """The weight as the product reads it, [K, N]."""
        layer, smallest = self.layer, _SMALLEST.get(self.kind, 0.0)
        integers = self.editor.constant(
            f"{layer.name}:weight_q", np.ascontiguousarray(layer.weight_q.T), TensorProto.INT4
        )
        scale = self.constant("weight_scale", np.maximum(blocked_scale(layer), smallest))
        return self.node(
            "DequantizeLinear", [integers, scale], "weight", axis=0, block_size=block_size(layer.shape[1], layer.group)
        )

    def correction(self, x: str) -> str:
        """TQE's term: gain · (x alpha) beta."""
        alpha, beta = balanced(self.layer)
        factor = self.node("MatMul", [x, self.constant("alpha", alpha)], "factor")
        if Variant.of(self.layer).frame_gain:
            factor = self.gained(x, factor)
        return self.node("MatMul", [factor, self.constant("beta", beta)], "side")

    def gained(self, x: str, factor: str) -> str:
        """The factor [..., R] times its row's gain: as [B, T, P · R], in which frames are a dimension."""
        gain = self.layer.frame_gain
        assert gain is not None
        per_frame, before = tokens_per_frame(self.layer, x, self.editor)
        self.made += before
        rank = self.integers("rank", self.layer.rank)
        values = self.node("Mul", [per_frame, rank], "values")
        by_frame = self.node("Concat", [self.integers("frames_first", -1, len(gain)), values], "by_frame", axis=0)
        split = self.node("Reshape", [factor, by_frame], "split")
        scaled = self.node("Mul", [split, self.constant("frame_gain", gain[:, None])], "scaled")
        whole = self.node("Shape", [factor], "whole")
        return self.node("Reshape", [scaled, whole], "gained")

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = f"{self.layer.name}:{name}"
        self.made.append(onnx.helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        typed = value.astype(onnx.helper.tensor_dtype_to_np_dtype(self.kind))
        return self.editor.constant(f"{self.layer.name}:{name}", typed)

    def integers(self, name: str, *values: int) -> str:
        return self.editor.constant(f"{self.layer.name}:{name}", np.array(values, np.int64))
