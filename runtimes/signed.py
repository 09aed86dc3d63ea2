"""``LowBitLinear``'s integer body in int8 x int8, for ONNX Runtime's CUDA provider, whose MatMulInteger takes no uint8.

A bundle holds the body in uint8 x int8, several times as fast on x86. It is rewritten when the model is loaded: the
same file, the same weights, and ``x_q`` or ``x_from_zero``, and ``acc``, under the names they have. Everything unsigned
becomes itself less 128, which no product notices: x_q - z_x stays what it is.

What comes of a shape ONNX Runtime would work out on the CPU and copy to the GPU in every layer. So frame gains are
multiplied over whole frames, not looked up for every row; the column of zeros by which the exported body finds NaN, and
the one that makes its scales products, which are for the CPU's kernels, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.contract import QvditError

OFFSET = 128  # what the integers of this body are less than those of the unsigned one
_DOMAIN = "qvdit"


def signed_model(path: Path) -> onnx.ModelProto:
    """A model with signed bodies; weights that lie in a file beside it stay there. QvditError if it is no model."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own classes
        text = " ".join(str(error).split())
        raise QvditError(f"{path}, which onnx refuses ({text})", "a model", "export it again") from None
    sign(model)
    return model


def sign(model: onnx.ModelProto) -> None:
    """Rewrite the operator's functions in place."""
    for function in model.functions:
        if function.domain == _DOMAIN:
            nodes = list(_Signed().rewritten(function))
            del function.node[:]
            function.node.extend(_needed(nodes, set(function.output)))


class _Signed:
    """One body's nodes, one after the other. What is not named here is the same in both."""

    def __init__(self) -> None:
        self._bytes: set[str] = set()  # names of what was a uint8 constant
        self._rows: set[str] = set()  # names of what was cast to uint8
        self._offsets: set[str] = set()  # names of what is 128.0 throughout
        self._zeros: set[str] = set()  # names of what is 0 throughout
        self._gains: set[str] = set()  # names of each row's frame gain

    def rewritten(self, function: onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
        for node in function.node:
            change = getattr(self, f"_{node.op_type.lower()}", None)
            yield from [node] if change is None else change(node)

    def _constant(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if any(a.name == "value_float" and a.f == OFFSET for a in node.attribute):
            self._offsets.add(node.output[0])
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is None or value.data_type != TensorProto.UINT8:
            return [node]
        less = onnx.numpy_helper.to_array(value).astype("int16") - OFFSET
        self._bytes.add(node.output[0])
        if not less.any():
            self._zeros.add(node.output[0])
        return [
            onnx.helper.make_node("Constant", [], node.output, value=onnx.numpy_helper.from_array(less.astype("i1")))
        ]

    def _expand(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        for known in (self._zeros, self._offsets):
            if node.input[0] in known:
                known.add(node.output[0])
        return [node]

    def _matmul(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.input[1] != "zero_column":
            return [node]
        (out,) = node.output
        nothing = onnx.helper.make_node("Mul", [node.input[0], "zero"], [f"{out}_nothing"])
        return [nothing, onnx.helper.make_node("ReduceSum", [f"{out}_nothing", "last_axis"], [out], keepdims=1)]

    def _gather(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.input[0] == "frame_gain":
            self._gains.add(node.output[0])
        return [node]

    def _unsqueeze(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.input[0] in self._gains:
            self._gains.add(node.output[0])
        return [node]

    def _mul(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A factor [M, R] times its rows' gains, as [M / (T · P), T, P · R]: row m is of frame (m // P) mod T."""
        factor, gain = node.input
        if factor == "unit":
            return [onnx.helper.make_node("Identity", [gain], node.output)]
        if gain not in self._gains:
            return [node]
        (out,) = node.output
        make = onnx.helper.make_node
        return [
            make("Constant", [], [f"{out}_any"], value_ints=[-1]),
            make("Shape", [factor], [f"{out}_rank"], start=1),
            make("Mul", ["tokens_per_frame", f"{out}_rank"], [f"{out}_values"]),
            make("Shape", ["frame_gain"], [f"{out}_frames"]),
            make("Concat", [f"{out}_any", f"{out}_frames", f"{out}_values"], [f"{out}_by_frame"], axis=0),
            make("Reshape", [factor, f"{out}_by_frame"], [f"{out}_split"]),
            make("Unsqueeze", ["frame_gain", f"{out}_any"], [f"{out}_gain"]),
            make("Mul", [f"{out}_split", f"{out}_gain"], [f"{out}_scaled"]),
            make("Shape", [factor], [f"{out}_shape"]),
            make("Reshape", [f"{out}_scaled", f"{out}_shape"], [out]),
        ]

    def _cast(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if onnx.helper.get_node_attr_value(node, "to") != TensorProto.UINT8:
            return [node]
        (out,) = node.output
        self._rows.add(out)
        if node.input[0] in self._offsets:
            self._zeros.add(out)
        make = onnx.helper.make_node
        return [
            make("Constant", [], [f"{out}_offset"], value_float=float(OFFSET)),
            make("Sub", [node.input[0], f"{out}_offset"], [f"{out}_less"]),
            make("Cast", [f"{out}_less"], [out], to=TensorProto.INT8),
        ]

    def _min(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The CUDA provider has no Min of int8: one bound is Clip's, one for every row is compared in int32."""
        make, (out,) = onnx.helper.make_node, node.output
        if node.input[1] in self._rows:
            wide = [make("Cast", [name], [f"{out}_{i}"], to=TensorProto.INT32) for i, name in enumerate(node.input)]
            least = make("Min", [f"{out}_0", f"{out}_1"], [f"{out}_least"])
            return [*wide, least, make("Cast", [f"{out}_least"], [out], to=TensorProto.INT8)]
        if node.input[1] not in self._bytes:
            return [node]
        return [onnx.helper.make_node("Clip", [node.input[0], "", node.input[1]], node.output)]

    def _quantizelinear(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if len(node.input) < 3 or node.input[2] not in self._zeros:
            return [node]
        axis = onnx.helper.get_node_attr_value(node, "axis")
        return [
            onnx.helper.make_node(
                "QuantizeLinear", node.input[:2], node.output, axis=axis, output_dtype=TensorProto.INT8
            )
        ]

    def _dequantizelinear(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        if len(node.input) > 2 and node.input[2] in self._zeros:
            del node.input[2:]
        return [node]

    def _matmulinteger(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        x, weight, *zeros = node.input
        (out,) = node.output
        make = onnx.helper.make_node
        if len(zeros) < 2:
            return [make("MatMulInteger", [x, weight], [out])]
        # A zero point per output is a rank-1 term: the provider takes one for all. It sums int32 in float32, which is
        # exact up to 2^24 / 128 features.
        return [
            make("MatMulInteger", [x, weight], [f"{out}_raw"]),
            make("Constant", [], [f"{out}_axis"], value_ints=[-1]),
            make("Cast", [x], [f"{out}_x"], to=TensorProto.INT32),
            make("ReduceSum", [f"{out}_x", f"{out}_axis"], [f"{out}_sum"], keepdims=1),
            make("Cast", [zeros[1]], [f"{out}_zero"], to=TensorProto.INT32),
            make("Mul", [f"{out}_sum", f"{out}_zero"], [f"{out}_part"]),
            make("Sub", [f"{out}_raw", f"{out}_part"], [out]),
        ]


def _needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that some output needs, in order."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
