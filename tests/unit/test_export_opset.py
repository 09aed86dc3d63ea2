"""Lowering to opset 18."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import pytest
from onnx import TensorProto

from qvdit.contract import QvditError
from qvdit.export.opset import lowered
from qvdit.runtimes.onnxruntime import session


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    inside = onnx.helper.make_graph(
        list(nodes), "g", [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.FLOAT, ["n"])]
    )
    return onnx.helper.make_model(inside, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    return session(model.SerializeToString(), 1).run(None, {"x": x})[0]


@pytest.mark.parametrize("attributes", [{"approximate": "tanh"}, {"approximate": "none"}, {}], ids=str)
def test_gelu(attributes: dict[str, str]) -> None:
    make = onnx.helper.make_node
    model = model_of(make("Gelu", ["x"], ["h"], **attributes), make("Gelu", ["h"], ["y"], **attributes))
    before = model.SerializeToString()
    found = lowered(model)
    assert model.SerializeToString() == before
    assert (found.opset_import[0].version, found.ir_version) == (18, 8)
    assert "Gelu" not in {node.op_type for node in found.graph.node}
    names = [tensor.name for tensor in found.graph.initializer]
    assert len(names) == len(set(names))
    x = np.concatenate([np.linspace(-9, 9, 1001), [0, 1e4, -1e4, 1e15, -1e15]]).astype(np.float32)
    np.testing.assert_allclose(run(found, x), run(model, x), rtol=1e-5, atol=1e-6)


def test_cast_loses_what_opset_18_does_not_know() -> None:
    make = onnx.helper.make_node
    model = model_of(make("Cast", ["x"], ["h"], to=TensorProto.FLOAT16, saturate=1), make("Cast", ["h"], ["y"], to=1))
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(run(lowered(model), x), x)


def test_an_operator_with_no_way_there_is_refused() -> None:
    nodes = [onnx.helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)]
    with pytest.raises(QvditError, match=r"GroupNormalization of opset 21.*opset 18"):
        lowered(model_of(*nodes))
