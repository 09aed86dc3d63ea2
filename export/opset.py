"""From the opset of the trace to opset 17, the newest that TensorRT 8.6 reads as it is meant.

Its parser takes files of opset 18 and means over all axes where ReduceMean's axes are an input, as they are since then.
It also overlooks Shape's ``start`` and ``end``, which are older: a Slice does their work here. ONNX's own version
converter fails on Split and ReduceMean. The operators of a transformer have hardly changed since 17: most took in more
types, Gelu is new and is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.parser

from qvdit.contract import QvditError
from qvdit.export.functions import DOMAIN

TENSORRT_OPSET = 17
_IR_VERSIONS = {17: 8, 21: 10}  # by opset

# Changed after 17, but only in the types they take.
_SAME = {"Cast", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "Reshape", "Size", "Squeeze"}
_SAME |= {"Transpose", "Unsqueeze"}
_NEW_ATTRIBUTES = {"Cast": "saturate"}  # for types of 8 bits, which we do not have
_REDUCTIONS = {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"}  # whose axes were an attribute; not ReduceSum's
_LAST = 2**31 - 1  # TensorRT's extents are of 32 bits

# The body that ONNX defines, float32. x3 overflows to an infinity of x's sign where tanh is 1 long since.
_GELU = {
    "tanh": """
        x2 = Mul (x, x)
        x3 = Mul (x2, x)
        cubic = Mul (x3, c_cubic)
        sum = Add (x, cubic)
        inner = Mul (sum, c_tanh)
        curve = Tanh (inner)
        raised = Add (curve, c_one)
        half = Mul (x, c_half)
        y = Mul (half, raised)""",
    "none": """
        inner = Mul (x, c_erf)
        curve = Erf (inner)
        raised = Add (curve, c_one)
        half = Mul (x, c_half)
        y = Mul (half, raised)""",
}
_CONSTANTS = {
    "c_cubic": 0.044715,
    "c_tanh": 0.7978845608028654,
    "c_erf": 0.7071067811865476,
    "c_one": 1.0,
    "c_half": 0.5,
}


def lowered(model: onnx.ModelProto, opset: int = TENSORRT_OPSET) -> onnx.ModelProto:
    """A copy of a model at opset 17, or at 21 with Gelus as older parsers know them, too.

    Its Gelus must be float32. An operator with no way there raises QvditError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    version = next(imported for imported in result.opset_import if not imported.domain)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if opset == TENSORRT_OPSET:
            nodes += _lowered(node, result.graph, version.version)
        elif node.op_type == "Gelu" and not node.domain:
            nodes += gelu(node, result.graph)
        elif node.domain == DOMAIN or _since(node, version.version) <= opset:
            nodes.append(node)
        else:
            raise _no_way(f"{node.op_type} of opset {version.version}", opset)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    version.version, result.ir_version = opset, _IR_VERSIONS[opset]
    return result


def _lowered(node: onnx.NodeProto, graph: onnx.GraphProto, opset: int) -> list[onnx.NodeProto]:
    """What takes a node's place; it may be the node itself, changed."""
    kind = "" if node.domain else node.op_type
    if kind in _OWN_WAYS:
        return _OWN_WAYS[kind](node, graph)
    if node.domain != DOMAIN and kind not in _SAME and _since(node, opset) > TENSORRT_OPSET:
        raise _no_way(f"{node.op_type} of opset {opset}")
    _drop_attributes(node, _NEW_ATTRIBUTES.get(kind, ""))
    return [node]


def _no_way(what: str, opset: int = TENSORRT_OPSET) -> QvditError:
    return QvditError(f"a model with {what}", f"operators that opset {opset} has", "use --target onnxruntime")


def _drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _given(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _integers(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    """A constant int64 [n] of a graph, made when it is first asked for; returns its name."""
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))
    return name


def _shape(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    given = _given(node)
    start, end = given.get("start", 0), given.get("end", _LAST)
    _drop_attributes(node, "start", "end")
    if (start, end) == (0, _LAST):
        return [node]
    part, whole = node.output[0], f"{node.output[0]}:whole"
    node.output[0] = whole
    bounds = [_integers(graph, f"shape:{bound}", [bound]) for bound in (start, end)]
    return [node, onnx.helper.make_node("Slice", [whole, *bounds], [part], f"{node.name}:part")]


def _reduction(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    given = _given(node)
    _drop_attributes(node, "noop_with_empty_axes")
    if len(node.input) < 2 or not node.input[1]:
        if given.get("noop_with_empty_axes"):
            raise _no_way(f"a {node.op_type} over no axes")
        del node.input[1:]
        return [node]
    axes = next((tensor for tensor in graph.initializer if tensor.name == node.input[1]), None)
    if axes is None:
        raise _no_way(f"a {node.op_type} over computed axes")
    del node.input[1:]
    node.attribute.append(onnx.helper.make_attribute("axes", onnx.numpy_helper.to_array(axes).tolist()))
    return [node]


def _split(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """With the parts' sizes as an input: that they are about equal is what only opset 18 can say."""
    given = _given(node)
    _drop_attributes(node, "num_outputs")
    if len(node.input) > 1:
        return [node]
    known = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    parts = [known.get(name, ()) for name in node.output]
    sizes = [dims[given.get("axis", 0)].dim_value if dims else 0 for dims in parts]
    if 0 in sizes:
        raise _no_way("a Split of a size that varies")
    node.input.append(_integers(graph, f"split:{','.join(map(str, sizes))}", sizes))
    return [node]


def _einsum(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """One that only permutes is a Transpose: what moves values must not look like what computes."""
    read, _, written = _given(node)["equation"].decode().replace(" ", "").partition("->")
    if (
        len(node.input) == 1
        and written
        and read.isalpha()
        and sorted(read) == sorted(written)
        and len(set(read)) == len(read)
    ):
        order = [read.index(axis) for axis in written]
        return [onnx.helper.make_node("Transpose", list(node.input), list(node.output), node.name, perm=order)]
    return [node]


def _since(node: onnx.NodeProto, opset: int) -> int:
    return onnx.defs.get_schema(node.op_type, opset, node.domain).since_version


def gelu(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of one Gelu in float32; its constants are added to the graph and shared by all of them."""
    kinds = [onnx.helper.get_attribute_value(a).decode() for a in node.attribute if a.name == "approximate"]
    body = _GELU[kinds[0] if kinds else "none"]
    text = f'<opset_import: ["": {TENSORRT_OPSET}], domain: "d">\nf (x) => (y) {{{body}\n}}'
    names = {"x": node.input[0], "y": node.output[0]}
    there = {tensor.name for tensor in graph.initializer}
    nodes = list(onnx.parser.parse_function(text).node)
    for inner in nodes:
        for values in (inner.input, inner.output):
            for index, name in enumerate(values):
                if name in _CONSTANTS and f"gelu:{name}" not in there:
                    constant = onnx.helper.make_tensor(f"gelu:{name}", onnx.TensorProto.FLOAT, [], [_CONSTANTS[name]])
                    graph.initializer.append(constant)
                    there.add(constant.name)
                shared = f"gelu:{name}" if name in _CONSTANTS else f"{node.output[0]}:{name}"
                values[index] = names.get(name, shared)
    return nodes


_OWN_WAYS: dict[str, Callable[[onnx.NodeProto, onnx.GraphProto], list[onnx.NodeProto]]] = {
    "Einsum": _einsum,
    "Gelu": gelu,
    "Shape": _shape,
    "Split": _split,
    **dict.fromkeys(_REDUCTIONS, _reduction),
}
