"""The eager operator against a second implementation of its definition: plain numpy, int64 and float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import ACT_BITS, WEIGHT_BITS, FrameRows, LowBitLayer
from qvdit.contract.layer import rotation_block
from qvdit.method import operator
from qvdit.method.lowbit import LowBitLinear

F32 = np.float32
EPS = float(np.finfo(F32).eps)


def quantize_rows(x: torch.Tensor, bits: int, symmetric: bool) -> operator.QuantizedRows:
    """Step 2 at a width."""
    return operator.quantize_rows(x, torch.tensor(float(operator.act_levels(bits, symmetric))), symmetric)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Rows flattened: M of them."""

    x_q: np.ndarray  # int64 [M, K]
    s_x: np.ndarray  # float32 [M]
    z_x: np.ndarray  # int64 [M]
    acc: np.ndarray  # int64 [M, N], or [C, M, N] for C groups
    y: np.ndarray  # float64 [M, N]
    terms: np.ndarray  # float64 [M, N]: sum of |terms| of y


def quantize_row(row: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.float32, int]:
    """Step 2 for one row of float32, operation by operation."""
    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        s_x = max(F32(np.abs(row).max()) / F32(qmax), F32(1e-8))
        return np.clip(np.rint(row / s_x), -qmax, qmax).astype(np.int64), s_x, 0
    low, high = min(row.min(), F32(0)), max(row.max(), F32(0))
    s_x = max(F32(high - low) / F32(2**bits - 1), F32(1e-8))
    z_x = np.rint(-low / s_x)
    return np.clip(np.rint(row / s_x) + z_x, 0, 2**bits - 1).astype(np.int64), s_x, int(z_x)


