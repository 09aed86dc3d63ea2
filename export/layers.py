"""``tensorrt/layers.onnx``: every layer of a TensorRT model beside the others, with its integers in view.

A device proves its engine by it. The nodes, their constants and their types are those of the model itself; what the
model keeps in ``model.onnx.data`` is read from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx.helper
from onnx import TensorProto

from qvdit.contract.layer import StaticInt8Layer, padded_size
from qvdit.export.functions import DOMAIN
from qvdit.export.graph import GraphEditor, is_layer, static_int8
from qvdit.export.plugin import TEST_OUTPUTS, Y_TYPES
from qvdit.export.prologue import Reading

_STORED = {True: "x_q", False: "x_q_less_128"}  # by act_symmetric: how the output says what it holds


def layers_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The layers' plugin nodes of a model, each with an input and five outputs of its own, which bear the node's name.

    ``NODE:x`` [B, L, K] of the type that the model gives ``y``, but FP16 where that is BF16, since the saved references
    are FP16-representable → ``NODE:y``, ``NODE:x_q`` (``NODE:x_q_less_128`` where activations are asymmetric),
    ``NODE:scale``, ``NODE:zero``, ``NODE:acc`` as :func:`qvdit.export.plugin.layer_model` describes them. A saved
    reference's x is what is quantized, so the nodes have no prologue here. Constants in external data stay there, so
    the file belongs beside the model's.
    """
    graph = onnx.GraphProto(name="layers")
    for node in model.graph.node:
        if is_layer(node):
            _add_node(graph, node)
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    return onnx.helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version, producer_name="qvdit"
    )


def _add_node(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    value, name = onnx.helper.make_tensor_value_info, node.name
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    k, n = given["in_features"], given["out_features"]
    x_type = TensorProto.FLOAT if Y_TYPES[given["y_type"]] == TensorProto.FLOAT else TensorProto.FLOAT16
    constants = node.input[len(Reading.of(node).inputs) :]
    plain = Reading((f"{name}:x",))
    leading = [f"{name}:batch", f"{name}:tokens"]
    kinds: dict[str, tuple[int, list[int]]] = {
        "y": (x_type, [n]),
        "x_q": (TensorProto.INT32, [padded_size((1, k)) // 4]),
        "scale": (TensorProto.FLOAT, []),
        "zero": (TensorProto.INT32, []),
        "acc": (TensorProto.INT32, [n]),
    }
    outputs = []
    for output in TEST_OUTPUTS:
        kind, columns = kinds[output]
        shown = _STORED[bool(given["act_symmetric"])] if output == "x_q" else output
        outputs.append(f"{name}:{shown}")
        graph.output.append(value(outputs[-1], kind, [*leading, *columns]))
    graph.input.append(value(f"{name}:x", x_type, [*leading, k]))
    given |= plain.attributes | {"y_type": Y_TYPES.index(x_type), "test_outputs": 1}
    graph.node.append(
        onnx.helper.make_node(
            node.op_type, [*plain.inputs, *constants], outputs, name, domain=DOMAIN, **dict(_texts(given))
        )
    )


def _texts(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in attributes.items():
        yield key, value.decode() if isinstance(value, bytes) else value


def static_layers_model(layers: Iterable[StaticInt8Layer], opset: int) -> onnx.ModelProto:
    """Static layers as the Q/DQ that the model holds: ``NAME:x`` float32 [B, L, K] → ``NAME:y`` float32 [B, L, N]."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.GraphProto(name="layers")
    editor = GraphEditor(graph)
    for layer in layers:
        n, k = layer.shape
        leading = [f"{layer.name}:batch", f"{layer.name}:tokens"]
        x, y = f"{layer.name}:x", f"{layer.name}:y"
        graph.input.append(value(x, TensorProto.FLOAT, [*leading, k]))
        graph.output.append(value(y, TensorProto.FLOAT, [*leading, n]))
        graph.node.extend(
            static_int8(layer, "qdq", float_weights=True)(onnx.helper.make_node("Placeholder", [x], [y]), editor)
        )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="qvdit")
