"""What the plugin computes of x while it quantizes it, taken out of the graph and put into the placeholders.

TensorRT would write such a value in float32, cast it and move it before the plugin reads it; the kernels compute it in
registers. A step between :func:`qvdit.export.precision.strongly_typed` and :func:`qvdit.export.opset.lowered`, which
knows no Gelu any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx
import onnx.helper
from onnx import TensorProto

from qvdit.contract.kernels import Prologue
from qvdit.export.functions import DOMAIN
from qvdit.export.graph import placeholder_name
from qvdit.export.opset import gelu

_MARK = "prologue"  # a placeholder's attribute, absent where x is read as it is; the plugin's node always has it
_LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def with_prologues(typed: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """A copy of a strongly typed graph in which placeholders read what the plugin's prologue reads, and say which.

    layers: those that the plugin computes; no other placeholder is touched. GELU is the tanh approximation of a value
    of the low type that such layers alone read.
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    values = _Values(model.graph)
    for node in model.graph.node:
        if node.op_type == "Gelu" and not node.domain:
            _fuse_gelu(node, values, layers)
    _drop_unread(model.graph)
    return model


def prologue_of(node: onnx.NodeProto) -> Prologue:
    """The prologue of a placeholder, as :func:`with_prologues` marked it, or of the plugin's node."""
    return next((Prologue(a.i) for a in node.attribute if a.name == _MARK), Prologue.PLAIN)


def written_out(x: str, name: str, kind: int, graph: onnx.GraphProto) -> tuple[str, list[onnx.NodeProto]]:
    """GELU of x as nodes of opset 17, in float32 with Casts around it: the value's name, and the nodes.

    name: what the values' names begin with. kind: the type of x and of the result. Constants are added to the graph.
    """
    exact, curve, result = (f"{name}:prologue:{part}" for part in ("x", "gelu", "cast"))
    nodes = [
        onnx.helper.make_node("Cast", [x], [exact], to=TensorProto.FLOAT),
        *gelu(onnx.helper.make_node("Gelu", [exact], [curve], approximate="tanh"), graph),
        onnx.helper.make_node("Cast", [curve], [result], to=kind),
    ]
    return result, nodes


class _Values:
    """Who writes and who reads the values of a graph, and their types."""

    def __init__(self, graph: onnx.GraphProto):
        self.writer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        held = (*graph.input, *graph.value_info, *graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in held}

    def before_cast(self, name: str) -> str:
        """The value that a Cast made this one of, or itself."""
        writer = self.writer.get(name)
        return writer.input[0] if writer is not None and writer.op_type == "Cast" else name

    def placeholders(self, name: str, layers: Collection[str], kind: int | None = None) -> list[onnx.NodeProto]:
        """The placeholders that read a value, through a Cast or not, as ``kind``; none if anything else reads it."""
        found: list[onnx.NodeProto] = []
        casts = [node for node in self.readers.get(name, []) if node.op_type == "Cast"]
        for read in (name, *(cast.output[0] for cast in casts)):
            direct = [node for node in self.readers.get(read, []) if node not in casts]
            ours = all(node.domain == DOMAIN and placeholder_name(node) in layers for node in direct)
            if read in self.outputs or not ours or (direct and self.types[read] != kind):
                return []
            found += direct
        return found


def _fuse_gelu(node: onnx.NodeProto, values: _Values, layers: Collection[str]) -> None:
    x = values.before_cast(node.input[0])
    tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
    if not tanh or values.types.get(x) not in _LOW:
        return
    _mark(values.placeholders(node.output[0], layers, values.types[x]), x, Prologue.GELU)


def _mark(placeholders: Iterable[onnx.NodeProto], x: str, prologue: Prologue) -> None:
    for placeholder in placeholders:
        placeholder.input[0] = x
        placeholder.attribute.append(onnx.helper.make_attribute(_MARK, int(prologue)))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop the nodes, constants and descriptions of values that nothing reads any more."""
    read = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if read & set(node.output):
            nodes.append(node)
            read |= set(node.input)
    nodes.reverse()
    written = {name for node in nodes for name in node.output}
    described = [value for value in graph.value_info if value.name in written]
    held = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, kept in ((graph.node, nodes), (graph.value_info, described), (graph.initializer, held)):
        del field[:]
        field.extend(kept)
