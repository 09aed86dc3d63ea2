"""Lowering to opset 17."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference
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
    assert (found.opset_import[0].version, found.ir_version) == (17, 8)
    assert "Gelu" not in {node.op_type for node in found.graph.node}
    names = [tensor.name for tensor in found.graph.initializer]
    assert len(names) == len(set(names))
    x = np.concatenate([np.linspace(-9, 9, 1001), [0, 1e4, -1e4, 1e15, -1e15]]).astype(np.float32)
    np.testing.assert_allclose(run(found, x), run(model, x), rtol=1e-5, atol=1e-6)


def test_cast_loses_what_opset_17_does_not_know() -> None:
    make = onnx.helper.make_node
    model = model_of(make("Cast", ["x"], ["h"], to=TensorProto.FLOAT16, saturate=1), make("Cast", ["h"], ["y"], to=1))
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(run(lowered(model), x), x)


def test_an_operator_with_no_way_there_is_refused() -> None:
    nodes = [onnx.helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)]
    with pytest.raises(QvditError, match=r"GroupNormalization of opset 21.*opset 17"):
        lowered(model_of(*nodes))


def constant(name: str, values: list[int]) -> onnx.NodeProto:
    return onnx.helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def graph_of(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shapes: tuple[list, list]) -> Any:
    """x of one shape, float32, to y of another."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, shapes[0])], [value("y", TensorProto.FLOAT, shapes[1])], constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("bounds", [{"start": 1}, {"end": 2}, {"start": -2, "end": -1}, {"start": 0}, {}], ids=str)
def test_a_part_of_a_shape_is_a_slice(bounds: dict[str, int]) -> None:
    """TensorRT 8.6 gives all of a shape, whatever start and end say."""
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["x"], ["s"], **bounds),
        make("Cast", ["s"], ["f"], to=1),
        make("ReduceSum", ["f"], ["y"], keepdims=0),
    ]
    model = graph_of(nodes, [], (["a", "b", "c"], []))
    found = lowered(model)
    assert not [node for node in found.graph.node if node.op_type == "Shape" and node.attribute]
    assert len(found.graph.node) == 3 + (bounds not in ({}, {"start": 0}))
    x = np.zeros((2, 3, 5), np.float32)
    assert run(found, x) == run(model, x)


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("axes", [[-1], [0, 2], None], ids=str)
def test_axes_of_a_reduction_are_an_attribute(kind: str, axes: list[int] | None) -> None:
    """TensorRT 8.6 reduces over all axes where they are an input."""
    inputs = ["x", *(["axes"] if axes else [])]
    constants = [constant("axes", axes)] if axes else []
    shape = [3, 4, 5] if axes is None else [n for i, n in enumerate([3, 4, 5]) if i not in axes and i - 3 not in axes]
    nodes = [onnx.helper.make_node(kind, inputs, ["y"], keepdims=0)]
    model = graph_of(nodes, constants, ([3, 4, 5], [] if axes is None else shape))
    found = lowered(model)
    assert [len(node.input) for node in found.graph.node] == [1]
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(run(found, x), run(model, x))


def test_axes_that_are_computed_are_refused() -> None:
    make = onnx.helper.make_node
    nodes = [make("Shape", ["x"], ["axes"], start=0, end=1), make("ReduceMean", ["x", "axes"], ["y"])]
    with pytest.raises(QvditError, match="over computed axes"):
        lowered(graph_of(nodes, [], (["a", 2], None)))


@pytest.mark.parametrize("size", [6, 5])
def test_a_split_has_its_sizes(size: int) -> None:
    nodes = [
        onnx.helper.make_node("Split", ["x"], ["a", "b", "c"], axis=-1, num_outputs=3),
        onnx.helper.make_node("Concat", ["c", "b", "a"], ["y"], axis=1),
    ]
    model = graph_of(nodes, [], ([2, size], [2, size]))
    x = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    np.testing.assert_array_equal(run(lowered(model), x), run(model, x))


def test_a_split_of_a_size_that_varies_is_refused() -> None:
    nodes = [onnx.helper.make_node("Split", ["x"], ["y", "b"], axis=0, num_outputs=2)]
    with pytest.raises(QvditError, match="a Split of a size that varies"):
        lowered(graph_of(nodes, [], (["n"], None)))


@pytest.mark.parametrize(
    ("equation", "kind"), [("abc->cab", "Transpose"), ("a b c -> b a c", "Transpose"), ("abc->ab", "Einsum")]
)
def test_an_einsum_that_only_permutes_is_a_transpose(equation: str, kind: str) -> None:
    nodes = [onnx.helper.make_node("Einsum", ["x"], ["y"], equation=equation)]
    model = graph_of(nodes, [], ([2, 3, 4], None))
    found = lowered(model)
    assert [node.op_type for node in found.graph.node] == [kind]
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(found, x), run(model, x))
