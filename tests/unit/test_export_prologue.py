"""Prologues: what the plugin's nodes take over of a graph, what they leave alone, and that it is the same model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
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
from qvdit.export.prologue import prologue_of, with_prologues

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
    return {placeholder_name(node): prologue_of(node) for node in model.graph.node if node.domain == DOMAIN}


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
        (FEED_FORWARD, ["down"], {"largest": {"g": 1e5}}),
        (FEED_FORWARD, ["down"], {"largest": {"y": 1e5}}),
    ],
    ids=["erf", "kept", "none", "read besides", "read by a kept layer", "float32 x", "float32 GELU", "float32 y"],
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


# Whole models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["wan", "latte", "cogvideox"])
def case(request: pytest.FixtureRequest, rtn_layers: Any, example_inputs: Any) -> Any:
    """A traced graph, its layers and an example."""
    shape, text, frames = ((3, 16, 32, 32), 64, 16) if request.param == "wan" else ((4, 4, 8, 8), 24, 4)
    traced, transformer = (
        request.getfixturevalue(name) for name in (f"traced_{request.param}", f"{request.param}_model")
    )
    return traced, rtn_layers(transformer, frames, rank=1), example_inputs(shape, text, batch=2, seed=5)


def plugin_model(typed: onnx.ModelProto, layers: tuple[LowBitLayer, ...]) -> onnx.ModelProto:
    return plugin.plugin_model(lowered(typed), layers)


def test_every_feed_forward_network_has_its_gelu(case: Any) -> None:
    traced, layers, inputs = case
    typed = strongly_typed(traced, {layer.name: layer.shape for layer in layers})
    fused = with_prologues(typed, [layer.name for layer in layers])
    gelus = {name for name, prologue in marked(fused).items() if prologue is Prologue.GELU}
    assert gelus == {layer.name for layer in layers if layer.name.endswith(".net.2")}
    assert not any(node.op_type == "Gelu" and "_symbolic" in node.input[0] for node in fused.graph.node)
    model = plugin_model(fused, layers)
    onnx.checker.check_model(model, full_check=True)
    found, expected = in_onnxruntime(model, inputs), in_onnxruntime(plugin_model(typed, layers), inputs)
    np.testing.assert_array_equal(found, expected)


def test_single_layers_have_no_prologue(traced_latte: onnx.ModelProto, latte_model: Any, rtn_layers: Any) -> None:
    layers = rtn_layers(latte_model, 4)
    typed = strongly_typed(traced_latte, {layer.name: layer.shape for layer in layers})
    model = plugin_model(with_prologues(typed, [layer.name for layer in layers]), layers)
    assert {prologue_of(n) for n in model.graph.node if n.domain == DOMAIN} == {Prologue.PLAIN, Prologue.GELU}
    single = layers_model(model)
    assert {onnx.helper.get_node_attr_value(node, "prologue") for node in single.graph.node} == {0}
    assert {value.type.tensor_type.elem_type for value in single.graph.input} == {HALF}
