"""Prologues: what the plugin's nodes take over of a graph, what they leave alone, and that it is the same model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest
from onnx import TensorProto
from test_export_plugin import in_onnxruntime

from qvdit.contract import LowBitLayer
from qvdit.contract.kernels import Prologue
from qvdit.export import plugin
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE
from qvdit.export.graph import placeholder_name
from qvdit.export.layers import layers_model
from qvdit.export.opset import lowered
from qvdit.export.precision import LowType, strongly_typed
from qvdit.export.prologue import Reading, with_prologues

HALF = TensorProto.FLOAT16
K = 32


def call(x: str, y: str, layer: str) -> onnx.NodeProto:
    return onnx.helper.make_node(NODE, [x], [y], domain=DOMAIN, layer=layer)


def typed_of(*nodes: onnx.NodeProto, low: LowType = "float16", **options: Any) -> onnx.ModelProto:
    """A strongly typed graph of nodes that make ``y`` [B, 4, K] of ``x``; every layer is of [K, K]."""
    value = onnx.helper.make_tensor_value_info
    shape = ["batch", 4, K]
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)]
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    widths = {placeholder_name(node): (K, K) for node in nodes if node.domain == DOMAIN}
    return strongly_typed(onnx.helper.make_model(graph, opset_imports=opsets), widths, low, **options)


def marked(model: onnx.ModelProto) -> dict[str, Prologue]:
    """The prologue of each layer's placeholder."""
    return {placeholder_name(node): Reading.of(node).prologue for node in model.graph.node if node.domain == DOMAIN}


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    held = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in held}


GELU = onnx.helper.make_node("Gelu", ["a"], ["g"], approximate="tanh")
FEED_FORWARD = (call("x", "a", "up"), GELU, call("g", "y", "down"))
JOIN = onnx.helper.make_node("Add", ["b", "c"], ["y"])


# GELU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["float16", "bfloat16"])
def test_gelu_goes_into_the_layer_that_reads_it(low: LowType) -> None:
    typed = typed_of(*FEED_FORWARD, low=low)
    before = typed.SerializeToString(deterministic=True)
    model = with_prologues(typed, ["up", "down"])
    assert typed.SerializeToString(deterministic=True) == before
    assert marked(model) == {"up": Prologue.PLAIN, "down": Prologue.GELU}
    assert [node.op_type for node in model.graph.node] == ["Cast", NODE, NODE, "Cast"]  # those of x and y
    assert model.graph.node[2].input[0] == "a"
    assert {value.name for value in model.graph.value_info} == {n for node in model.graph.node[:3] for n in node.output}


def test_gelu_in_the_low_type_is_taken_too() -> None:
    model = with_prologues(typed_of(*FEED_FORWARD, also_low=["Gelu"]), ["down"])
    assert marked(model)["down"] is Prologue.GELU
    assert types_of(model)[model.graph.node[2].input[0]] == HALF


@pytest.mark.parametrize("wide", ["g", "y"])
def test_a_layer_that_writes_float32_keeps_its_gelu(wide: str) -> None:
    """TensorRT 8.6 would take its output for FP16, as x is."""
    model = with_prologues(typed_of(*FEED_FORWARD, largest={wide: 1e5}), ["down"])
    types = types_of(model)
    assert (types["a"], types[FEED_FORWARD[-1].output[0]]) == (HALF, TensorProto.FLOAT)
    assert marked(model)["down"] is Prologue.PLAIN


def test_all_readers_of_a_gelu_take_it() -> None:
    model = with_prologues(
        typed_of(*FEED_FORWARD[:2], call("g", "b", "one"), call("g", "c", "two"), JOIN), ["one", "two"]
    )
    assert marked(model) == {"up": Prologue.PLAIN, "one": Prologue.GELU, "two": Prologue.GELU}


def erf(*nodes: onnx.NodeProto) -> tuple[onnx.NodeProto, ...]:
    return tuple(onnx.helper.make_node("Gelu", ["a"], ["g"]) if node is GELU else node for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "layers", "options"),
    [
        (erf(*FEED_FORWARD), ["up", "down"], {}),
        (FEED_FORWARD, ["up"], {}),
        (FEED_FORWARD, [], {}),
        ((*FEED_FORWARD[:2], call("g", "b", "down"), onnx.helper.make_node("Add", ["b", "g"], ["y"])), ["down"], {}),
        ((*FEED_FORWARD[:2], call("g", "b", "down"), call("g", "c", "kept"), JOIN), ["down"], {}),
        (FEED_FORWARD, ["down"], {"largest": {"a": 1e5}}),
    ],
    ids=["erf", "kept", "none", "read besides", "read by a kept layer", "float32 x"],
)
def test_other_gelus_stay(nodes: Any, layers: Collection[str], options: Any) -> None:
    typed = typed_of(*nodes, **options)
    model = with_prologues(typed, layers)
    assert set(marked(model).values()) == {Prologue.PLAIN}
    assert model.SerializeToString(deterministic=True) == typed.SerializeToString(deterministic=True)


