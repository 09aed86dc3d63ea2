"""Strongly typed graphs: what is float32, what is not, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from onnx import TensorProto

from qvdit.contract import QvditError
from qvdit.contract.parity import relative_error
from qvdit.export import graph, plugin, precision
from qvdit.magnitudes import largest_values
from qvdit.models import ADAPTERS
from qvdit.runtimes.onnxruntime import session

FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
EXACT = {"LayerNormalization", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Gelu", "Sigmoid", "Sin", "Cos"}


def weights_of(model: Any) -> dict[str, graph.FullWeights]:
    adapter = next(a for a in ADAPTERS if a.class_name == type(model).__name__)
    found = {}
    for site in adapter.sites(model):
        linear = model.get_submodule(site.name)
        found[site.name] = (linear.weight.numpy(), None if linear.bias is None else linear.bias.numpy())
    return found


def widths_of(model: Any) -> dict[str, tuple[int, int]]:
    return {name: weight.shape for name, (weight, _) in weights_of(model).items()}


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every value and constant, as the graph itself says."""
    held = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in held}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def drop_domain(model: onnx.ModelProto) -> onnx.ModelProto:
    kept = [opset for opset in model.opset_import if not opset.domain]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


@pytest.fixture(params=["wan", "latte", "cogvideox"])
def case(request: pytest.FixtureRequest, example_inputs: Any) -> tuple[onnx.ModelProto, Any, dict[str, torch.Tensor]]:
    """A traced graph, its model and an example."""
    square = ((4, 4, 8, 8), 24)
    shapes = {"wan": ((3, 16, 32, 32), 64), "latte": square, "cogvideox": square}
    traced, model = (request.getfixturevalue(f"{kind}_{request.param}") for kind in ("traced", "tiny"))
    return traced, model, example_inputs(*shapes[request.param], seed=3)


@pytest.fixture
def tiny_wan(wan_model: Any) -> Any:
    return wan_model


@pytest.fixture
def tiny_latte(latte_model: Any) -> Any:
    return latte_model


@pytest.fixture
def tiny_cogvideox(cogvideox_model: Any) -> Any:
    return cogvideox_model


@pytest.mark.parametrize(("low", "kind"), [("float16", HALF), ("bfloat16", BFLOAT)])
def test_types_by_operator(case: Any, low: Any, kind: int) -> None:
    traced, model, _ = case
    before = traced.SerializeToString(deterministic=True)
    typed = precision.strongly_typed(traced, widths_of(model), low)
    assert traced.SerializeToString(deterministic=True) == before
    types = types_of(typed)
    floats = {FLOAT, kind}
    branch = {"timestep"}  # what comes of the time step alone
    constants = {tensor.name: tensor for tensor in typed.graph.initializer}
    for node in typed.graph.node:
        assert all(name in types for name in node.output), node.op_type
        read = {types[name] for name in node.input if name and types[name] in floats}
        if node.op_type != "Cast":
            assert len(read) <= 1, f"{node.op_type} of mixed types"
        if {name for name in node.input if types[name] in floats} - constants.keys() <= branch and read:
            branch |= set(node.output)
            assert read == {FLOAT}
        elif node.op_type in EXACT:
            assert read == {FLOAT}
        elif node.op_type in ("MatMul", "Gemm", "Conv", "LowBitLinear"):
            weights = [constants[name] for name in node.input if name in constants]
            moves = any((np.count_nonzero(onnx.numpy_helper.to_array(w), 0) <= 1).all() for w in weights)
            by_weights = node.op_type != "LowBitLinear" and weights and not moves
            assert read | {types[name] for name in node.output} == {FLOAT if by_weights else kind}
    assert {types[v.name] for v in (*typed.graph.input, *typed.graph.output)} == {FLOAT}
    assert [v.name for v in typed.graph.input] == [v.name for v in traced.graph.input]


def test_no_value_is_cast_twice(case: Any) -> None:
    traced, model, _ = case
    typed = precision.strongly_typed(traced, widths_of(model))
    casts = [(n.input[0], n.attribute[0].i) for n in typed.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts)) > 20
    used = {name for node in typed.graph.node for name in node.input}
    assert used >= {tensor.name for tensor in typed.graph.initializer}


def test_error_of_mixed_types(case: Any) -> None:
    """In full precision otherwise: far below what any quantization costs."""
    traced, model, inputs = case
    typed = precision.strongly_typed(traced, widths_of(model))
    filled = drop_domain(plugin.plugin_model(typed, (), weights_of(model)))
    onnx.checker.check_model(filled, full_check=True)
    assert any(t.data_type == HALF for t in filled.graph.initializer)
    found = session(filled.SerializeToString(), 1).run(None, {k: v.numpy() for k, v in inputs.items()})[0]
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0].numpy()
    assert found.dtype == np.float32
    assert 1e-6 < relative_error(found, expected) < 1e-3


