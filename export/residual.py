"""A block's residual sum as the plugin's node, which passes over memory once where TensorRT does up to four times.

Between a layer's low type and the float32 residual stream TensorRT 8.6 casts, scales by the gate, adds, and, where a
block attends along frames and the next one along tokens, transposes; each reads and writes all of the stream. A step
between :func:`qvdit.export.precision.strongly_typed` and :func:`qvdit.export.opset.lowered`. Symbols: B batch, L rows
of K features, P and Q the two axes that a batch of rows is made of.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.export.functions import DOMAIN
from qvdit.export.graph import is_layer
from qvdit.export.headwise_attention import PLUGIN_VERSION
from qvdit.export.precision import LARGEST
from qvdit.export.values import Extent, Values, beside, drop_unread, fits

RESIDUAL = "GatedResidual"
_SWAP = [0, 2, 1, 3]  # [B, P, Q, K] ↔ [B, Q, P, K]


def with_residuals(typed: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a strongly typed graph with a node for every residual sum that the plugin computes; others stay.

    What is looked for: residual + float32(y), or residual + gate · float32(y), of a placeholder's y [B, L, K] of the
    low type, a float32 residual of that shape and a float32 gate [B, 1, K] or [1, 1, K], where nothing else reads what
    is between; and after it [B · P, Q, K] → [B · Q, P, K] by Reshape, Transpose and Reshape, with P and Q known.
    ``GatedResidual`` reads the residual, y and the gate. Its attribute ``swapped`` is P, or 0.
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    values = Values(model.graph)
    made: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if is_layer(node):
            made |= _sum_of(node.output[0], values)
    nodes = [made.get(node.output[0], node) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unread(model.graph)
    return model


def _sum_of(y: str, values: Values) -> dict[str, onnx.NodeProto]:
    """The node for what becomes of a placeholder's y, by the value that it writes; nothing where there is none."""
    cast = values.only_reader(y, "Cast")
    if cast is None or values.type(y) not in LARGEST or values.type(cast.output[0]) != TensorProto.FLOAT:
        return {}
    term, gate = cast.output[0], None
    product = values.only_reader(term, "Mul")
    if product is not None:
        gate, term = beside(product, term), product.output[0]
    total = values.only_reader(term, "Add")
    if total is None:
        return {}
    residual = beside(total, term)
    floats = [name for name in (residual, gate, total.output[0]) if name is not None]
    if any(values.type(name) != TensorProto.FLOAT for name in floats) or not _fit(y, residual, gate, values):
        return {}
    written, swapped = _swapped(total.output[0], y, values)
    attributes = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": "", "gated": int(gate is not None)}
    inputs = [residual, y, *([] if gate is None else [gate])]
    return {
        written: onnx.helper.make_node(
            RESIDUAL, inputs, [written], written, domain=DOMAIN, **attributes, swapped=swapped
        )
    }


def _fit(y: str, residual: str, gate: str | None, values: Values) -> bool:
    """Whether y [B, L, K], a residual and a gate belong together, as far as their extents are known."""
    shape, extents, others = values.shape(y), values.extents(y), values.extents(residual)
    if shape is None or extents is None or others is None or len(shape) != 3 or len(others) != 3 or not shape[2]:
        return False
    if not all(_same(*pair) for pair in zip(extents, others, strict=True)):
        return False
    return gate is None or fits(values.groups(gate, shape[2]), shape[0])


def _same(one: Extent, other: Extent) -> bool:
    """Whether two extents are one, as far as they are known; what a 1 is added to may be more."""
    if type(one) is type(other):  # two numbers, or two names: of different ones the engine would be refused
        return one == other
    return 1 not in (one, other)


def _swapped(total: str, y: str, values: Values) -> tuple[str, int]:
    """What a sum [B · P, Q, K] becomes by swapping P and Q, with P; itself and 0 where it does not, or not alone.

    Q and K are y's, which is what the node is written out of again.
    """
    apart = values.only_reader(total, "Reshape")
    transpose = None if apart is None else values.only_reader(apart.output[0], "Transpose")
    together = None if transpose is None else values.only_reader(transpose.output[0], "Reshape")
    if apart is None or transpose is None or together is None:
        return total, 0
    perm = next((list(a.ints) for a in transpose.attribute if a.name == "perm"), None)
    shape, axes, rows = (values.shape(name) for name in (y, apart.output[0], together.output[0]))
    if perm != _SWAP or shape is None or axes is None or rows is None or len(axes) != 4 or len(rows) != 3:
        return total, 0
    outer, inner, features = axes[1:]
    whole = 0 not in axes[1:] and [inner, features] == shape[1:] and rows[1:] == [outer, features]
    return (together.output[0], outer) if whole else (total, 0)


# Back again -----------------------------------------------------------------------------------------------------------


def residual_written_out(
    node: onnx.NodeProto, rows: int, features: int, graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """A node as nodes of opset 17. rows and features: L and K. Constants are added to the graph."""
    make, (y,) = onnx.helper.make_node, node.output
    residual, x, *gate = node.input
    swapped = next(a.i for a in node.attribute if a.name == "swapped")
    exact, scaled, total = f"{y}:x", f"{y}:scaled", f"{y}:sum" if swapped else y
    nodes = [make("Cast", [x], [exact], to=TensorProto.FLOAT)]
    if gate:
        nodes.append(make("Mul", [exact, *gate], [scaled]))
    nodes.append(make("Add", [residual, scaled if gate else exact], [total]))
    if not swapped:
        return nodes
    shapes = {"apart": [-1, swapped, rows, features], "together": [-1, swapped, features]}
    for name, shape in shapes.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), f"{y}:{name}"))
    return [
        *nodes,
        make("Reshape", [total, f"{y}:apart"], [f"{y}:axes"]),
        make("Transpose", [f"{y}:axes"], [f"{y}:transposed"], perm=_SWAP),
        make("Reshape", [f"{y}:transposed", f"{y}:together"], [y]),
    ]