def test_a_graphs_output_stays() -> None:
    typed = typed_of(*FEED_FORWARD)
    typed.graph.output.append(onnx.helper.make_tensor_value_info("g", TensorProto.FLOAT, ["batch", 4, K]))
    assert set(marked(with_prologues(typed, ["up", "down"])).values()) == {Prologue.PLAIN}


def test_layers_with_and_without_a_prologue_stay_apart(low_bit_layer: Any) -> None:
    """Both read the value before the GELU."""
    nodes = (FEED_FORWARD[0], GELU, call("g", "b", "attn.to_k"), call("a", "c", "attn.to_v"), JOIN)
    layers = [low_bit_layer(128, K, name=name) for name in ("attn.to_k", "attn.to_v")]
    model = with_prologues(typed_of(*nodes), [layer.name for layer in layers])
    reads = {placeholder_name(node): node.input[0] for node in model.graph.node if node.domain == DOMAIN}
    assert reads["attn.to_k"] == reads["attn.to_v"] == "a"
    assert [len(group) for group in plugin.same_input(model, layers)] == [1, 1]


# LayerNorm and modulation ---------------------------------------------------------------------------------------------


def modulated(**changes: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """A LayerNorm of a residual stream ``r``, modulated by ``m`` [B, 2, K], and two layers: nodes and constants."""
    make = onnx.helper.make_node
    given = {"axis": -1, "weight": 1.0, "bias": 0.0, "one": 1.0, "sum": ("m:scale", "one"), "product": ("n", "f")}
    given |= {"total": ("p", "m:shift")} | changes
    nodes = [
        make("Add", ["x", "x"], ["r"]),
        make("Split", ["m", "halves"], ["m:scale", "m:shift"], axis=1),
        make("LayerNormalization", ["r", "weight", "bias"], ["n"], axis=given["axis"], epsilon=1e-6),
        make("Add", given["sum"], ["f"]),
        make("Mul", given["product"], ["p"]),
        make("Add", given["total"], ["t"]),
        call("t", "b", "attn.to_k"),
        call("t", "c", "attn.to_v"),
        JOIN,
    ]
    constants = {name: np.full(K, given[name], np.float32) for name in ("weight", "bias")}
    return nodes, constants | {"one": np.array(given["one"], np.float32), "halves": np.array([1, 1])}


def typed_norm(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], m: Any = ("batch", 2, K), x: Any = ("batch", 4, K)
) -> onnx.ModelProto:
    value, single = onnx.helper.make_tensor_value_info, TensorProto.FLOAT
    inputs = [value("x", single, x), value("m", single, m)]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    y = value("y", single, [f"y{axis}" for axis in range(len(x))])
    graph = onnx.helper.make_graph(nodes, "g", inputs, [y], held)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    widths = {placeholder_name(node): (K, K) for node in nodes if node.domain == DOMAIN}
    return strongly_typed(onnx.helper.make_model(graph, opset_imports=opsets), widths)


NAMES = ["attn.to_k", "attn.to_v"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"axis": 2},
        {"sum": ("one", "m:scale")},
        {"product": ("f", "n")},
        {"total": ("m:shift", "p")},
        {"one": [[[1.0]]]},
    ],
    ids=str,
)
def test_a_modulated_norm_goes_into_the_layers_that_read_it(changes: dict[str, Any], low_bit_layer: Any) -> None:
    model = with_prologues(typed_norm(*modulated(**changes)), NAMES)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["Add", "Split", NODE, NODE, "Add", "Cast"]
    readings = {Reading.of(node) for node in model.graph.node if node.domain == DOMAIN}
    bits = int(np.float32(1e-6).view(np.int32))
    assert readings == {Reading(("r", "m:scale", "m:shift"), Prologue.LAYERNORM, bits)}
    assert {tensor.name for tensor in model.graph.initializer} == {"halves"}
    # Both are one node still, whose output is of the low type although its x is float32.
    layers = [low_bit_layer(128, K, name=name) for name in NAMES]
    assert [len(group) for group in plugin.same_input(model, layers)] == [2]
    written = plugin.plugin_model(model, [low_bit_layer(K, K, name=name) for name in NAMES])
    assert {onnx.helper.get_node_attr_value(n, "y_type") for n in written.graph.node if n.domain == DOMAIN} == {1}


