"""Single layers cut out of an exported model, with their integers in view: what a parity check runs.

Nothing is built anew: nodes, function bodies and weights are those of the file that the whole model runs from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.utils

from qvdit.contract import QvditError
from qvdit.contract.parity import LayerOutputs
from qvdit.runtimes.onnxruntime import session
from qvdit.runtimes.signed import OFFSET, sign

_DOMAIN = "qvdit"


class LayerModels:
    """The quantized layers of an exported model, by name."""

    def __init__(self, path: Path, threads: int | None = None, device: str = "cpu"):
        model = onnx.load(path)
        if device != "cpu":
            sign(model)
        self._threads, self._device = threads, device
        self._graph = model.graph
        self._opsets, self._ir_version = list(model.opset_import), model.ir_version
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._calls = {node.name: node for node in model.graph.node if node.domain == _DOMAIN}
        self._static = {
            node.output[0].removesuffix(":x_q"): node
            for node in model.graph.node
            if node.op_type == "QuantizeLinear" and node.output[0].endswith(":x_q")
        }

    def run(self, name: str, x: np.ndarray, tokens_per_frame: int) -> LayerOutputs:
        """Run one layer on its input, float32 [..., K]."""
        if name in self._static:
            return self._run_static(name, x)
        call = self._calls.get(name)
        if call is None:
            raise QvditError(f"layer {name}", "a layer of this model", "export the model again")
        function = self._functions[call.domain, call.op_type, call.overload]
        from_zero = any("x_from_zero" in node.output for node in function.node)
        outputs = ["y", "acc", *(["x_from_zero", "z_float"] if from_zero else ["x_q"])]
        symmetric = onnx.helper.get_node_attr_value(call, "act_symmetric")
        feed = {"x": x}
        model = self._cut_call(call, outputs)
        if any(value.name == "tokens_per_frame" for value in model.graph.input):
            feed["tokens_per_frame"] = np.array([tokens_per_frame], np.int64)
        y, acc, x_q, *zero = self._run(model, outputs, feed)
        added = (OFFSET if x_q.dtype == np.int8 else 0) - (OFFSET if symmetric or from_zero else 0)
        integers = x_q.astype(np.int32) + added
        if from_zero:  # x_q - z_x
            integers += zero[0].astype(np.int32)
        return LayerOutputs(integers, acc.astype(np.int64), y)

    def _run(self, model: onnx.ModelProto, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return session(model.SerializeToString(), self._threads, self._device).run(outputs, feed)

    def _cut_call(self, call: onnx.NodeProto, outputs: list[str]) -> onnx.ModelProto:
        """A call of the function as a model of its own: the body, with the call's weights under the formal names."""
        function = self._functions[call.domain, call.op_type, call.overload]
        make = onnx.helper.make_tensor_value_info
        inputs, initializers = [make("x", onnx.TensorProto.FLOAT, None)], []
        for formal, actual in zip(function.input, call.input, strict=False):
            if actual in self._initializers:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(self._initializers[actual])
                tensor.name = formal
                initializers.append(tensor)
            elif formal == "tokens_per_frame" and actual:
                inputs.append(make(formal, onnx.TensorProto.INT64, [1]))
        values = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]  # the body says their types
        graph = onnx.helper.make_graph(list(function.node), call.name, inputs, values, initializers)
        return onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)

    def _run_static(self, name: str, x: np.ndarray) -> LayerOutputs:
        nodes = [n for n in self._graph.node if any(o.startswith(f"{name}:") for o in n.output)]
        inner = {output for node in nodes for output in node.output}
        nodes += [n for n in self._graph.node if n not in nodes and inner.intersection(n.input)]
        start = next(i for n in nodes for i in n.input if i not in inner and i not in self._initializers)
        end, x_q = nodes[-1].output[0], f"{name}:x_q"
        used = {i for node in nodes for i in node.input}
        make = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            nodes,
            name,
            [make(start, onnx.TensorProto.FLOAT, None)],
            [make(end, onnx.TensorProto.FLOAT, None), make(x_q, onnx.TensorProto.UINT8, None)],
            [tensor for key, tensor in self._initializers.items() if key in used],
        )
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        y, integers = self._run(model, [end, x_q], {start: x})
        return LayerOutputs(integers.reshape(-1, x.shape[-1]).astype(np.int32) - OFFSET, None, y)
