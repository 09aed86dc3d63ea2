"""From the opset of the trace to opset 18, the newest that TensorRT 8.6 was seen to read.

ONNX's own version converter fails on Split and ReduceMean. The operators of a transformer have hardly changed since 18:
most took in more types, Gelu is new and is written out.
"""

from __future__ import annotations

import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.parser

from qvdit.contract import QvditError
from qvdit.export.functions import DOMAIN

TENSORRT_OPSET = 18
_IR_VERSIONS = {18: 8, 21: 10}  # by opset

# Changed after 18, but only in the types they take or in what we do not use.
_SAME = {"Cast", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "Pad", "ReduceMax", "ReduceMin"}
_SAME |= {"Reshape", "Resize", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze"}
_NEW_ATTRIBUTES = {"Cast": "saturate"}  # for types of 8 bits, which we do not have

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
    """A copy of a model at opset 18, or 21 with Gelus as older parsers know them, too.

    Its Gelus must be float32. An operator with no way there raises QvditError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    version = next(opset for opset in result.opset_import if not opset.domain)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if node.op_type == "Gelu" and not node.domain:
            nodes += _gelu(node, result.graph)
        elif node.domain == DOMAIN or _since(node, version.version) <= opset or node.op_type in _SAME:
            if opset == TENSORRT_OPSET:
                kept = [a for a in node.attribute if a.name != _NEW_ATTRIBUTES.get(node.op_type)]
                del node.attribute[:]
                node.attribute.extend(kept)
            nodes.append(node)
        else:
            raise QvditError(
                f"a model with {node.op_type} of opset {version.version}",
                f"operators that opset {opset} has",
                "use --target onnxruntime",
            )
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    version.version, result.ir_version = opset, _IR_VERSIONS[opset]
    return result


def _since(node: onnx.NodeProto, opset: int) -> int:
    return onnx.defs.get_schema(node.op_type, opset, node.domain).since_version


def _gelu(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of one Gelu; its constants are shared by all of them."""
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
