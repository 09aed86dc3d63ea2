"""What is known of the values of a graph, for the steps that look for patterns in one."""

from __future__ import annotations

import onnx
import onnx.numpy_helper
from onnx import TensorProto

Extent = int | str | None  # a number, a name of one that is not known before run time, or nothing


class Values:
    """Who writes and who reads the values of a graph, their types and shapes, and its constants."""

    def __init__(self, graph: onnx.GraphProto):
        self.writer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        held = (*graph.input, *graph.value_info, *graph.output)
        self.known = {value.name: value.type.tensor_type for value in held}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def type(self, name: str) -> int:
        """TensorProto's, UNDEFINED where it is not known."""
        return self.known[name].elem_type if name in self.known else TensorProto.UNDEFINED

    def shape(self, name: str) -> list[int] | None:
        """The extents, 0 for those that are not known; None where not even their number is."""
        if name not in self.known or not self.known[name].HasField("shape"):
            return None
        return [dimension.dim_value for dimension in self.known[name].shape.dim]

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        """As :meth:`shape`, with the names of extents that are not known; None for one that has none."""
        if name not in self.known or not self.known[name].HasField("shape"):
            return None
        dimensions = self.known[name].shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dimensions)

    def is_constant(self, name: str, value: float) -> bool:
        """Whether a value is a constant with this number in every place."""
        held = self.constants.get(name)
        return held is not None and bool((onnx.numpy_helper.to_array(held) == value).all())

    def groups(self, name: str, features: int) -> int | None:
        """G of a value [G, 1, K] with these K features, 0 where it is not known; None if it has another shape."""
        shape = self.shape(name)
        return shape[0] if shape is not None and len(shape) == 3 and shape[1:] == [1, features] else None

    def before_cast(self, name: str) -> str:
        """The value that a Cast made this one of, or itself."""
        writer = self.writer.get(name)
        return writer.input[0] if writer is not None and writer.op_type == "Cast" else name

    def only_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of that kind that alone reads a value, once."""
        readers = self.readers.get(name, [])
        if name in self.outputs or len(readers) != 1 or readers[0].domain or readers[0].op_type != op_type:
            return None
        return readers[0]


def beside(node: onnx.NodeProto, name: str) -> str:
    """What a node of two inputs reads beside a value that it reads once."""
    (other,) = (read for read in node.input if read != name)
    return other


def fits(groups: int | None, batch: int) -> bool:
    """Whether a gate or modulation of G groups is one for all of a value's batch B, or one for each; 0: not known.

    A value of one batch, or of another than the groups', would be broadcast itself. groups: :meth:`Values.groups`'.
    """
    if groups is None or groups == 1:
        return groups == 1
    return batch != 1 if groups == 0 else batch in (0, groups)


def drop_unread(graph: onnx.GraphProto) -> None:
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
