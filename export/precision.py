"""A strongly typed graph: float32 as traced in, every float tensor's type decided and every change of type a Cast out.

The rules, by operator:

- LowBitLinear and products of two computed values read and write the low type (FP16, or BF16 where ONNX has it), and
  so does a softmax of what they wrote: the next product would round its output all the same. Not beside static INT8
  layers: TensorRT 8.6 then rounds more than that, to 1.2 times the error of PyTorch's FP16 run on a Latte of XL size;
- other products by weights, the patch embedding's and the last projection's, are computed in float32 and give the low
  type: they have few operations, and TensorRT 8.6 adds FP16's up in FP16, which made a patch embedding's error 6e-4 to
  1.2e-3 where rounding makes 2e-4. What they give is not float32, because then TensorRT 8.6 normalizes CogVideoX's text
  tokens wrongly (small random models were off by 2.5e-3). Not those that only move values and change signs, as rotary
  embeddings do: nothing is added up there;
- data movement and plain arithmetic take the widest type they are given, constants aside, as PyTorch promotes;
- everything else (normalisation and its reductions, activations, sines) is float32;
- what comes of the time step alone is float32, products included: it has few rows, and steers every token;
- whatever reads or writes a value that the low type cannot hold is float32, as a run of the full-precision
  model measured it.

Modulation and residuals are float32 by these rules, because a float32 gate or norm takes part in them. Measured on the
shipped models in full precision (the input of their parity files, every FP16 value rounded, products summed up in
float32) against float32: wan-shapes 5.4e-3, latte-shapes 7.6e-3, and 8.0e-3 and 2.3e-2 with the time step's branch in
FP16; PyTorch's .half() 6.6e-3 and 2.3e-2.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
from onnx import TensorProto

from qvdit.export.functions import DOMAIN, NODE
from qvdit.export.graph import placeholder_name
from qvdit.export.opset import TENSORRT_OPSET

LowType = Literal["float16", "bfloat16"]

FLOAT = TensorProto.FLOAT
_TENSOR_TYPE = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_NUMPY_TYPE: dict[int, np.dtype] = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# Three bits of headroom below 65504: other prompts and steps than the measured ones reach further.
LARGEST: dict[int, float] = {TensorProto.FLOAT16: 8192.0, TensorProto.BFLOAT16: 1e38}

_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", NODE}
_MOVES = {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice"}
_MOVES |= {"Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
_ATTENTION = {"Softmax"}
_ARITHMETIC = {"Abs", "Add", "Max", "Min", "Mul", "Neg", "Relu", "Sub"}


def strongly_typed(
    traced: onnx.ModelProto,
    widths: Mapping[str, tuple[int, int]],
    low: LowType = "float16",
    largest: Mapping[str, float] | None = None,
    static: Collection[str] = (),
    exact_inputs: Collection[str] = ("timestep",),
    also_low: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy of a traced graph with Casts; placeholders stay, graph inputs and outputs stay float32.

    widths: (N, K) of each placeholder's layer. largest: the largest magnitude of each value. static: layers whose
    placeholders read float32, because QuantizeLinear of opset 17 does. exact_inputs: inputs whose own branch is
    float32. also_low: operators that are of the low type after all where they read nothing wider. Every value's type,
    and its shape as far as it is known, is in ``value_info``.
    """
    typer = _Typer(traced, _TENSOR_TYPE[low], largest or {}, static, exact_inputs)
    typer.follows |= set(also_low)
    typer.infer(widths)
    return typer.run()