def reference(layer: LowBitLayer, x: np.ndarray, frame_of_row: list[int] | None = None) -> Expected:
    """Steps 1 to 4 for finite x, float32 [M, K]."""
    if layer.inv_smooth is not None:
        x = x * layer.inv_smooth
    half = 1
    while half < layer.rotation:  # features half apart: (a, b) → (a + b, a - b)
        first = [k for k in range(x.shape[1]) if not k & half]
        second = [k + half for k in first]
        turned = np.empty_like(x)
        turned[:, first], turned[:, second] = x[:, first] + x[:, second], x[:, first] - x[:, second]
        x, half = turned, 2 * half
    quantized = [quantize_row(row, layer.act_bits, layer.act_symmetric) for row in x]
    x_q, s_x = np.stack([q for q, _, _ in quantized]), np.array([s for _, s, _ in quantized], F32)
    z_x = np.array([z for _, _, z in quantized], np.int64)
    centred = x_q - z_x[:, None]
    n, k = layer.shape
    scales = layer.weight_scale.astype(np.float64).reshape(n, -1)
    zeros = np.zeros(scales.shape, np.int64)
    if layer.weight_zero is not None:
        zeros = layer.weight_zero.astype(np.int64).reshape(n, -1)
    accs = []
    for g in range(scales.shape[1]):
        part = slice(g * k // scales.shape[1], (g + 1) * k // scales.shape[1])
        accs.append(centred[:, part] @ (layer.weight_q[:, part].astype(np.int64) - zeros[:, g : g + 1]).T)
    acc = np.stack(accs)
    scale = s_x.astype(np.float64)[:, None]
    by_group = scale * np.einsum("cmn,nc->cmn", acc.astype(np.float64), scales)
    y, terms = by_group.sum(0), np.abs(by_group).sum(0)
    if layer.weight_scale.ndim == 1:
        acc = acc[0]
    if layer.alpha is not None:
        gain = np.ones((len(x), 1))
        if frame_of_row is not None:
            gain = np.array([float(layer.frame_gain[t]) for t in frame_of_row])[:, None]
        alpha, beta = layer.alpha.astype(np.float64), layer.beta.astype(np.float64)
        y = y + gain * (scale * (centred @ alpha)) @ beta
        terms = terms + np.abs(gain) * (scale * (np.abs(centred) @ np.abs(alpha))) @ np.abs(beta)
    if layer.bias is not None:
        y = y + layer.bias
        terms = terms + np.abs(layer.bias)
    return Expected(x_q, s_x, z_x, acc, y, terms)


def make_layer(
    seed: int,
    n: int,
    k: int,
    bits: int = 4,
    act_bits: int = 8,
    symmetric: bool = True,
    parts: tuple[str, ...] = (),
    rank: int = 1,
    frames: int = 0,
    rows: FrameRows = FrameRows.NONE,
    groups: int = 1,
) -> LowBitLayer:
    """A random layer; ``parts`` names what it has of zero, bias, smooth, tqe and rotation."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    grouped = (n,) if groups == 1 else (n, groups)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(F32)

    return LowBitLayer(
        name="layer",
        weight_bits=bits,
        act_bits=act_bits,
        act_symmetric=symmetric,
        rows=rows,
        weight_q=rng.integers(-half, half, (n, k)).astype(np.int8),
        weight_scale=(0.01 + rng.random(grouped)).astype(F32),
        weight_zero=rng.integers(-half, half, grouped).astype(np.int8) if "zero" in parts else None,
        bias=floats(n) if "bias" in parts else None,
        inv_smooth=np.exp(floats(k)) if "smooth" in parts else None,
        alpha=floats(k, rank) if "tqe" in parts else None,
        beta=floats(rank, n) if "tqe" in parts else None,
        frame_gain=(0.5 + rng.random(frames)).astype(F32) if frames else None,
        rotation=rotation_block(k) if "rotation" in parts else 0,
    )


def assert_agrees(layer: LowBitLayer, x: np.ndarray, frame_of_row: list[int] | None = None) -> np.ndarray:
    """Compare everything for one input [..., K]; returns y, [M, N]."""
    expected = reference(layer, x.reshape(-1, x.shape[-1]), frame_of_row)
    module = LowBitLinear(layer)
    rows = module.quantize(torch.from_numpy(x))
    m, n = expected.acc.shape[-2:]
    np.testing.assert_array_equal(rows.x_q.numpy().reshape(m, -1), expected.x_q)
    np.testing.assert_array_equal(rows.scale.numpy().reshape(m), expected.s_x)
    assert rows.scale.dtype == torch.float32
    assert (rows.zero is None) == layer.act_symmetric
    if rows.zero is not None:
        np.testing.assert_array_equal(rows.zero.numpy().reshape(m), expected.z_x)
    acc = module.accumulate(rows)
    assert acc.shape == (*expected.acc.shape[:-2], *x.shape[:-1], n)
    np.testing.assert_array_equal(acc.numpy().astype(np.int64).reshape(expected.acc.shape), expected.acc)
    y = module(torch.from_numpy(x))
    assert y.dtype == torch.float32
    assert y.shape == (*x.shape[:-1], n)
    y = y.numpy().reshape(m, n)
    assert (np.abs(y - expected.y) <= 8 * EPS * expected.terms + 1e-37).all()
    return y


@st.composite
def operator_cases(draw: st.DrawFn) -> tuple[LowBitLayer, np.ndarray]:
    seed = draw(st.integers(0, 2**32 - 1))
    k = draw(st.one_of(st.integers(1, 80), st.sampled_from([32, 64])))
    layer = make_layer(
        seed,
        n=draw(st.integers(1, 9)),
        k=k,
        bits=draw(st.sampled_from(WEIGHT_BITS)),
        act_bits=draw(st.sampled_from(ACT_BITS)),
        symmetric=draw(st.booleans()),
        parts=tuple(draw(st.sets(st.sampled_from(["zero", "bias", "smooth", "tqe", "rotation"])))),
        rank=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from([c for c in range(1, k + 1) if k % c == 0])),
    )
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((draw(st.integers(1, 6)), k)) * 10.0 ** draw(st.integers(-6, 6))
    if draw(st.booleans()):
        x = np.abs(x)  # one-sided rows: 0 must still be in the range
    return layer, x.astype(F32)


@given(operator_cases())
def test_integers_equal_and_floats_within_rounding(case):
    assert_agrees(*case)


@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-10, 0.0])
def test_rows_of_any_magnitude_beside_each_other(act_bits, symmetric, magnitude):
    layer = make_layer(1, 7, 45, act_bits=act_bits, symmetric=symmetric, parts=("zero", "bias", "tqe"))
    x = np.random.default_rng(2).standard_normal((3, 45)).astype(F32)
    alone = assert_agrees(layer, x)
    mixed = x.copy()
    mixed[1] *= F32(magnitude)
    together = assert_agrees(layer, mixed)
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30])
def test_rows_of_nothing_give_the_bias(symmetric, magnitude):
    layer = make_layer(3, 5, 33, symmetric=symmetric, parts=("zero", "bias", "tqe"))
    x = torch.full((2, 33), magnitude)
    rows = LowBitLinear(layer).quantize(x)
    assert (rows.scale == F32(1e-8)).all()
    assert (rows.centred() == 0).all()
    np.testing.assert_array_equal(LowBitLinear(layer)(x).numpy(), np.stack([layer.bias] * 2))


def test_rounding_is_half_to_even_by_hand():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.0]])
    rows = quantize_rows(x, 8, True)
    assert rows.scale.tolist() == [[1.0]]
    assert rows.x_q.tolist() == [[127, 0, 2, 2, 0, -2, -126, 0]]
    assert rows.zero is None
    x = torch.tensor([[-100.5, 154.5, 0.0, 0.5, 1.5, -0.5]])  # hi - lo = 255
    rows = quantize_rows(x, 8, False)
    assert rows.scale.tolist() == [[1.0]]
    assert rows.zero is not None
    assert rows.zero.tolist() == [[100]]
    assert rows.x_q.tolist() == [[0, 254, 100, 100, 102, 100]]
    x = torch.tensor([[31.0, -31.0, 30.5]])
    assert quantize_rows(x, 6, True).x_q.tolist() == [[31, -31, 30]]
    x = torch.tensor([[0.0, 63.0, 62.5]])
    assert quantize_rows(x, 6, False).x_q.tolist() == [[0, 63, 62]]


def test_the_scale_divides():
    """At exact halves a multiplication by the reciprocal goes to the wrong side sooner or later."""
    halves = np.concatenate([[127.0], np.arange(126) + 0.5]).astype(F32)
    scales = np.arange(1, 4001, 2).astype(F32)
    rows = quantize_rows(torch.from_numpy(scales[:, None] * halves), 8, True)
    np.testing.assert_array_equal(rows.scale[:, 0].numpy(), scales)
    np.testing.assert_array_equal(rows.x_q.numpy(), np.broadcast_to(np.rint(halves), rows.x_q.shape))
    reciprocal = np.rint(scales[:, None] * halves * (F32(1) / scales[:, None]))
    assert (reciprocal != np.rint(halves)).any()  # else this test could not fail


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 16, 32])
@pytest.mark.parametrize(("k", "shaped", "groups"), [(33, (), 1), (33, (), 3), (40, ("rotation",), 1)])
def test_nan_and_inf_make_their_row_nan_and_no_other(symmetric, value, position, k, shaped, groups):
    """Rotated: in blocks of 8 of 40 features, and yet the whole row."""
    layer = make_layer(4, 6, k, symmetric=symmetric, parts=("zero", "bias", "smooth", "tqe", *shaped), groups=groups)
    x = np.random.default_rng(5).standard_normal((2, 4, k)).astype(F32)
    clean = LowBitLinear(layer)(torch.from_numpy(x))
    x[1, 2, position] = value
    rows = LowBitLinear(layer).quantize(torch.from_numpy(x))
    assert rows.scale[..., 0].isnan().nonzero().tolist() == [[1, 2]]
    assert (rows.centred()[1, 2] == 0).all()
    y = LowBitLinear(layer)(torch.from_numpy(x))
    assert y[1, 2].isnan().all()
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(y[others], clean[others])
    assert clean.isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_and_inf_together_and_in_every_row(symmetric):
    layer = make_layer(4, 6, 33, symmetric=symmetric)
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[0, 4], x[1, 0], x[1, 1] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[2] = torch.nan
    assert LowBitLinear(layer)(x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shaped", [(), ("rotation",)], ids=["plain", "rotated"])
def test_the_output_has_the_inputs_type_and_is_computed_in_float32(dtype, shaped):
    layer = make_layer(6, 8, 40, parts=("zero", "bias", "smooth", "tqe", *shaped), groups=5 if shaped else 1)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = LowBitLinear(layer)(x)
    assert y.dtype == dtype
    assert torch.equal(y, LowBitLinear(layer)(x.float()).to(dtype))


def test_half_leaves_the_layers_arrays_alone():
    module = LowBitLinear(make_layer(6, 8, 40, parts=("tqe",))).half()
    assert {module.weight_scale.dtype, module.alpha.dtype, module.beta.dtype} == {torch.float32}
    assert module.weight_q.dtype == torch.int8


B, T, P = 2, 3, 4
LAYOUTS = {
    FrameRows.SEQUENCE: ((B, T * P), [t for _ in range(B) for t in range(T) for _ in range(P)]),
    FrameRows.SPATIAL: ((B * T, P), [t for _ in range(B) for t in range(T) for _ in range(P)]),
    FrameRows.TEMPORAL: ((B * P, T), [t for _ in range(B) for _ in range(P) for t in range(T)]),
}


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_frame_gain_follows_the_rows(rows, symmetric):
    shape, frame_of_row = LAYOUTS[rows]
    layer = make_layer(7, 5, 35, symmetric=symmetric, parts=("zero", "bias", "tqe"), rank=2, frames=T, rows=rows)
    x = np.random.default_rng(8).standard_normal((*shape, 35)).astype(F32)
    assert_agrees(layer, x, frame_of_row)


@pytest.mark.parametrize("rows", LAYOUTS)
def test_row_gains(rows):
    shape, frame_of_row = LAYOUTS[rows]
    gain = torch.tensor([10.0, 20.0, 30.0])
    found = operator.row_gains(gain, rows, torch.Size((*shape, 7)))
    assert found.shape == (*shape, 1)
    assert found.flatten().tolist() == [gain[t].item() for t in frame_of_row]


@pytest.mark.parametrize(("k", "in_float64"), [(257, False), (258, True), (513, True), (8191, True)])
def test_sums_beyond_float32_are_exact(k, in_float64):
    """8-bit weights with zero point -128 against asymmetric 8-bit activations: every product is 255 · 255."""
    weight_q = np.full((2, k), 127, np.int8)
    weight_q[1, 0] = 126
    layer = LowBitLayer(
        "layer", 8, 8, False, FrameRows.NONE, weight_q, np.ones(2, F32), weight_zero=np.full(2, -128, np.int8)
    )
    module = LowBitLinear(layer)
    rows = module.quantize(torch.ones(1, k))
    acc = module.accumulate(rows)
    assert acc.dtype == (torch.float64 if k * 255 * 256 >= 2**24 else torch.float32)
    assert (acc.dtype == torch.float64) == in_float64
    assert [int(a) for a in acc[0]] == [k * 255 * 255, k * 255 * 255 - 255]


def test_a_long_random_sum_is_exact():
    layer = make_layer(9, 4, 6001, bits=8, symmetric=False, parts=("zero",))
    x = np.abs(np.random.default_rng(10).standard_normal((3, 6001))).astype(F32) + F32(3)
    assert np.abs(reference(layer, x).acc).max() > 2**24
    assert_agrees(layer, x)


@pytest.mark.parametrize(
    ("bits", "symmetric", "levels"), [(8, True, 127), (6, True, 31), (8, False, 255), (6, False, 63)]
)
def test_act_levels(bits, symmetric, levels):
    assert operator.act_levels(bits, symmetric) == levels
