"""Plugin nodes: what they hold is the checkpoint, and with a body in their place the file is PyTorch's model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from qvdit.contract import ACT_BITS, WEIGHT_BITS, FrameRows, LowBitLayer, QvditError, StaticInt8Layer
from qvdit.contract.kernels import Prologue
from qvdit.contract.layer import arrays
from qvdit.contract.parity import relative_error
from qvdit.export import graph, plugin
from qvdit.export.files import save_model
from qvdit.export.opset import lowered
from qvdit.export.precision import strongly_typed
from qvdit.export.prologue import Reading, with_prologues
from qvdit.method.reference import quantized_transformer
from qvdit.runtimes.onnxruntime import session

EVERY_PART = ("zero", "bias", "smooth", "gain")


def assert_same_layer(found: LowBitLayer, expected: LowBitLayer) -> None:
    plain = [f.name for f in dataclasses.fields(LowBitLayer) if f.name not in arrays(expected)]
    assert {name: getattr(found, name) for name in plain} == {name: getattr(expected, name) for name in plain}
    for name, value in arrays(expected).items():
        assert getattr(found, name).dtype == value.dtype
        np.testing.assert_array_equal(getattr(found, name), value)


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def decode(model: onnx.ModelProto) -> tuple[LowBitLayer, ...]:
    (node,) = model.graph.node
    return plugin.decoded(node, constants_of(model))


# One node -------------------------------------------------------------------------------------------------------------


def test_node_is_as_the_plugin_reads_it(low_bit_layer: Any) -> None:
    layer = low_bit_layer(6, 45, 3, EVERY_PART, rank=2, act_bits=6, act_symmetric=False)
    model = plugin.layer_model(layer)
    (node,) = model.graph.node
    assert (node.op_type, node.domain, node.name) == ("LowBitLinear", "qvdit", layer.name)
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "plugin_version": b"4",
        "plugin_namespace": b"",
        "in_features": 45,
        "out_features": 6,
        "weight_bits": 3,
        "act_bits": 6,
        "act_symmetric": 0,
        "rank": 2,
        "segment": 6,
        "rows": 1,
        "frames": 4,
        "rotation": 0,
        "prologue": 0,
        "epsilon": 0,
        "y_type": 1,
        "has_zero": 1,
        "has_bias": 1,
        "has_smooth": 1,
        "test_outputs": 1,
    }
    held = [constants_of(model)[name] for name in node.input[1:]]
    int32, float32, float16 = TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT16
    assert [(tensor.data_type, list(tensor.dims)) for tensor in held] == [
        (int32, [6, 6]),  # words: 3 bits of 64 values
        (float32, [6]),
        (int32, [2]),  # zeros: four a word
        (float32, [6]),
        (float32, [45]),
        (float16, [2, 45]),
        (float16, [2, 6]),
        (float32, [1, 4]),
    ]
    zeros = onnx.numpy_helper.to_array(held[2]).view(np.int8)
    np.testing.assert_array_equal(zeros, [*layer.weight_zero, 0, 0])
    assert onnx.numpy_helper.to_array(held[5])[1, 7] == layer.alpha[7, 1]


def test_absent_parts_take_no_input(low_bit_layer: Any) -> None:
    (node,) = plugin.layer_model(low_bit_layer(8, 32)).graph.node
    assert len(node.input) == 3
    value = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert not any(value[name] for name in ("rank", "rows", "frames", "has_zero", "has_bias", "has_smooth"))


@pytest.mark.parametrize(("rows", "index"), [(FrameRows.SEQUENCE, 1), (FrameRows.SPATIAL, 2), (FrameRows.TEMPORAL, 3)])
def test_rows(rows: FrameRows, index: int, low_bit_layer: Any) -> None:
    layer = low_bit_layer(8, 32, parts=("gain",), rank=1, rows=rows)
    model = plugin.layer_model(layer)
    assert onnx.helper.get_node_attr_value(model.graph.node[0], "rows") == index
    assert decode(model)[0].rows is rows


drawn = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "k": st.integers(1, 70),
        "bits": st.sampled_from(WEIGHT_BITS),
        "parts": st.sets(st.sampled_from(EVERY_PART[:3])).map(tuple),
        "rank": st.integers(0, 3),
        "seed": st.integers(0, 99),
        "act_bits": st.sampled_from(ACT_BITS),
        "act_symmetric": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=drawn, gain=st.booleans())
def test_any_layer_comes_back(fields: dict[str, Any], gain: bool, low_bit_layer: Any) -> None:
    if gain and fields["rank"]:
        fields["parts"] += ("gain",)
    layer = low_bit_layer(**fields)
    assert_same_layer(decode(plugin.layer_model(layer))[0], layer)


@pytest.mark.parametrize("rank", [0, 1, 10])
@pytest.mark.parametrize("bits", [3, 8])
def test_merged_layers_come_back(bits: int, rank: int, low_bit_layer: Any) -> None:
    parts = EVERY_PART if rank else EVERY_PART[:3]
    layers = [low_bit_layer(128, 45, bits, parts, rank, seed) for seed in range(3)]
    model = plugin.layer_model(*layers)
    value = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert (value["out_features"], value["segment"], value["rank"]) == (384, 128, rank)
    for found, expected in zip(decode(model), layers, strict=True):
        assert_same_layer(found, expected)


def test_merged_layer_without_a_bias_gets_zeros(low_bit_layer: Any) -> None:
    layers = [low_bit_layer(128, 32, parts=("bias",)), low_bit_layer(128, 32, seed=1)]
    first, second = decode(plugin.layer_model(*layers))
    np.testing.assert_array_equal(first.bias, layers[0].bias)
    np.testing.assert_array_equal(second.bias, np.zeros(128, np.float32))


# Single layers for parity ---------------------------------------------------------------------------------------------


def test_layer_files(low_bit_layer: Any, tmp_path: Path) -> None:
    layers = [low_bit_layer(8, 45, seed=1), low_bit_layer(16, 32, parts=("gain",), rank=1, seed=2)]
    assert plugin.write_layers(layers, tmp_path) == [tmp_path / "layer1.onnx", tmp_path / "layer2.onnx"]
    for path, layer in zip(sorted(tmp_path.iterdir()), layers, strict=True):
        graph.check(str(path))
        assert_same_layer(decode(onnx.load(path))[0], layer)
    described = {
        v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for model in [onnx.load(tmp_path / "layer1.onnx")]
        for v in (*model.graph.input, *model.graph.output)
    }
    half, float32, int32 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT32
    assert described == {
        "x": (half, ["batch", "tokens", 45]),
        "y": (half, ["batch", "tokens", 8]),
        "x_q": (int32, ["batch", "tokens", 16]),
        "scale": (float32, ["batch", "tokens"]),
        "zero": (int32, ["batch", "tokens"]),
        "acc": (int32, ["batch", "tokens", 8]),
    }


# What the plugin does not compute -------------------------------------------------------------------------------------


def test_unserved_layers_are_refused_by_name(low_bit_layer: Any, tmp_path: Path) -> None:
    grouped = low_bit_layer(4, 64, name="grouped", weight_scale=np.ones((4, 2), np.float32))
    wide = low_bit_layer(2, 16385, name="wide")
    ranked = low_bit_layer(64, 64, rank=33, name="ranked")
    static = StaticInt8Layer("static", np.zeros((2, 32), np.int8), np.ones(2, np.float32), np.array(1, np.float32))
    layers = (low_bit_layer(4, 64), grouped, wide, ranked, static)
    for refuse in (
        lambda: plugin.plugin_model(onnx.ModelProto(), layers),
        lambda: plugin.write_layers(layers, tmp_path / "layers"),  # type: ignore[arg-type]
    ):
        with pytest.raises(QvditError) as caught:
            refuse()
        message = str(caught.value)
        assert "\n" not in message
        assert "4 layers" in message
        for part in ("grouped (groups)", "wide (more than 16384", "ranked (rank above 32)"):
            assert part in message
        assert "layer0" not in message
    assert not (tmp_path / "layers").exists()


# Whole models ---------------------------------------------------------------------------------------------------------


def in_onnxruntime(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Run a lowered model with the integer body, whose x and y are FP16, where the plugin would be."""
    back, layers = plugin.with_placeholders(model)
    for opset in back.opset_import:
        opset.version = opset.version if opset.domain else 21  # the body's; opset 17 is a part of it but for one thing
    back.ir_version = 10
    for node in back.graph.node:
        if node.op_type == "ReduceMean":
            (axes,) = (attribute for attribute in node.attribute if attribute.name == "axes")
            node.input.append(f"{node.name}:axes")
            back.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes.ints), node.input[1]))
            node.attribute.remove(axes)
    filled = graph.quantized_model(back, layers, "integer")
    return session(filled.SerializeToString(), 1).run(None, {k: v.numpy() for k, v in inputs.items()})[0]