def test_a_norm_without_a_bias_or_of_one_modulation_for_all() -> None:
    nodes, constants = modulated()
    del nodes[2].input[2]
    model = with_prologues(typed_norm(nodes, constants, m=(1, 2, K)), NAMES)
    assert set(marked(model).values()) == {Prologue.LAYERNORM}


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"axis": 1}, {}),
        ({"weight": 1.5}, {}),
        ({"bias": 0.5}, {}),
        ({"one": 2.0}, {}),
        ({"one": [1.0] * K}, {}),
        ({"sum": ("one", "one")}, {}),
        ({"product": ("n", "m:scale")}, {}),
        ({"total": ("p", "p")}, {}),
        ({"total": ("p", "r")}, {}),
        ({"total": ("p", "n")}, {}),
        ({}, {"m": ("batch", 2, 1)}),
        ({}, {"m": ("batch", 8, K)}),
        ({}, {"m": (3, 2, K), "x": (1, 4, K)}),
        ({}, {"m": ("batch", 2, K), "x": (1, 4, K)}),
        ({}, {"x": ("batch", 2, 4, K)}),
    ],
    ids=str,
)
def test_other_norms_stay(changes: dict[str, Any], shapes: dict[str, Any]) -> None:
    nodes, constants = modulated(**changes)
    if changes.get("axis") == 1:
        constants |= {name: np.full((4, K), constants[name][0]) for name in ("weight", "bias")}
    if shapes.get("m") == ("batch", 8, K):
        constants["halves"] = np.array([4, 4])
    typed = typed_norm(nodes, constants, **shapes)
    model = with_prologues(typed, NAMES)
    assert set(marked(model).values()) == {Prologue.PLAIN}
    assert sum(node.op_type == "LayerNormalization" for node in model.graph.node) == 1


@pytest.mark.parametrize("read", ["n", "p", "t"])
def test_a_value_that_others_read_stays(read: str) -> None:
    nodes, constants = modulated()
    nodes[-1] = onnx.helper.make_node("Sum", ["b", "c", read], ["y"])
    assert set(marked(with_prologues(typed_norm(nodes, constants), NAMES)).values()) == {Prologue.PLAIN}
    nodes, constants = modulated()
    typed = typed_norm(nodes, constants)
    typed.graph.output.append(onnx.helper.make_tensor_value_info(read, TensorProto.FLOAT, ["batch", 4, K]))
    assert set(marked(with_prologues(typed, NAMES)).values()) == {Prologue.PLAIN}


@pytest.mark.parametrize("layers", [[], NAMES[:1]])
def test_a_norm_that_a_kept_layer_reads_stays(layers: list[str]) -> None:
    assert set(marked(with_prologues(typed_norm(*modulated()), layers)).values()) == {Prologue.PLAIN}


# Whole models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["wan", "latte", "cogvideox"])
def case(request: pytest.FixtureRequest, rtn_layers: Any, example_inputs: Any) -> Any:
    """A family, its traced graph, layers and an example."""
    shape, text, frames = ((3, 16, 32, 32), 64, 16) if request.param == "wan" else ((4, 4, 8, 8), 24, 4)
    traced, transformer = (
        request.getfixturevalue(name) for name in (f"traced_{request.param}", f"{request.param}_model")
    )
    return request.param, traced, rtn_layers(transformer, frames, rank=1), example_inputs(shape, text, batch=2, seed=5)


def plugin_model(typed: onnx.ModelProto, layers: tuple[LowBitLayer, ...]) -> onnx.ModelProto:
    return plugin.plugin_model(lowered(typed), layers)


def test_what_a_models_layers_take_over(case: Any) -> None:
    family, traced, layers, inputs = case
    typed = strongly_typed(traced, {layer.name: layer.shape for layer in layers})
    fused = with_prologues(typed, [layer.name for layer in layers])
    found = {p: {name for name, prologue in marked(fused).items() if prologue is p} for p in Prologue}
    assert found[Prologue.GELU] == {layer.name for layer in layers if layer.name.endswith(".net.2")}
    # CogVideoX joins its text to what it has modulated.
    modulated = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "net.0.proj") if family != "cogvideox" else ()
    assert found[Prologue.LAYERNORM] == {layer.name for layer in layers if layer.name.endswith(modulated)}
    assert not any(node.op_type == "Gelu" and "_symbolic" in node.input[0] for node in fused.graph.node)
    model = plugin_model(fused, layers)
    onnx.checker.check_model(model, full_check=True)
    y, expected = in_onnxruntime(model, inputs), in_onnxruntime(plugin_model(typed, layers), inputs)
    np.testing.assert_array_equal(y, expected)


def test_single_layers_have_no_prologue(traced_latte: onnx.ModelProto, latte_model: Any, rtn_layers: Any) -> None:
    layers = rtn_layers(latte_model, 4)
    typed = strongly_typed(traced_latte, {layer.name: layer.shape for layer in layers})
    model = plugin_model(with_prologues(typed, [layer.name for layer in layers]), layers)
    assert {Reading.of(n).prologue for n in model.graph.node if n.domain == DOMAIN} == set(Prologue)
    single = layers_model(model)
    assert {onnx.helper.get_node_attr_value(node, "prologue") for node in single.graph.node} == {0}
    assert {onnx.helper.get_node_attr_value(node, "epsilon") for node in single.graph.node} == {0}
    assert {value.type.tensor_type.elem_type for value in (*single.graph.input, *single.graph.output[::5])} == {HALF}
    constants = {tensor.name for tensor in single.graph.initializer}
    for node in single.graph.node:
        assert node.input[0] == f"{node.name}:x"
        assert set(node.input[1:]) <= constants