def test_an_operator_may_be_low_after_all(case: Any) -> None:
    traced, model, _ = case
    norms = {}
    for also_low in ((), ("LayerNormalization",)):
        typed = precision.strongly_typed(traced, widths_of(model), also_low=also_low)
        types = types_of(typed)
        norms[also_low] = {types[n.output[0]] for n in typed.graph.node if n.op_type == "LayerNormalization"}
    assert norms == {(): {FLOAT}, ("LayerNormalization",): {FLOAT, HALF}}


def test_attention_between_its_products_is_low(case: Any) -> None:
    traced, model, _ = case
    typed = precision.strongly_typed(traced, widths_of(model))
    types = types_of(typed)
    softmaxes = [node for node in typed.graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert {types[name] for node in softmaxes for name in (*node.input, *node.output)} == {HALF}


def test_what_would_overflow_is_float32(case: Any) -> None:
    traced, model, _ = case
    call = next(node for node in traced.graph.node if node.domain == "qvdit")
    for value in (call.input[0], call.output[0]):
        for size, expected in ((8000.0, HALF), (9000.0, FLOAT)):
            typed = precision.strongly_typed(traced, widths_of(model), largest={value: size})
            types = types_of(typed)
            calls = [node for node in typed.graph.node if node.domain == "qvdit"]
            found = calls[[graph.placeholder_name(n) for n in calls].index(graph.placeholder_name(call))]
            assert (types[found.input[0]], types[found.output[0]]) == (expected, expected)
    assert types_of(precision.strongly_typed(traced, widths_of(model), "bfloat16", {value: 9000.0}))[value] == BFLOAT


def test_static_layers_read_float32_and_write_the_low_type(case: Any) -> None:
    traced, model, _ = case
    widths = widths_of(model)
    typed = precision.strongly_typed(traced, widths, static=widths)
    types = types_of(typed)
    for node in typed.graph.node:
        if node.domain == "qvdit":
            assert (types[node.input[0]], types[node.output[0]]) == (FLOAT, HALF)
        if node.op_type == "Softmax":
            assert (types[node.input[0]], types[node.output[0]]) == (FLOAT, FLOAT)


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """x [2, 4] → y, both float32."""
    value = onnx.helper.make_tensor_value_info
    held = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    inside = onnx.helper.make_graph(nodes, "g", [value("x", FLOAT, [2, 4])], [value("y", FLOAT, None)], held)
    return onnx.helper.make_model(inside, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


SQUARE = (
    onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
    onnx.helper.make_node("MatMul", ["x", "t"], ["p"]),  # of two computed values: of the low type
)


def test_output_of_the_low_type_is_cast_back() -> None:
    nodes = [*SQUARE, onnx.helper.make_node("Neg", ["p"], ["y"]), onnx.helper.make_node("Add", ["y", "y"], ["unread"])]
    typed = precision.strongly_typed(model_of(nodes, {}), {})
    assert [node.op_type for node in typed.graph.node][-4:] == ["MatMul", "Neg", "Add", "Cast"]
    assert typed.graph.node[-1].output[0] == "y"
    x = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
    np.testing.assert_array_equal(session(typed.SerializeToString(), 1).run(["y"], {"x": x})[0], -x @ x.T)


def test_products_by_weights_are_computed_in_float32() -> None:
    make = onnx.helper.make_node
    nodes = [*SQUARE, make("Transpose", ["w"], ["v"]), make("MatMul", ["p", "v"], ["q"]), make("Neg", ["q"], ["y"])]
    typed = precision.strongly_typed(model_of(nodes, {"w": np.eye(2, dtype=np.float32)}), {})
    types = types_of(typed)
    found = {name: types[name] for name in ("p", "v", "q:exact", "q", "y:float16", "y")}
    assert found == {"p": HALF, "v": FLOAT, "q:exact": FLOAT, "q": HALF, "y:float16": HALF, "y": FLOAT}
    x = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
    np.testing.assert_array_equal(session(typed.SerializeToString(), 1).run(["y"], {"x": x})[0], -x @ x.T)


@pytest.mark.parametrize(
    ("matrix", "exact"),
    [([[0, -1], [1, 0]], False), ([[0, -1], [0, 0]], False), ([[1, 1], [1, 0]], True), ([[2, 0], [0, 1]], True)],
)
def test_products_that_move_values_and_change_signs_are_of_the_low_type(matrix: list[list[int]], exact: bool) -> None:
    nodes = [*SQUARE, onnx.helper.make_node("MatMul", ["p", "w"], ["q"]), onnx.helper.make_node("Neg", ["q"], ["y"])]
    types = types_of(precision.strongly_typed(model_of(nodes, {"w": np.array(matrix, np.float32)}), {}))
    assert types["q"] == HALF
    assert ("q:exact" in types) == exact


def test_products_by_weights_may_be_the_output() -> None:
    nodes = [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    constants = {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}
    typed = precision.strongly_typed(model_of(nodes, constants), {})
    names = [node.name for node in typed.graph.node if node.name]
    assert len(names) == len(set(names))
    x = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
    np.testing.assert_array_equal(session(typed.SerializeToString(), 1).run(["y"], {"x": x})[0], x + 1)


def test_what_is_added_to_a_product_makes_no_weights() -> None:
    nodes = [onnx.helper.make_node("Gemm", ["x", "x", "b"], ["p"], transB=1)]
    nodes.append(onnx.helper.make_node("Neg", ["p"], ["y"]))
    types = types_of(precision.strongly_typed(model_of(nodes, {"b": np.ones(2, np.float32)}), {}))
    assert types["p"] == HALF
    assert "p:exact" not in types


@pytest.mark.parametrize(("largest", "kind"), [(1.0, HALF), (1e6, FLOAT)])
def test_constants_too_large_for_the_low_type(largest: float, kind: int) -> None:
    nodes = [*SQUARE, onnx.helper.make_node("Mul", ["p", "c"], ["y"])]
    typed = precision.strongly_typed(model_of(nodes, {"c": np.array([largest, -np.inf], np.float32)}), {})
    mul = next(node for node in typed.graph.node if node.op_type == "Mul")
    assert types_of(typed)[mul.input[1]] == kind


def test_integers_and_comparisons_are_left_alone() -> None:
    make = onnx.helper.make_node
    nodes = [
        *SQUARE,
        make("Shape", ["p"], ["shape"]),
        make("Slice", ["x", "zeros", "shape"], ["r"]),
        make("Less", ["p", "r"], ["mask"]),
        make("Where", ["mask", "p", "zero"], ["y"]),
    ]
    constants = {"zero": np.zeros((), np.float32), "zeros": np.zeros(2, np.int64)}
    typed = precision.strongly_typed(model_of(nodes, constants), {})
    types = types_of(typed)
    by_type = {node.op_type: node for node in typed.graph.node if node.op_type != "Cast"}
    assert types[by_type["Shape"].output[0]] == TensorProto.INT64
    assert {types[name] for name in by_type["Less"].input} == {FLOAT}  # the wider of the two
    assert types[by_type["Where"].input[2]] == HALF
    x = np.array([[1, -2, 3, -4], [0.5, 0, -1, 8]], np.float32)
    square = x @ x.T
    expected = np.where(square < x[:, :2], square, 0)
    np.testing.assert_array_equal(session(typed.SerializeToString(), 1).run(["y"], {"x": x})[0], expected)


def test_largest_values(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [make("MatMul", ["x", "w"], ["p"]), make("Neg", ["p"], ["y"]), make("Shape", ["p"], ["shape"])]
    path = tmp_path / "baseline.onnx"
    onnx.save(
        model_of(nodes, {"w": 2 * np.eye(4, dtype=np.float32)}),
        path,
        save_as_external_data=True,
        location="baseline.onnx.data",
        size_threshold=0,
    )
    x = np.array([[1, -7, 3, 0], [2, 2, 2, 2]], np.float32)
    assert largest_values(path, {"x": x}, 1) == {"x": 7.0, "p": 14.0, "y": 14.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baseline.onnx", "baseline.onnx.data"]


def test_a_model_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "baseline.onnx"
    onnx.save(model_of([onnx.helper.make_node("Log", ["x"], ["y"])], {}), path)
    with pytest.raises(QvditError, match="'y' is not finite"):
        largest_values(path, {"x": np.zeros((2, 4), np.float32)}, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["baseline.onnx"]


def test_magnitudes_are_measured_right_after_their_values_are_written():
    """Else every activation is kept until the last one is there."""
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(3)]
    ends = [value("v0", TensorProto.FLOAT, [2])], [value("v3", TensorProto.FLOAT, [2])]
    chain = onnx.helper.make_graph(nodes, "g", *ends)
    model = onnx.helper.make_model(chain, opset_imports=[onnx.helper.make_opsetid("", 21)])
    measuring, peaks = precision.with_peaks(model)
    assert set(peaks) == {"v0", "v1", "v2", "v3"}
    order = [node.output[0] for node in measuring.graph.node if node.op_type != "Abs"]
    assert order == ["v0:peak", "v1", "v1:peak", "v2", "v2:peak", "v3", "v3:peak"]
    onnx.checker.check_model(measuring)