@torch.no_grad()
def run_torch(model: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return model(**inputs, return_dict=False)[0].numpy()


def lower(traced: onnx.ModelProto, layers: tuple[LowBitLayer, ...], **options: Any) -> onnx.ModelProto:
    typed = strongly_typed(traced, {layer.name: layer.shape for layer in layers})
    return plugin.plugin_model(lowered(with_prologues(typed, [layer.name for layer in layers])), layers, **options)


KINDS = [(4, 8, True, 1), (3, 6, False, 2), (8, 8, True, 0)]


@pytest.mark.parametrize(("bits", "act_bits", "symmetric", "rank"), KINDS)
@pytest.mark.parametrize("family", ["wan", "latte", "cogvideox"])
def test_file_is_pytorchs_model(
    family: str,
    bits: int,
    act_bits: int,
    symmetric: bool,
    rank: int,
    rtn_layers: Any,
    example_inputs: Any,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    shape, text, frames = ((3, 16, 32, 32), 64, 16) if family == "wan" else ((4, 4, 8, 8), 24, 4)
    traced, transformer = (request.getfixturevalue(name) for name in (f"traced_{family}", f"{family}_model"))
    layers = rtn_layers(transformer, frames, bits, act_bits, symmetric, rank)
    path = tmp_path / "model.onnx"
    save_model(lower(traced, layers), path, external_from=1)
    graph.check(str(path))
    model = onnx.load(path)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 17, "qvdit": 1}
    assert len(model.functions) == 0
    back, found = plugin.with_placeholders(model)
    for layer, expected in zip(sorted(found, key=name_of), sorted(layers, key=name_of), strict=True):
        assert_same_layer(layer, expected)
    assert sum(node.domain == "qvdit" for node in back.graph.node) == len(layers)
    inputs = example_inputs(shape, text, batch=3, seed=9)
    full, quantized = run_torch(transformer, inputs), run_torch(quantized_transformer(transformer, layers), inputs)
    y = in_onnxruntime(model, inputs)
    assert y.dtype == np.float32
    distance = relative_error(quantized, full)
    assert relative_error(y, quantized) < max(0.35 * distance, 2e-3)  # flips of roundings cascade
    if (family, bits) == (
        "cogvideox",
        8,
    ):  # 8 bits change this model as little as FP16 does: PyTorch's own is farther off
        half = quantized_transformer(transformer, layers).half()
        distance = relative_error(run_torch(half, {n: x.half() for n, x in inputs.items()}).astype(np.float32), full)
        assert relative_error(y, full) < distance
    else:
        assert relative_error(y, full) == pytest.approx(distance, rel=0.1)


def name_of(layer: LowBitLayer) -> str:
    return layer.name


def test_wrong_gains_would_be_seen(
    traced_latte: onnx.ModelProto, latte_model: Any, rtn_layers: Any, example_inputs: Any
) -> None:
    layers = rtn_layers(latte_model, 4, rank=1)
    turned = tuple(
        layer if layer.frame_gain is None else dataclasses.replace(layer, frame_gain=layer.frame_gain[::-1].copy())
        for layer in layers
    )
    inputs = example_inputs((4, 4, 8, 8), 24)
    quantized = run_torch(quantized_transformer(latte_model, layers), inputs)
    assert relative_error(in_onnxruntime(lower(traced_latte, turned), inputs), quantized) > 0.02


def test_every_value_is_described(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any) -> None:
    model = lower(traced_wan, rtn_layers(wan_model, 16))
    described = {value.name: value.type.tensor_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.domain == "qvdit":
            (y,) = node.output
            n = onnx.helper.get_node_attr_value(node, "out_features")
            assert (described[y].elem_type, described[y].shape.dim[-1].dim_value) == (TensorProto.FLOAT16, n)
            reading = Reading.of(node)
            exact = reading.prologue is Prologue.LAYERNORM
            assert {described[name].elem_type for name in reading.inputs} == {
                TensorProto.FLOAT if exact else TensorProto.FLOAT16
            }


def test_bfloat16(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any) -> None:
    layers = rtn_layers(wan_model, 16)
    typed = lowered(strongly_typed(traced_wan, {layer.name: layer.shape for layer in layers}, "bfloat16"))
    model = plugin.plugin_model(typed, layers)
    onnx.checker.check_model(model, full_check=True)
    described = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    calls = [node for node in model.graph.node if node.domain == "qvdit"]
    assert {described[name] for node in calls for name in (node.input[0], *node.output)} == {TensorProto.BFLOAT16}
    assert TensorProto.FLOAT16 not in {*described.values(), *(t.data_type for t in model.graph.initializer)}


def test_kept_layers_have_their_inputs_type(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any) -> None:
    kept = "blocks.1.ffn.net.2"
    layers = rtn_layers(wan_model, 16)
    linear = wan_model.get_submodule(kept)
    typed = strongly_typed(traced_wan, {layer.name: layer.shape for layer in layers})
    rest = tuple(layer for layer in layers if layer.name != kept)
    model = plugin.plugin_model(typed, rest, {kept: (linear.weight.numpy(), linear.bias.numpy())})
    onnx.checker.check_model(model, full_check=True)
    held = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    weight = linear.weight.numpy().T.astype(np.float16)
    assert any(array.dtype == np.float16 and np.array_equal(array, weight) for array in held)


def test_same_layers_same_bytes(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any, tmp_path: Path) -> None:
    before = traced_wan.SerializeToString(deterministic=True)
    for name in ("a.onnx", "b.onnx"):
        save_model(lower(traced_wan, rtn_layers(wan_model, 16, rank=1)), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert traced_wan.SerializeToString(deterministic=True) == before


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "nodes"), [("wan", 14), ("latte", 11), ("cogvideox", 8)])
def test_merging_changes_nothing(
    family: str, nodes: int, wide_models: Any, wide_inputs: Any, wide_traced: Any, rtn_layers: Any
) -> None:
    transformer, inputs = wide_models[family], wide_inputs[family]
    layers, traced = rtn_layers(transformer, 4, rank=1), wide_traced(family)
    merged, single = lower(traced, layers), lower(traced, layers, merge=False)
    assert sum(node.domain == "qvdit" for node in single.graph.node) == len(layers)
    assert sum(node.domain == "qvdit" for node in merged.graph.node) == nodes
    onnx.checker.check_model(merged, full_check=True)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in merged.graph.value_info}
    split = [node for node in merged.graph.node if node.name.endswith(":split")]
    assert {shapes[node.input[0]][-1].dim_value for node in split} == ({384} if family == "cogvideox" else {256, 384})
    found = {layer.name: layer for layer in plugin.with_placeholders(merged)[1]}
    for layer in layers:
        assert_same_layer(found[layer.name], layer)
    np.testing.assert_array_equal(in_onnxruntime(merged, inputs), in_onnxruntime(single, inputs))
    quantized = run_torch(quantized_transformer(transformer, layers), inputs)
    assert relative_error(in_onnxruntime(merged, inputs), quantized) < 0.02


def test_layers_that_quantize_differently_stay_apart(
    traced_wan: onnx.ModelProto, wan_model: Any, low_bit_layer: Any
) -> None:
    names = [f"blocks.0.attn1.to_{part}" for part in "qkv"]
    layers = [low_bit_layer(128, 128, parts=("smooth",), seed=i, name=name) for i, name in enumerate(names)]
    assert [len(group) for group in plugin.same_input(traced_wan, layers)] == [3]
    other = dataclasses.replace(layers[2], inv_smooth=layers[2].inv_smooth * 2)
    assert [len(group) for group in plugin.same_input(traced_wan, [*layers[:2], other])] == [1, 1, 1]
    across = [low_bit_layer(128, 128, name=f"blocks.{i}.attn2.to_k", seed=i) for i in range(2)]
    assert [len(group) for group in plugin.same_input(traced_wan, across)] == [1, 1]