class _Typer:
    def __init__(
        self,
        traced: onnx.ModelProto,
        low: int,
        largest: Mapping[str, float],
        static: Collection[str],
        exact_inputs: Collection[str],
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(traced)
        self.graph = self.model.graph
        self.low, self.largest = low, largest
        self.follows = _MOVES | _ARITHMETIC | (frozenset() if static else _ATTENTION)
        self.static, self.exact_inputs = frozenset(static), frozenset(exact_inputs)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.shapes: dict[str, onnx.TypeProto] = {}
        self.decided: dict[str, int] = {}  # float value → its type; constants are not in it
        self.sources: dict[str, frozenset[str]] = {}  # float value → the graph inputs it comes of
        self.nodes: list[onnx.NodeProto] = []
        self.copies: dict[tuple[str, int], str] = {}  # a value in another type

    def infer(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Types and shapes of all values, with a MatMul in every placeholder; weights are not needed for that."""
        proxy = onnx.ModelProto()
        proxy.CopyFrom(self.model)
        for node in proxy.graph.node:
            if node.domain == DOMAIN:
                n, k = widths[placeholder_name(node)]
                weight = f"{node.output[0]}:proxy"
                proxy.graph.input.append(onnx.helper.make_tensor_value_info(weight, FLOAT, [k, n]))
                node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], weight], list(node.output)))
        # Of large constants the shape is enough, and protobuf ends at 2 GiB.
        held = list(proxy.graph.initializer)
        del proxy.graph.initializer[:]
        for tensor in held:
            if len(tensor.raw_data) > 1024:
                shaped = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                proxy.graph.input.append(shaped)
            else:
                proxy.graph.initializer.append(tensor)
        inferred = onnx.shape_inference.infer_shapes(proxy, strict_mode=True).graph
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            self.shapes[value.name] = value.type

    def run(self) -> onnx.ModelProto:
        for value in self.graph.input:
            if self.is_float(value.name):
                self.decided[value.name], self.sources[value.name] = FLOAT, frozenset([value.name])
        for node in self.graph.node:
            self.place(node)
        for value in self.graph.output:
            self.restore_output(value.name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self.finish()
        return self.model

    def is_float(self, name: str) -> bool:
        if name in self.constants:
            return self.constants[name].data_type == FLOAT
        return name in self.shapes and self.shapes[name].tensor_type.elem_type == FLOAT

    def place(self, node: onnx.NodeProto) -> None:
        """Append a node, its inputs in the type that it is to have."""
        floats = [name for name in node.input if self.is_float(name)]
        values = [name for name in floats if name not in self.constants]
        sources = frozenset().union(*(self.sources[name] for name in values))
        kind = self.choose(node, floats, values, sources)
        exact = node.domain == DOMAIN and placeholder_name(node) in self.static
        by_weights = self.is_by_weights(node, floats)
        for index, name in enumerate(node.input):
            if name in floats:
                node.input[index] = self.read(name, FLOAT if exact or by_weights else kind)
        written = [name for name in node.output if self.is_float(name)]
        for name in written:
            self.decided[name], self.sources[name] = kind, sources
        self.nodes.append(node)
        if by_weights and kind != FLOAT:
            (name,) = written
            node.output[0] = f"{name}:exact"
            self.shapes[node.output[0]], self.decided[node.output[0]] = self.shapes[name], FLOAT
            self.cast(node.output[0], name, kind)

    def is_by_weights(self, node: onnx.NodeProto, floats: list[str]) -> bool:
        """Whether a node is a product of a value and constants that is no layer's; what is added to it aside."""
        if node.op_type not in _PRODUCTS or node.domain == DOMAIN or self.is_signed_permutation(node):
            return False
        return any(not self.sources.get(name) for name in floats if name in node.input[:2])

    def is_signed_permutation(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a product by a constant matrix of 0, 1 and -1, in no column of it more than one not 0."""
        if node.op_type != "MatMul" or node.input[1] not in self.constants:
            return False
        matrix = onnx.numpy_helper.to_array(self.constants[node.input[1]])
        columns = np.count_nonzero(matrix, axis=0)
        return matrix.ndim == 2 and bool(np.all(columns <= 1) and np.isin(matrix, (-1, 0, 1)).all())

    def choose(self, node: onnx.NodeProto, floats: list[str], values: list[str], sources: frozenset[str]) -> int:
        touched = [*floats, *(name for name in node.output if self.is_float(name))]
        if any(self.magnitude(name) > LARGEST[self.low] for name in touched):
            return FLOAT
        if node.domain != DOMAIN and not _takes(node.op_type, self.low):
            return FLOAT
        if node.op_type in _PRODUCTS:
            return FLOAT if sources and sources <= self.exact_inputs else self.low
        follows = node.op_type in self.follows or len(touched) == len(floats)  # or it gives no floats
        if follows and values and all(self.decided[name] == self.low for name in values):
            return self.low
        return FLOAT

    def magnitude(self, name: str) -> float:
        if name not in self.constants:
            return self.largest.get(name, 0.0)
        value = np.abs(onnx.numpy_helper.to_array(self.constants[name]))
        return float(value[np.isfinite(value)].max(initial=0.0))  # an infinity (of a mask) is one in every type

    def read(self, name: str, kind: int) -> str:
        """The name under which a float value is there in a type; a constant is converted, not cast."""
        if kind == (FLOAT if name in self.constants else self.decided[name]):
            return name
        if (name, kind) not in self.copies:
            copy = f"{name}:{onnx.TensorProto.DataType.Name(kind).lower()}"
            self.copies[name, kind] = copy
            if name in self.constants:
                array = onnx.numpy_helper.to_array(self.constants[name]).astype(_NUMPY_TYPE[kind])
                self.graph.initializer.append(onnx.numpy_helper.from_array(array, copy))
            else:
                self.cast(name, copy, kind)
        return self.copies[name, kind]

    def cast(self, source: str, target: str, kind: int) -> None:
        name = f"{source} as {onnx.TensorProto.DataType.Name(kind).lower()}"
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], name, to=kind))
        self.shapes[target], self.decided[target] = self.shapes[source], kind

    def restore_output(self, name: str) -> None:
        """Give a graph output its float32 and its name, whatever type the node that writes it has."""
        if self.decided.get(name, FLOAT) == FLOAT:
            return
        inner = f"{name}:{onnx.TensorProto.DataType.Name(self.decided[name]).lower()}"
        self.shapes[inner], self.decided[inner] = self.shapes[name], self.decided[name]
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    if found == name:
                        names[index] = inner
        self.cast(inner, name, FLOAT)

    def finish(self) -> None:
        """Drop constants that nothing reads any more, and note what is known of the values."""
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        outputs = {value.name for value in self.graph.output}
        del self.graph.value_info[:]
        for name in (name for node in self.nodes for name in node.output if name in self.shapes):
            if name not in outputs:
                value = self.graph.value_info.add(name=name, type=self.shapes[name])
                value.type.tensor_type.elem_type = self.decided.get(name, value.type.tensor_type.elem_type)
                _forget_invented(value)


@functools.cache
def _takes(op_type: str, kind: int) -> bool:
    """Whether an operator of TensorRT's opset takes a type: Conv, for one, takes no BF16."""
    name = f"tensor({TensorProto.DataType.Name(kind).lower()})"
    try:
        return any(name in value.types for value in onnx.defs.get_schema(op_type, TENSORRT_OPSET).inputs)
    except onnx.defs.SchemaError:  # newer than that opset
        return False


def _forget_invented(value: onnx.ValueInfoProto) -> None:
    """Shape inference calls dimensions that it does not know unk__0, unk__1 …: leave them open."""
    for dimension in value.type.tensor_type.shape.dim:
        if dimension.dim_param.startswith("unk__"):
            dimension.Clear()


def with_peaks(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy of a float32 model that also gives every float value's largest magnitude: value → output, float32 [].

    Each is measured right after it is written: nodes run in their order, and a value is kept until its last reader.
    """
    measuring = onnx.ModelProto()
    measuring.CopyFrom(model)
    graph = measuring.graph
    typed = onnx.shape_inference.infer_shapes(model).graph
    values = (*typed.input, *typed.value_info, *typed.output)
    peaks = {v.name: f"{v.name}:peak" for v in values if v.type.tensor_type.elem_type == FLOAT}
    written = {name for node in graph.node for name in node.output}
    nodes = [node for name in peaks if name not in written for node in _peak(name, peaks[name])]
    for node in graph.node:
        nodes += [node, *(peak for name in node.output if name in peaks for peak in _peak(name, peaks[name]))]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.extend(onnx.helper.make_tensor_value_info(peak, FLOAT, []) for peak in peaks.values())
    return measuring, peaks


def _peak(name: str, peak: str) -> list[onnx.NodeProto]:
    magnitude = f"{name}:magnitude"
    return [
        onnx.helper.make_node("Abs", [name], [magnitude]),
        onnx.helper.make_node("ReduceMax", [magnitude], [peak], keepdims=0),
    ]
