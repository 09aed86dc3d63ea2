"""INT4 weights in floating-point products: TensorRT's rules, and the numbers in ONNX Runtime."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from qvdit.contract import FrameRows, LowBitLayer, QvditError, StaticInt8Layer
from qvdit.contract.bundle import MANIFEST, TENSORRT_INT4_MODEL, TENSORRT_MODEL, read_manifest, verify
from qvdit.contract.parity import relative_error
from qvdit.export import weight_only
from qvdit.export.functions import DOMAIN, NODE
from qvdit.export.tensorrt import TracedModel, export_weight_only
from qvdit.export.weight_only import WEIGHT_ONLY_OPSET, balanced, unfit, weight_only_model

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
SHAPES = {
    "none": (2, 6),
    "sequence": (2, 4 * 3),
    "spatial": (2 * 4, 3),
    "temporal": (5, 4),
}  # batch and tokens, 4 frames


def one_layer(layer: LowBitLayer, kind: str = "float32") -> onnx.ModelProto:
    """A layer's weight-only form as a model, checked in full."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(NODE, ["x"], ["y"], domain=DOMAIN, layer=layer.name)
    (n, k), of = layer.shape, TYPES[kind]
    x, y = value("x", of, ["batch", "tokens", k]), value("y", of, ["batch", "tokens", n])
    typed = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", [x], [y], value_info=[y]),
        opset_imports=[onnx.helper.make_opsetid("", WEIGHT_ONLY_OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    model = weight_only_model(typed, [layer], {})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """In ONNX Runtime as it is written: optimized, it would round the inputs of these products to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def input_of(layer: LowBitLayer, seed: int = 0) -> np.ndarray:
    shape = (*SHAPES[layer.rows.value], layer.shape[1])
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)


def expected_of(layer: LowBitLayer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operator on activations that are not quantized, and Σ |terms|, in float64."""
    n = layer.shape[0]
    inside = x.astype(np.float64) if layer.inv_smooth is None else x.astype(np.float64) * layer.inv_smooth
    weight = layer.weight_q * np.repeat(layer.weight_scale.reshape(n, -1).astype(np.float64), layer.group, 1)
    y, size = inside @ weight.T, np.abs(inside) @ np.abs(weight.T)
    if layer.rank:
        gain: Any = 1.0
        if layer.frame_gain is not None:
            rows = np.arange(x[..., 0].size).reshape(x.shape[:-1])
            frame = rows // layer.rows.tokens_per_frame(x.shape[-2], 4) % 4
            gain = layer.frame_gain[frame][..., None].astype(np.float64)
        alpha, beta = layer.alpha.astype(np.float64), layer.beta.astype(np.float64)
        y, size = y + gain * (inside @ alpha) @ beta, size + abs(gain) * (np.abs(inside) @ abs(alpha)) @ abs(beta)
    return (y, size) if layer.bias is None else (y + layer.bias, size + abs(layer.bias))


def assert_right(layer: LowBitLayer, kind: str, seed: int = 0) -> None:
    x = input_of(layer, seed)
    found = run(one_layer(layer, kind), {"x": x.astype(kind)})
    expected, size = expected_of(layer, x)
    assert (found.dtype, found.shape) == (np.dtype(kind), expected.shape)
    assert np.abs(found - expected).max() <= (8 * np.finfo(kind).eps * size + np.finfo(kind).tiny).max()
    assert (np.abs(found - expected) <= 16 * np.finfo(kind).eps * size + np.finfo(kind).tiny).all()


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


# One layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", list(FrameRows))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_part(bits: int, rows: FrameRows, kind: str, low_bit_layer: Any) -> None:
    gain = () if rows is FrameRows.NONE else ("gain",)
    assert_right(low_bit_layer(7, 128, bits, ("bias", "smooth", *gain), rank=3, rows=rows), kind)


def test_any_layer(low_bit_layer: Any) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        n=st.integers(1, 12),
        blocks=st.integers(1, 5),
        bits=st.sampled_from([2, 3, 4]),
        parts=st.sets(st.sampled_from(["bias", "smooth", "gain"])).map(tuple),
        rank=st.sampled_from([0, 1, 4]),
        kind=st.sampled_from(list(TYPES)),
        seed=st.integers(0, 999),
    )
    def check(n: int, blocks: int, bits: int, parts: tuple[str, ...], rank: int, kind: str, seed: int) -> None:
        layer = low_bit_layer(n, 64 * blocks, bits, parts, rank=rank, seed=seed)
        if not rank:
            layer = replace(layer, frame_gain=None, rows=FrameRows.NONE)
        assert_right(layer, kind, seed)

    check()


@pytest.mark.parametrize(("k", "block"), [(64, 64), (128, 128), (192, 64), (384, 128)])
def test_the_weight_is_as_tensorrt_wants_it(k: int, block: int, low_bit_layer: Any) -> None:
    layer = low_bit_layer(6, k, 4)
    model = one_layer(layer, "float16")
    dequantize, product = model.graph.node
    assert (dequantize.op_type, product.op_type) == ("DequantizeLinear", "MatMul")
    assert list(product.input) == ["x", dequantize.output[0]]
    given = {a.name: onnx.helper.get_attribute_value(a) for a in dequantize.attribute}
    assert given == {"axis": 0, "block_size": block}
    integers, scale = (constants_of(model)[name] for name in dequantize.input)
    assert (integers.data_type, list(integers.dims)) == (TensorProto.INT4, [k, 6])
    assert (scale.data_type, list(scale.dims)) == (TensorProto.FLOAT16, [k // block, 6])
    assert len(integers.raw_data) == k * 6 // 2
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(integers).astype(np.int8), layer.weight_q.T)
    expected = np.broadcast_to(layer.weight_scale.astype(np.float16), (k // block, 6))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(scale), expected)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21}


def test_groups_are_blocks(low_bit_layer: Any) -> None:
    scale = (np.random.default_rng(0).random((5, 3)) * 0.1 + 0.01).astype(np.float32)
    layer = low_bit_layer(5, 192, 4, weight_scale=scale)
    assert onnx.helper.get_node_attr_value(one_layer(layer).graph.node[0], "block_size") == 64
    assert_right(layer, "float32")


def test_scales_stay_positive(low_bit_layer: Any) -> None:
    """A row of zeros may have any scale; FP16 rounds the smallest to 0, which TensorRT refuses."""
    layer = low_bit_layer(3, 64, 4)
    layer.weight_q[1], layer.weight_scale[1] = 0, 1e-12
    model = one_layer(layer, "float16")
    assert (onnx.numpy_helper.to_array(constants_of(model)["layer0:weight_scale"]) > 0).all()
    assert_right(layer, "float16")


def test_the_correction_fits_half_precision(low_bit_layer: Any) -> None:
    """x · alpha alone is beyond FP16 here; the term is not."""
    layer = low_bit_layer(4, 64, 4, rank=1)
    layer.alpha[:], layer.beta[:] = 1000, 1e-4
    x = np.full((2, 6, 64), 4, np.float32)
    expected, size = expected_of(layer, x)
    found = run(one_layer(layer, "float16"), {"x": x.astype(np.float16)})
    assert (np.abs(found - expected) <= 16 * np.finfo(np.float16).eps * size).all()
    alpha, beta = balanced(layer)
    assert np.abs(beta).max() == 1
    np.testing.assert_allclose(alpha @ beta, layer.alpha.astype(np.float32) @ layer.beta, rtol=1e-6)
    layer.beta[:] = 0
    assert not np.isnan(balanced(layer)[1]).any()


# What does not fit ----------------------------------------------------------------------------------------------------


def test_reasons(low_bit_layer: Any) -> None:
    one = np.ones
    static = StaticInt8Layer("s", one((4, 64), np.int8), one(4, np.float32), np.float32(1))
    grouped = one((4, 4), np.float32)
    assert unfit(low_bit_layer(4, 64)) is None
    assert unfit(static) == "static INT8"
    assert unfit(low_bit_layer(4, 64, 6)) == "6 bits"
    assert unfit(low_bit_layer(4, 64, 4, ("zero",))) == "zero points"
    assert unfit(low_bit_layer(4, 64, rotation=64)) == "a rotation of 64 features"
    assert unfit(low_bit_layer(4, 96)) == "96 input features"
    assert unfit(low_bit_layer(4, 64, weight_scale=grouped)) == "groups of 16 features"
    with pytest.raises(QvditError, match=r"1 layers that .* as layer0 \(8 bits\)") as caught:
        weight_only_model(onnx.ModelProto(), [low_bit_layer(4, 64, seed=1), low_bit_layer(4, 64, 8)], {})
    assert "\n" not in str(caught.value)


# A whole model --------------------------------------------------------------------------------------------------------


def test_a_model(wide_models: Any, rtn_layers: Any, wide_inputs: Any, tmp_path: Path) -> None:
    """In FP16 where that is enough, it is PyTorch's model with the weights' values in place of the weights."""
    import copy

    from qvdit.export.trace import trace
    from qvdit.models import ADAPTERS

    model, inputs = wide_models["wan"], wide_inputs["wan"]
    adapter = next(a for a in ADAPTERS if a.class_name == "WanTransformer3DModel")
    layers = rtn_layers(model, 4, rank=1)
    fitting = tuple(layer for layer in layers if unfit(layer) is None)
    assert 0 < len(fitting) < len(layers)  # its MLP has 160 features
    linears = {layer.name: model.get_submodule(layer.name) for layer in layers}
    full = {name: (m.weight.numpy(), None if m.bias is None else m.bias.numpy()) for name, m in linears.items()}
    onnx.save(trace(model, adapter, {n: m.out_features for n, m in linears.items()}, inputs), tmp_path / "traced.onnx")
    (path,) = export_weight_only(TracedModel(tmp_path / "traced.onnx", fitting, full, {}), tmp_path)
    assert path == tmp_path / TENSORRT_INT4_MODEL
    written = onnx.load(path)
    products = [node.op_type for node in written.graph.node].count("DequantizeLinear")
    assert products == len(fitting)
    assert not {"LowBitLinear", "Gelu", "QuantizeLinear"} & {node.op_type for node in written.graph.node}
    reference = copy.deepcopy(model)
    for layer in fitting:
        weight = layer.weight_q * layer.weight_scale[:, None]
        reference.get_submodule(layer.name).weight.copy_(torch.from_numpy(weight))
    found = run(path, {name: value.numpy() for name, value in inputs.items()})
    plain = reference(**inputs, return_dict=False)[0].numpy()
    assert relative_error(found, plain) > 1e-2  # TQE's term is not in that model
    without = tuple(replace(layer, alpha=None, beta=None, frame_gain=None, rows=FrameRows.NONE) for layer in fitting)
    (path,) = export_weight_only(TracedModel(tmp_path / "traced.onnx", without, full, {}), tmp_path)
    found = run(path, {name: value.numpy() for name, value in inputs.items()})
    assert relative_error(found, plain) < 3e-3


# The job --------------------------------------------------------------------------------------------------------------


def test_the_job_writes_it_where_it_is_asked_for(
    bundle: Path, make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only, "BLOCKS", (16,))  # the tiny model has 32 and 48 features
    out = shutil.copytree(bundle, tmp_path / "bundle")
    make_job(out, target="tensorrt", weight_only=True).run("export")
    assert {TENSORRT_MODEL, TENSORRT_INT4_MODEL} <= set(verify(out).files)
    written = (out / TENSORRT_INT4_MODEL).read_bytes()
    make_job(out, target="tensorrt").run("export")
    assert TENSORRT_INT4_MODEL not in read_manifest(out).files
    assert not (out / TENSORRT_INT4_MODEL).exists()
    (out / MANIFEST).unlink()
    make_job(out, target="tensorrt", weight_only=True).run("export")
    assert (out / TENSORRT_INT4_MODEL).read_bytes() == written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "32 input features"),
        ({"bits": "w6a6"}, "6 bits"),
        ({"recipe": "quarot"}, "a rotation of 32 features"),
        ({"recipe": "q-vdit-paper"}, "zero points"),
        ({"recipe": "int8-static", "bits": "w8a8"}, "--weight-only with recipe int8-static"),
        ({"target": "onnxruntime"}, "--weight-only with --target onnxruntime"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_at_once(
    changes: dict[str, str], said: str, make_job: Any, tmp_path: Path
) -> None:
    with pytest.raises(QvditError, match="--weight-only") as caught:
        make_job(tmp_path / "out", **{"target": "tensorrt", "weight_only": True, **changes}).run()
    assert said in str(caught.value)
    assert not list((tmp_path / "out").rglob("shard-*"))
