"""Both bodies of ``LowBitLinear`` in ONNX Runtime against the eager operator."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvdit.contract import ACT_BITS, WEIGHT_BITS, FrameRows, LowBitLayer
from qvdit.contract.layer import group_size, rotation_block
from qvdit.contract.parity import compare_layer
from qvdit.export import graph
from qvdit.export.functions import ATTRIBUTES, DOMAIN, INPUTS, NODE, OPSET, Variant, function
from qvdit.method.lowbit import LowBitLinear
from qvdit.method.reference import layer_reference
from qvdit.runtimes.layers import LayerModels
from qvdit.runtimes.onnxruntime import saturates, session, session_options
from qvdit.runtimes.signed import signed_model

BODIES = ("qdq", "integer")
GAIN_ROWS = (FrameRows.SEQUENCE, FrameRows.SPATIAL, FrameRows.TEMPORAL)
FRAMES = 3
EPS = float(np.finfo(np.float32).eps)
TENSOR_TYPES = {np.float32: onnx.TensorProto.FLOAT, np.float16: onnx.TensorProto.FLOAT16}


def make_layer(
    weight_bits: int = 4,
    act_bits: int = 8,
    act_symmetric: bool = True,
    zero: bool = False,
    bias: bool = False,
    smooth: bool = False,
    rank: int = 0,
    rows: FrameRows = FrameRows.NONE,
    n: int = 7,
    k: int = 13,
    seed: int = 0,
    group: int = 0,
    rotate: bool = False,
) -> LowBitLayer:
    """A random layer with the parts asked for; ``rows`` other than NONE gives it distinct frame gains."""
    rng = np.random.default_rng(seed)
    half = 1 << (weight_bits - 1)
    weight_q = rng.integers(-half, half, (n, k)).astype(np.int8)
    weight_q.flat[:2] = -half, half - 1  # both ends of the range, always
    gained = rank and rows is not FrameRows.NONE
    size = group_size(k, group)
    grouped = (n,) if size == k else (n, k // size)
    return LowBitLayer(
        name="linear",
        weight_bits=weight_bits,
        act_bits=act_bits,
        act_symmetric=act_symmetric,
        rows=rows if gained else FrameRows.NONE,
        weight_q=weight_q,
        weight_scale=(rng.random(grouped) * 0.1 + 0.01).astype(np.float32),
        weight_zero=rng.integers(-half, half, grouped).astype(np.int8) if zero else None,
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
        inv_smooth=(rng.random(k) * 2 + 0.1).astype(np.float32) if smooth else None,
        alpha=rng.standard_normal((k, rank)).astype(np.float32) if rank else None,
        beta=rng.standard_normal((rank, n)).astype(np.float32) if rank else None,
        frame_gain=np.linspace(0.5, 2.0, FRAMES, dtype=np.float32) if gained else None,
        rotation=rotation_block(k) if rotate else 0,
    )


def make_input(layer: LowBitLayer, seed: int = 1, spread: float = 3.0) -> np.ndarray:
    """Rows of very different sizes in the layer's layout, two samples: float32 [B, L, K]."""
    shape = {"none": (2, 5), "sequence": (2, FRAMES * 4), "spatial": (2 * FRAMES, 4), "temporal": (5, FRAMES)}
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (*shape[layer.rows.value], 1)))
    return (rng.standard_normal((*shape[layer.rows.value], layer.shape[1])) * size).astype(np.float32)


