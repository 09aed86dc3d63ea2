"""Frozen layers: what they take, counted by hand, and where their frames are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qvdit.contract import FrameRows, LowBitLayer, StaticInt8Layer
from qvdit.contract.layer import WeightSize, arrays


def low_bit(n: int, k: int, bits: int, **optional: np.ndarray) -> LowBitLayer:
    fixed = {"weight_q": np.zeros((n, k), np.int8), "weight_scale": np.ones(n, np.float32)}
    return LowBitLayer("layer", bits, 8, True, FrameRows.NONE, **{**fixed, **optional})


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# N = 5, K = 33: a row is padded to 64 values.
@pytest.mark.parametrize(
    ("bits", "optional", "expected"),
    [
        (3, {}, 5 * 64 * 3 + 5 * 32),
        (2, {}, 5 * 64 * 2 + 5 * 32),
        (8, {"bias": floats(5)}, 5 * 64 * 8 + 5 * 32),
        (4, {"weight_zero": np.zeros(5, np.int8)}, 5 * 64 * 4 + 5 * 32 + 5 * 8),
        (4, {"weight_scale": floats(5, 3)}, 5 * 64 * 4 + 15 * 32),
        (
            2,
            {"weight_scale": floats(5, 11), "weight_zero": np.zeros((5, 11), np.int8)},
            5 * 64 * 2 + 55 * 32 + 55 * 8,
        ),
        (4, {"inv_smooth": 2 * floats(33)}, 5 * 64 * 4 + 5 * 32 + 33 * 32),
        (4, {"inv_smooth": np.resize(np.float32([1, -1, -1]), 33)}, 5 * 64 * 4 + 5 * 32 + 40),
        (6, {"alpha": floats(33, 2), "beta": floats(2, 5)}, 5 * 64 * 6 + 5 * 32 + 66 * 32 + 10 * 32),
        (
            3,
            {"alpha": floats(33, 1), "beta": floats(1, 5), "frame_gain": floats(16), "bias": floats(5)},
            5 * 64 * 3 + 5 * 32 + 33 * 32 + 5 * 32 + 16 * 32,
        ),
    ],
)
def test_stored_bits_of_a_low_bit_layer(bits, optional, expected):
    layer = low_bit(5, 33, bits, **optional)
    assert layer.stored_bits() == expected
    assert layer.shape == (5, 33)
    assert layer.rank == (layer.alpha.shape[1] if "alpha" in optional else 0)


@pytest.mark.parametrize(
    ("optional", "told"),
    [
        ({"weight_scale": floats(4)}, r"scales of shape \(4,\) for weights of shape \(5, 24\)"),
        ({"weight_scale": floats(5, 7)}, r"scales of shape \(5, 7\)"),
        ({"weight_scale": floats(5, 1)}, r"scales of shape \(5, 1\)"),  # one group has no dimension of its own
        ({"weight_scale": floats(5, 3), "weight_zero": np.zeros(5, np.int8)}, r"zeros of shape \(5,\) beside"),
        ({"rotation": 3}, "a rotation of 3 features, no power of two that divides 24"),
        ({"rotation": 16}, "a rotation of 16 features"),
        ({"rotation": 1}, "a rotation of 1 features"),
        ({"rotation": -8}, "a rotation of -8 features"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(optional, told):
    with pytest.raises(ValueError, match=told):
        low_bit(5, 24, 4, **optional)


@pytest.mark.parametrize(("groups", "group"), [((), 24), ((2,), 12), ((24,), 1)])
def test_group(groups, group):
    assert low_bit(5, 24, 4, weight_scale=floats(5, *groups), rotation=8).group == group


def test_stored_bits_without_padding():
    assert low_bit(4, 64, 3).stored_bits() == 4 * 64 * 3 + 4 * 32


@pytest.mark.parametrize("smooth", [False, True])
def test_stored_bits_of_a_static_layer(smooth):
    layer = StaticInt8Layer(
        "layer",
        np.zeros((4, 64), np.int8),
        floats(4),
        np.array(0.5, np.float32),
        bias=floats(4),
        inv_smooth=floats(64) if smooth else None,
    )
    assert layer.stored_bits() == 4 * 64 * 8 + 4 * 32 + 32 + (64 * 32 if smooth else 0)


def test_weight_size_adds_layers_up():
    three, eight = low_bit(5, 32, 3), low_bit(3, 64, 8)
    # 160 weights in 480 + 160 bits, 192 weights in 1536 + 96 bits
    size = WeightSize.of(layer for layer in (three, eight))
    assert size == WeightSize(
        weights=352,
        fp16_bytes=704,
        quantized_bytes=284,
        nominal_bits=(160 * 3 + 192 * 8) / 352,
        effective_bits=2272 / 352,
    )


def test_weight_size_rounds_bytes_up_and_takes_no_layers():
    odd = low_bit(1, 1, 2)
    assert WeightSize.of([odd]).quantized_bytes == (32 * 2 + 32) // 8
    assert WeightSize.of([]) == WeightSize(0, 0, 0, 0.0, 0.0)


def test_arrays_leaves_out_what_is_absent():
    layer = low_bit(2, 3, 4, bias=floats(2))
    assert set(arrays(layer)) == {"weight_q", "weight_scale", "bias"}
    assert arrays(layer)["bias"] is layer.bias


def test_layers_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        low_bit(1, 1, 4).weight_bits = 3


@pytest.mark.parametrize(
    ("rows", "length", "expected"),
    [
        (FrameRows.NONE, 77, 1),
        (FrameRows.SEQUENCE, 48, 12),  # [B, T·P, K]
        (FrameRows.SPATIAL, 48, 48),  # [B·T, P, K]
        (FrameRows.TEMPORAL, 4, 1),  # [B·S, T, K]
    ],
)
def test_tokens_per_frame(rows, length, expected):
    assert rows.tokens_per_frame(length, 4) == expected
