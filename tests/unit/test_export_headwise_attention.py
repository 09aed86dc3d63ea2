"""Attention as the plugin's node: what it takes the place of, what stays, and that it is the same model."""

from __future__ import annotations

import collections
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest
from onnx import TensorProto
from test_export_plugin import in_onnxruntime, relative_error

from qvdit.contract import LowBitLayer, QvditError
from qvdit.contract.bundle import TENSORRT_MODEL, verify
from qvdit.export import plugin
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE
from qvdit.export.graph import is_layer, placeholder_name
from qvdit.export.headwise_attention import ATTENTION, with_attention
from qvdit.export.layers import layers_model
from qvdit.export.opset import lowered
from qvdit.export.precision import LowType, strongly_typed
from qvdit.export.prologue import with_prologues

HEADS, SIZE = 8, 16
WIDTH = HEADS * SIZE
make = onnx.helper.make_node


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == ATTENTION]


def given(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def attended(**changes: Any) -> tuple[dict[str, onnx.NodeProto], dict[str, Any]]:
    """The nodes of one attention between four layers, as the exporter writes them, by what they make, and constants."""
    nodes = {
        name: make(NODE, [x], [name], domain=DOMAIN, layer=f"attn.to_{name}")
        for name, x in (("q", "x"), ("k", "x"), ("v", "x"))
    }
    nodes |= {f"{name}4": make("Reshape", [name, "split"], [f"{name}4"]) for name in "qkv"}
    nodes["qt"] = make("Transpose", ["q4"], ["qt"], perm=[0, 2, 1, 3])
    nodes["vt"] = make("Transpose", ["v4"], ["vt"], perm=[0, 2, 1, 3])
    nodes["scaled"] = make("Mul", ["qt", "scale"], ["scaled"])
    nodes["keys"] = make("Transpose", ["k4"], ["keys"], perm=[0, 2, 3, 1])
    nodes["scores"] = make("MatMul", ["scaled", "keys"], ["scores"])
    nodes["probabilities"] = make("Softmax", ["scores"], ["probabilities"], axis=-1)
    nodes["product"] = make("MatMul", ["probabilities", "vt"], ["product"])
    nodes["rows"] = make("Transpose", ["product"], ["rows"], perm=[0, 2, 1, 3])
    nodes["joined"] = make("Reshape", ["rows", "join"], ["joined"])
    nodes["y"] = make(NODE, ["joined"], ["y"], domain=DOMAIN, layer="attn.to_out")
    constants = {"split": [0, 0, HEADS, SIZE], "join": [0, 0, WIDTH], "scale": np.float32(1 / math.sqrt(SIZE))}
    return nodes | changes.pop("nodes", {}), constants | changes


def typed_of(
    nodes: dict[str, onnx.NodeProto],
    constants: dict[str, Any],
    low: LowType = "float16",
    largest: dict[str, float] | None = None,
    width: int = WIDTH,
    axes: int = 3,
) -> onnx.ModelProto:
    """The strongly typed graph of nodes that make ``y``, of so many axes, of ``x`` [batch, rows, width]."""
    value, shape = onnx.helper.make_tensor_value_info, ["batch", "rows", width]
    held = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    single = TensorProto.FLOAT
    inputs, y = [value("x", single, shape)], [value("y", single, [None] * axes)]
    graph = onnx.helper.make_graph(list(nodes.values()), "g", inputs, y, held)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    widths = {placeholder_name(node): (width, width) for node in graph.node if node.domain == DOMAIN}
    return strongly_typed(model, widths, low, largest)


# What is taken --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["float16", "bfloat16"])
def test_attention_is_one_node(low: LowType) -> None:
    typed = typed_of(*attended(), low=low)
    before = typed.SerializeToString(deterministic=True)
    model = with_attention(typed)
    assert typed.SerializeToString(deterministic=True) == before
    assert [node.op_type for node in model.graph.node] == ["Cast", NODE, NODE, NODE, ATTENTION, NODE, "Cast"]
    (node,) = attention_nodes(model)
    assert (node.name, list(node.input), list(node.output)) == ("joined", ["q", "k", "v"], ["joined"])
    assert given(node) == {
        "plugin_version": b"4",
        "plugin_namespace": b"",
        "heads": HEADS,
        "head_size": SIZE,
        "packed": 0,
        "q_layout": 0,
        "k_layout": 0,
        "v_layout": 0,
        "scale": int(np.float32(0.25).view(np.int32)),
    }
    assert not model.graph.initializer
    described = {value.name: value.type.tensor_type for value in model.graph.value_info}
    assert described["joined"].elem_type == (TensorProto.FLOAT16 if low == "float16" else TensorProto.BFLOAT16)
    onnx.checker.check_model(lowered(model), full_check=True)


@pytest.mark.parametrize("size", [72, 128])
@pytest.mark.parametrize("low", ["float16", "bfloat16"])
def test_the_usual_scale_is_not_rounded(low: LowType, size: int) -> None:
    scale = np.float32(1 / math.sqrt(size))
    nodes, constants = attended(split=[0, 0, 2, size], join=[0, 0, 2 * size], scale=scale)
    (node,) = attention_nodes(with_attention(typed_of(nodes, constants, low, width=2 * size)))
    assert given(node)["scale"] == scale.view(np.int32)
    nodes, constants = attended(split=[0, 0, 2, size], join=[0, 0, 2 * size], scale=np.float32(0.3))
    typed = typed_of(nodes, constants, low, width=2 * size)
    rounded = next(t for t in typed.graph.initializer if t.name.startswith("scale"))
    (node,) = attention_nodes(with_attention(typed))
    assert np.int32(given(node)["scale"]).view(np.float32) == onnx.numpy_helper.to_array(rounded)


HEADS_FIRST = {
    "k4": make("Reshape", ["k", "split"], ["k4"]),
    "kt": make("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]),
    "kt2": make("Relu", ["kt"], ["kt2"]),
    "qt2": make("Relu", ["qt"], ["qt2"]),
    "scaled": make("Mul", ["scale", "qt2"], ["scaled"]),
    "keys": make("Transpose", ["kt2"], ["keys"], perm=[0, 1, 3, 2]),
}


def ordered(nodes: dict[str, onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """Nodes after those that they read of."""
    placed: dict[str, onnx.NodeProto] = {}
    while len(placed) < len(nodes):
        for name, node in nodes.items():
            if all(read in placed or read not in nodes for read in node.input):
                placed.setdefault(name, node)
    return placed


@pytest.mark.parametrize(
    ("nodes", "constants", "inputs", "layouts"),
    [
        ({"scaled": make("Mul", ["scale", "qt"], ["scaled"])}, {}, ["q", "k", "v"], [0, 0, 0]),
        ({}, {"scale": np.full((1, 1, 1, 1), 0.25, np.float32)}, ["q", "k", "v"], [0, 0, 0]),
        (
            {
                "kt": make("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]),
                "keys": make("Transpose", ["kt"], ["keys"], perm=[0, 1, 3, 2]),
            },
            {},
            ["q", "k", "v"],
            [0, 0, 0],
        ),
        (HEADS_FIRST, {}, ["qt2", "kt2", "v"], [1, 1, 0]),
        # Rows of one value are others' rows once they have heads: it is read with them.
        ({}, {"split": [-1, 2, HEADS, SIZE], "join": [-1, 2, WIDTH]}, ["q4", "k4", "v4"], [0, 0, 0]),
    ],
    ids=["scale first", "scale of four axes", "keys transposed twice", "heads first", "other rows"],
)
def test_what_is_read(nodes: dict[str, Any], constants: Any, inputs: list[str], layouts: list[int]) -> None:
    made, held = attended(nodes=nodes, **constants)
    (node,) = attention_nodes(with_attention(typed_of(ordered(made), held)))
    assert list(node.input) == inputs
    assert [given(node)[f"{of}_layout"] for of in "qkv"] == layouts


NORMED = {
    "n": make("LayerNormalization", ["q", "ones"], ["n"], axis=-1),
    "q4": make("Reshape", ["n", "split"], ["q4"]),
}


def test_a_float32_value_is_cast_once_it_is_whole() -> None:
    nodes, constants = attended(nodes=NORMED, ones=np.ones(WIDTH, np.float32))
    typed = typed_of(ordered(nodes), constants)
    model = with_attention(typed)
    (node,) = attention_nodes(model)
    assert list(node.input) == ["joined:q", "k", "v"]
    cast = next(n for n in model.graph.node if n.output[0] == "joined:q")
    assert (cast.op_type, list(cast.input)) == ("Cast", ["n"])
    onnx.checker.check_model(lowered(model), full_check=True)
    # What scaling brings into the low type's range may be out of it before.
    largest = {"qt": 1e5, "n": 1e5}
    assert not attention_nodes(with_attention(typed_of(ordered(nodes), constants, largest=largest), largest))


# What stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (
            {
                "masked": make("Add", ["scores", "mask"], ["masked"]),
                "probabilities": make("Softmax", ["masked"], ["probabilities"], axis=-1),
            },
            {"mask": np.zeros((1, 1, 1, 1), np.float32)},
        ),
        ({"probabilities": make("Softmax", ["scores"], ["probabilities"], axis=2)}, {}),
        ({}, {"scale": np.float32(-0.25)}),
        ({}, {"scale": np.linspace(0.1, 0.2, SIZE, dtype=np.float32)}),
        ({"scaled": make("Mul", ["qt", "qt"], ["scaled"])}, {}),
        ({"scaled": make("Neg", ["qt"], ["scaled"])}, {}),
        (
            {"rows": make("Identity", ["product"], ["rows"]), "joined": make("Reshape", ["rows", "join"], ["joined"])},
            {},
        ),
        ({}, {"join": [1, -1, WIDTH]}),
        ({"y": make("Identity", ["joined"], ["y"])}, {"join": [0, -1]}),
        ({}, {"split": [0, 0, 32, 4]}),
        ({"s": make("Abs", ["scores"], ["s"]), "y": make("Identity", ["s"], ["y"])}, {}),
        ({"r": make("Relu", ["product"], ["r"]), "y": make("Identity", ["r"], ["y"])}, {}),
    ],
    ids=[
        "mask",
        "another axis",
        "a negative scale",
        "a scale for every feature",
        "squared",
        "no scale",
        "heads before rows",
        "other rows",
        "rank 2",
        "small heads",
        "scores read besides",
        "result read besides",
    ],
)
def test_other_attention_stays(nodes: dict[str, Any], constants: dict[str, Any]) -> None:
    made, held = attended(nodes=nodes, **constants)
    axes = {"joined": len(held["join"]), "s": 4, "r": 4}.get(made["y"].input[0], 3)
    assert not attention_nodes(with_attention(typed_of(ordered(made), held, axes=axes)))


@pytest.mark.parametrize("wide", ["scores", "probabilities", "product", "keys", "vt"])
def test_what_the_low_type_cannot_hold_stays(wide: str) -> None:
    assert not attention_nodes(with_attention(typed_of(*attended(), largest={wide: 1e5})))


@pytest.mark.parametrize("read", ["scores", "probabilities", "product", "rows"])
def test_a_graphs_output_stays(read: str) -> None:
    typed = typed_of(*attended())
    typed.graph.output.append(onnx.helper.make_tensor_value_info(read, TensorProto.FLOAT16, None))
    assert not attention_nodes(with_attention(typed))


# Packed ---------------------------------------------------------------------------------------------------------------


def merged(low_bit_layer: Any, **changes: Any) -> onnx.ModelProto:
    nodes, constants = attended(**changes)
    names = sorted(placeholder_name(node) for node in nodes.values() if node.domain == DOMAIN)
    layers = [low_bit_layer(WIDTH, WIDTH, seed=i, name=name) for i, name in enumerate(names)]
    layers.sort(key=lambda layer: ["q", "k", "v", "out"].index(layer.name.rpartition("_")[2]))
    return plugin.plugin_model(lowered(with_attention(typed_of(ordered(nodes), constants))), layers)


def test_what_one_node_writes_is_read_whole(low_bit_layer: Any) -> None:
    model = merged(low_bit_layer)
    assert [node.op_type for node in model.graph.node] == ["Cast", NODE, ATTENTION, NODE, "Cast"]
    (node,) = attention_nodes(model)
    assert (list(node.input), given(node)["packed"]) == (["q:merged"], 3)
    read = {name for other in model.graph.node for name in other.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    written = {name for other in model.graph.node for name in other.output}
    assert {value.name for value in model.graph.value_info} <= written
    onnx.checker.check_model(model, full_check=True)


def test_keys_and_values_alone(low_bit_layer: Any) -> None:
    model = merged(low_bit_layer, nodes=other_q())
    (node,) = attention_nodes(model)
    assert (list(node.input), given(node)["packed"]) == (["q", "k:merged"], 2)
    onnx.checker.check_model(model, full_check=True)


def other_q() -> dict[str, onnx.NodeProto]:
    return {
        "e": make("Relu", ["x"], ["e"]),
        "q": make(NODE, ["e"], ["q"], domain=DOMAIN, layer="attn.to_q"),
    }


def test_a_product_whose_rows_are_others_gets_them_first(low_bit_layer: Any) -> None:
    model = merged(low_bit_layer, split=[-1, 2, HEADS, SIZE], join=[-1, 2, WIDTH])
    (node,) = attention_nodes(model)
    assert (list(node.input), given(node)["packed"]) == (["q:merged:rows"], 3)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 4, WIDTH), np.float32)
    assert run(model, x).shape == (6, 2, WIDTH)


@pytest.mark.parametrize("read", ["q", "v", "k4"])
def test_parts_that_others_read_stay_apart(read: str, low_bit_layer: Any) -> None:
    nodes = {
        "o": make(NODE, ["joined"], ["o"], domain=DOMAIN, layer="attn.to_out"),
        "r": make("Relu", [read], ["r"]),
        "s": make("ReduceMean", ["r"], ["s"], keepdims=0),
        "y": make("Add", ["o", "s"], ["y"]),
    }
    (node,) = attention_nodes(merged(low_bit_layer, nodes=nodes))
    assert given(node)["packed"] == 0


def test_parts_whose_heads_come_first_stay_apart(low_bit_layer: Any) -> None:
    """One head as [B, 1, L, D]: its product's rows are no rows of heads."""
    nodes, constants = attended(scale=np.float32(0.1), one=[0, 1, -1, WIDTH], join=[0, 0, WIDTH])
    del nodes["qt"], nodes["vt"], constants["split"]
    nodes |= {f"{name}4": make("Reshape", [name, "one"], [f"{name}4"]) for name in "qkv"}
    nodes["scaled"] = make("Mul", ["q4", "scale"], ["scaled"])
    nodes["keys"] = make("Transpose", ["k4"], ["keys"], perm=[0, 1, 3, 2])
    nodes["product"] = make("MatMul", ["probabilities", "v4"], ["product"])
    typed = typed_of(ordered(nodes), constants)
    layers = [low_bit_layer(WIDTH, WIDTH, seed=i, name=f"attn.to_{n}") for i, n in enumerate(("q", "k", "v", "out"))]
    model = plugin.plugin_model(lowered(with_attention(typed)), layers)
    (node,) = attention_nodes(model)
    assert (list(node.input), given(node)["packed"], given(node)["q_layout"]) == (["q4", "k4", "v4"], 0, 1)
    x = np.random.default_rng(0).standard_normal((2, 5, WIDTH), np.float32)
    assert relative_error(run(model, x), run(plugin.plugin_model(lowered(typed), layers), x)) < 2e-3


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import torch

    return in_onnxruntime(model, {"x": torch.from_numpy(x)})


@pytest.mark.parametrize("nodes", [{}, HEADS_FIRST, other_q()], ids=["packed", "heads first", "keys and values"])
def test_the_node_is_the_attention_that_it_replaced(nodes: dict[str, Any], low_bit_layer: Any) -> None:
    made, constants = attended(nodes=nodes)
    typed = typed_of(ordered(made), constants)
    names = [f"attn.to_{name}" for name in ("q", "k", "v", "out")]
    layers = [low_bit_layer(WIDTH, WIDTH, seed=i, name=name) for i, name in enumerate(names)]
    x = np.random.default_rng(0).standard_normal((2, 5, WIDTH), np.float32)
    expected = run(plugin.plugin_model(lowered(typed), layers), x)
    y = run(plugin.plugin_model(lowered(with_attention(typed)), layers), x)
    assert relative_error(y, expected) < 2e-3


# Whole models ---------------------------------------------------------------------------------------------------------

ATTENTIONS = {"wan": 4, "latte": 3, "cogvideox": 2}  # all of each model's


@pytest.mark.parametrize("family", ATTENTIONS)
def test_a_models_attention(family: str, request: pytest.FixtureRequest, rtn_layers: Any, example_inputs: Any) -> None:
    shape, text, frames = ((3, 16, 32, 32), 64, 16) if family == "wan" else ((4, 4, 8, 8), 24, 4)
    transformer = request.getfixturevalue(f"{family}_model")
    layers = rtn_layers(transformer, frames, rank=1)
    typed = strongly_typed(request.getfixturevalue(f"traced_{family}"), {layer.name: layer.shape for layer in layers})
    typed = with_prologues(typed, [layer.name for layer in layers])
    model = plugin.plugin_model(lowered(with_attention(typed)), layers)
    onnx.checker.check_model(model, full_check=True)
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert (kinds[ATTENTION], kinds["Softmax"]) == (ATTENTIONS[family], 0)
    inputs = example_inputs(shape, text, batch=2, seed=5)
    y, expected = in_onnxruntime(model, inputs), in_onnxruntime(plugin.plugin_model(lowered(typed), layers), inputs)
    # A query is rounded before it is scaled, not after.
    assert relative_error(y, expected) < (1e-7 if family == "latte" else 2e-3)


PACKED = {"wan": [0] * 4, "latte": [3, 2, 3], "cogvideox": [0] * 2}  # all but Latte normalize queries and keys


@pytest.mark.parametrize("family", PACKED)
def test_what_a_wide_models_attention_reads(
    family: str, wide_traced: Any, wide_models: Any, wide_inputs: Any, rtn_layers: Any
) -> None:
    layers: tuple[LowBitLayer, ...] = rtn_layers(wide_models[family], 4, rank=1)
    typed = strongly_typed(wide_traced(family), {layer.name: layer.shape for layer in layers})
    typed = with_prologues(typed, [layer.name for layer in layers])
    model, plain = (plugin.plugin_model(lowered(t), layers) for t in (with_attention(typed), typed))
    onnx.checker.check_model(model, full_check=True)
    assert [given(node)["packed"] for node in attention_nodes(model)] == PACKED[family]
    splits = [node for node in model.graph.node if node.name.endswith(":split")]
    assert bool(splits) == (family != "latte")
    inputs = wide_inputs[family]
    assert relative_error(in_onnxruntime(model, inputs), in_onnxruntime(plain, inputs)) < 2e-3
    single = layers_model(model)
    assert all(is_layer(node) for node in single.graph.node)
    assert len(single.graph.node) == sum(is_layer(node) for node in model.graph.node)


# The job --------------------------------------------------------------------------------------------------------------


def exported(make_job: Any, out: Path, **settings: str) -> onnx.GraphProto:
    """The graph that a job makes for TensorRT, of a bundle that is there."""
    make_job(out, target="tensorrt", **settings).run("export")
    return onnx.load(out / TENSORRT_MODEL, load_external_data=False).graph


def test_attention_may_be_left_to_tensorrt(bundle: Path, make_job: Any, tmp_path: Path) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    found = {}
    for attention in ("plugin", "tensorrt", "plugin"):
        nodes = exported(make_job, out, attention=attention).node
        found[attention] = {kind: sum(n.op_type == kind for n in nodes) for kind in (ATTENTION, "Softmax")}
    count = found["plugin"][ATTENTION]
    assert count > 0
    assert found == {"plugin": {ATTENTION: count, "Softmax": 0}, "tensorrt": {ATTENTION: 0, "Softmax": count}}


def test_graphs_may_be_in_bf16(bundle: Path, make_job: Any, tmp_path: Path) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    found = {}
    for precision in ("fp16", "bf16", "fp16"):
        kinds = {v.type.tensor_type.elem_type for v in exported(make_job, out, precision=precision).value_info}
        found[precision] = kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}
        assert verify(out).precision == (None if precision == "fp16" else precision)
    assert found == {"fp16": {TensorProto.FLOAT16}, "bf16": {TensorProto.BFLOAT16}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": "tensorrt", "attention": "torch"}, "--attention 'torch'; expected one of plugin, tensorrt"),
        ({"attention": "tensorrt"}, "--attention tensorrt with --target onnxruntime"),
        ({"target": "tensorrt", "precision": "fp8"}, "--precision 'fp8'; expected one of fp16, bf16"),
        ({"precision": "bf16"}, "--precision bf16 with --target onnxruntime"),
        (
            {"target": "tensorrt", "precision": "bf16", "device": "orin", "jetpack": "6.0"},
            "--precision bf16 for Jetson Orin with JetPack 6.0; expected TensorRT 10 or newer",
        ),
    ],
)
def test_options_of_a_graph_that_there_are_not(
    settings: dict[str, str], said: str, make_job: Any, tmp_path: Path
) -> None:
    with pytest.raises(QvditError, match=re.escape(said)):
        make_job(tmp_path / "out", **settings)