def as_model(*layers: LowBitLayer, body: Any, dtype: type = np.float32) -> onnx.ModelProto:
    """A chain of layers as an exported model, from ``x`` to ``y``."""
    value, kind = onnx.helper.make_tensor_value_info, TENSOR_TYPES[dtype]
    names = ["x", *(f"y{index}" for index in range(1, len(layers))), "y"]
    nodes = [
        onnx.helper.make_node(NODE, [before], [after], domain=DOMAIN, layer=layer.name)
        for layer, before, after in zip(layers, names, names[1:], strict=False)
    ]
    traced = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "chain",
            [value("x", kind, ["batch", "tokens", layers[0].shape[1]])],
            [value("y", kind, ["batch", "tokens", layers[-1].shape[0]])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return graph.quantized_model(traced, layers, body)


def run_onnx(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    return session(model.SerializeToString(), 1).run(None, {"x": x})[0]


def magnitude(layer: LowBitLayer, x: np.ndarray) -> np.ndarray:
    """Σ |terms| of every output in float64, with which rounding errors grow."""
    module = LowBitLinear(layer)
    rows = module.quantize(torch.from_numpy(x))
    scale, inside = rows.scale.double().numpy(), np.abs(rows.centred().double().numpy())
    weight = np.abs(module.centred_weight().double().numpy())
    weight = weight * np.repeat(layer.weight_scale.reshape(len(weight), -1), layer.group, axis=1)
    total = scale * (inside @ weight.T)
    if layer.rank:
        gain = 1.0 if layer.frame_gain is None else layer.frame_gain.max()
        total = total + gain * scale * (inside @ np.abs(layer.alpha).astype(np.float64)) @ np.abs(layer.beta)
    return total if layer.bias is None else total + np.abs(layer.bias)


def assert_same(found: np.ndarray, layer: LowBitLayer, x: np.ndarray) -> None:
    """``found`` is the eager operator's output, up to float32 rounding of its terms."""
    expected = LowBitLinear(layer)(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    ratio = np.abs(found.astype(np.float64) - expected) / (EPS * magnitude(layer, x))
    assert ratio.max() < 4


def assert_integers(layer: LowBitLayer, x: np.ndarray, folder: Path) -> None:
    """x_q and acc of the integer body, as the layer runs in ONNX Runtime, are the eager operator's; signed ones too."""
    path = folder / "layer.onnx"
    path.write_bytes(as_model(layer, body="integer").SerializeToString())
    assert_file(path, layer, x)
    path.write_bytes(signed_model(path).SerializeToString())
    onnx.checker.check_model(path, full_check=True)
    assert_file(path, layer, x)


def assert_file(path: Path, layer: LowBitLayer, x: np.ndarray) -> None:
    per_frame = layer.rows.tokens_per_frame(x.shape[-2], FRAMES)
    found = LayerModels(path, 1).run("linear", x, per_frame)
    reference = layer_reference(LowBitLinear(layer), torch.from_numpy(x))
    np.testing.assert_array_equal(found.x_q, reference.outputs.x_q)
    np.testing.assert_array_equal(found.acc, reference.outputs.acc)
    parity = compare_layer(reference, found)
    groups = layer.shape[1] // layer.group
    assert (parity.xq_mismatches, parity.acc_mismatches) == (0, 0)
    assert parity.acc_compared == groups * found.x_q.shape[0] * layer.shape[0]
    assert_same(found.y, layer, x)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_output_with_every_part(weight_bits: int, act_bits: int, act_symmetric: bool, body: str) -> None:
    layer = make_layer(
        weight_bits, act_bits, act_symmetric, zero=True, bias=True, smooth=True, rank=3, rows=FrameRows.SEQUENCE
    )
    x = make_input(layer)
    assert_same(run_onnx(as_model(layer, body=body), x), layer, x)


@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "no-zero"])
def test_integers_are_equal(weight_bits: int, act_bits: int, act_symmetric: bool, zero: bool, tmp_path: Path) -> None:
    layer = make_layer(weight_bits, act_bits, act_symmetric, zero=zero, n=31, k=257)
    assert_integers(layer, make_input(layer), tmp_path)


SHAPED = {"grouped": {"group": 8}, "rotated": {"rotate": True}, "both": {"group": 16, "rotate": True}}


@pytest.mark.parametrize("shaped", SHAPED)
@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_groups_and_rotation(weight_bits: int, act_bits: int, act_symmetric: bool, shaped: str, tmp_path: Path) -> None:
    for zero in (True, False):
        layer = make_layer(weight_bits, act_bits, act_symmetric, zero=zero, bias=True, n=5, k=48, **SHAPED[shaped])
        x = make_input(layer)
        assert_integers(layer, x, tmp_path)
        assert_same(run_onnx(as_model(layer, body="qdq"), x), layer, x)


@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("k", [192, 256, 640])
def test_rotated_integers_at_real_sizes(k: int, act_symmetric: bool, tmp_path: Path) -> None:
    """The butterfly's bits are the same in both runtimes: a last bit off would move an x_q sooner or later."""
    layer = make_layer(4, 8, act_symmetric, zero=True, smooth=True, n=9, k=k, group=64, rotate=True)
    assert layer.rotation == {192: 64, 256: 256, 640: 128}[k]
    for seed in range(3):
        x = np.repeat(make_input(layer, seed), 8, axis=1)
        assert_integers(layer, x * np.random.default_rng(seed).lognormal(0, 2, x.shape).astype(np.float32), tmp_path)


def test_many_variants_share_a_model() -> None:
    layers = tuple(replace(make_layer(n=32, k=32, **parts), name=name) for name, parts in SHAPED.items())
    model = as_model(*layers, body="integer")
    overloads = ["a8_symmetric_group8", "a8_symmetric_rotation32", "a8_symmetric_group16_rotation32"]
    assert [f.overload for f in model.functions] == overloads
    assert [onnx.helper.get_node_attr_value(node, "rotation") for node in model.graph.node] == [0, 32, 32]
    x = expected = make_input(layers[0])
    for layer in layers:
        expected = LowBitLinear(layer)(torch.from_numpy(expected)).numpy()
    assert np.linalg.norm(run_onnx(model, x) - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("rows", GAIN_ROWS)
@pytest.mark.parametrize("rank", [1, 3])
def test_frame_gain_follows_the_rows(rank: int, rows: FrameRows, body: str) -> None:
    layer = make_layer(rank=rank, rows=rows, bias=True)
    x = make_input(layer)
    found = run_onnx(as_model(layer, body=body), x)
    assert_same(found, layer, x)
    without = run_onnx(as_model(replace(layer, frame_gain=None, rows=FrameRows.NONE), body=body), x)
    assert not np.allclose(found, without, rtol=1e-3)


@pytest.mark.parametrize("body", BODIES)
def test_frame_gain_of_each_row_is_exact(body: str) -> None:
    """Rows that the integer product ignores show the gains alone: x = 1, weights 0, alpha = beta = 1."""
    layer = make_layer(rank=1, rows=FrameRows.SEQUENCE, n=1, k=1)
    ones = {"alpha": np.ones((1, 1), np.float32), "beta": np.ones((1, 1), np.float32)}
    layer = replace(layer, weight_q=np.zeros((1, 1), np.int8), **ones)
    found = run_onnx(as_model(layer, body=body), np.full((2, FRAMES * 4, 1), 127, np.float32))
    np.testing.assert_array_equal(found[..., 0] / 127, np.tile(np.repeat(layer.frame_gain, 4), (2, 1)))


layers = st.builds(
    make_layer,
    weight_bits=st.sampled_from(WEIGHT_BITS),
    act_bits=st.sampled_from(ACT_BITS),
    act_symmetric=st.booleans(),
    zero=st.booleans(),
    bias=st.booleans(),
    smooth=st.booleans(),
    rank=st.sampled_from([0, 1, 3]),
    rows=st.sampled_from(list(FrameRows)),
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    group=st.sampled_from([0, 1, 4, 16]),
    rotate=st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers, seed=st.integers(0, 2**31))
def test_any_layer(layer: LowBitLayer, seed: int, tmp_path: Path) -> None:
    x = make_input(layer, seed)
    for body in BODIES:
        assert_same(run_onnx(as_model(layer, body=body), x), layer, x)
    assert_integers(layer, x, tmp_path)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("shaped", [{"k": 13}, {"k": 16, "group": 4}, {"k": 24, "rotate": True}], ids=str)
@pytest.mark.parametrize("bad", [(np.nan,), (np.inf,), (-np.inf,), (np.inf, -np.inf), (np.nan, np.inf)], ids=str)
def test_bad_rows_give_nan_and_spoil_no_other(
    bad: tuple[float, ...], shaped: dict[str, Any], rank: int, act_symmetric: bool, body: str
) -> None:
    layer = make_layer(act_symmetric=act_symmetric, zero=True, bias=True, rank=rank, **shaped)
    x = make_input(layer)
    model = as_model(layer, body=body)
    clean = run_onnx(model, x)
    x[1, 2, 3 : 3 + len(bad)] = bad
    found = run_onnx(model, x)
    assert np.isnan(found[1, 2]).all()
    good = np.ones(found.shape[:2], bool)
    good[1, 2] = False
    np.testing.assert_array_equal(found[good], clean[good])
    eager = LowBitLinear(layer)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(eager))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rows_of_zeros_give_the_bias(act_symmetric: bool, body: str) -> None:
    layer = make_layer(act_symmetric=act_symmetric, zero=True, bias=True, rank=1)
    found = run_onnx(as_model(layer, body=body), np.zeros((1, 2, 13), np.float32))
    np.testing.assert_array_equal(found[0], np.stack([layer.bias, layer.bias]))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_huge_finite_rows_stay_finite(act_symmetric: bool, body: str) -> None:
    layer = make_layer(act_symmetric=act_symmetric)
    layer = replace(layer, weight_scale=np.full(7, 1e-4, np.float32))
    x = np.full((1, 2, 13), 1e38, np.float32)
    expected = LowBitLinear(layer)(torch.from_numpy(x)).numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(run_onnx(as_model(layer, body=body), x), expected, rtol=1e-5)


@pytest.mark.parametrize("act_symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_ties_round_to_even(act_symmetric: bool, tmp_path: Path) -> None:
    """Values exactly between two integers of the grid, where runtimes like to differ."""
    layer = make_layer(act_symmetric=act_symmetric, k=8)
    top = 127.0 if act_symmetric else 255.0
    x = np.array([[[top, 0.5, 1.5, 2.5, 3.5, 62.5, 63.5, 0.0]]], np.float32)
    assert_integers(layer, x, tmp_path)
    model = tmp_path / "layer.onnx"
    np.testing.assert_array_equal(LayerModels(model, 1).run("linear", x, 1).x_q, [[top, 0, 2, 2, 4, 62, 64, 0]])


@pytest.mark.parametrize("body", BODIES)
def test_half_precision_input_keeps_its_type(body: str) -> None:
    layer = make_layer(bias=True, rank=1)
    x = make_input(layer, spread=0.5).astype(np.float16)
    found = run_onnx(as_model(layer, body=body, dtype=np.float16), x)
    assert found.dtype == np.float16
    expected = LowBitLinear(layer)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_overloads_of_one_model_do_not_mix(body: str) -> None:
    first = make_layer(bias=True, n=13, k=13, seed=3)
    second = make_layer(2, 6, act_symmetric=False, zero=True, rank=1, n=5, k=13, seed=4)
    first, second = replace(first, name="first"), replace(second, name="second")
    model = as_model(first, second, body=body)
    assert [f.overload for f in model.functions] == ["a8_symmetric_bias", "a6_asymmetric_weight_zero_tqe"]
    assert [node.overload for node in model.graph.node] == [f.overload for f in model.functions]
    x = make_input(first)
    middle = run_onnx(as_model(first, body=body), x)
    np.testing.assert_array_equal(run_onnx(model, x), run_onnx(as_model(second, body=body), middle))


def test_overload_names_are_unique() -> None:
    flags = itertools.product([True, False], repeat=6)
    sizes = itertools.product([0, 8, 64], [0, 8, 64])
    variants = {
        Variant(*parts) for parts in ((b, *f, *s) for b in ACT_BITS for f, s in itertools.product(flags, sizes))
    }
    assert Counter(Counter(v.overload for v in variants).values()) == {1: len(variants)}
    assert len(variants) >= 64 * 9


@pytest.mark.parametrize("body", BODIES)
def test_every_function_declares_the_operator(body: Any) -> None:
    declared = function(Variant(8, True, True, True, True, True, True), body)
    assert (declared.domain, declared.name, declared.overload) == (
        "qvdit",
        "LowBitLinear",
        "a8_symmetric_weight_zero_bias_inv_smooth_tqe_frame_gain",
    )
    assert tuple(declared.input) == INPUTS
    assert tuple(declared.attribute) == ATTRIBUTES
    assert list(declared.output) == ["y"]
    products = {"qdq": {"MatMul", "Gemm"}, "integer": {"MatMulInteger", "MatMul", "Gemm"}}
    found = {node.op_type for node in declared.node}
    assert found & {"MatMul", "Gemm", "MatMulInteger"} == products[body]
    assert {"QuantizeLinear", "DequantizeLinear"} <= found
    assert {opset.domain: opset.version for opset in declared.opset_import} == {"": 21}


def test_node_tells_its_bits() -> None:
    layer = make_layer(3, 6, act_symmetric=False, zero=True)
    (node,) = as_model(layer, body="qdq").graph.node
    found = {name: onnx.helper.get_node_attr_value(node, name) for name in ATTRIBUTES}
    assert found == {"weight_bits": 3, "act_bits": 6, "act_symmetric": 0, "rotation": 0}
    assert list(node.input) == ["x", "linear:weight_q", "linear:weight_scale", "linear:weight_zero"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "as-written"])
@pytest.mark.parametrize("weight_bits", [6, 8])
def test_optimizations_change_no_integer(body: str, optimized: bool, weight_bits: int) -> None:
    if saturates() and weight_bits == 8 and body == "integer" and not optimized:
        pytest.skip("this CPU's products of 8-bit weights are exact only after an optimization")
    layer = make_layer(weight_bits, 8, act_symmetric=False, zero=True, bias=True, rank=1, n=16, k=64)
    options = session_options()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    model = as_model(layer, body=body).SerializeToString()
    run: Callable[..., Any] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run
    x = make_input(layer)
    assert_same(run(None, {"x": x})[0], layer, x)
