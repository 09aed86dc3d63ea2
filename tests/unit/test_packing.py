"""The canonical packing: one rule for every width, checked against bytes written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import WEIGHT_BITS
from qvdit.contract.packing import pack, pack_signs, packed_words, unpack, unpack_signs

# Codes u = q + 2^(b-1), five values and the padding (u of q = 0), value i in bits b·i … b·i + b - 1.
GOLDEN = {
    # u = 0 1 2 3 | 3 then 2s: 0b11_10_01_00, 0b10_10_10_11, 0b10_10_10_10 …
    2: ([-2, -1, 0, 1, 1], bytes([0xE4, 0xAB]) + bytes([0xAA]) * 6),
    # u = 0 7 5 3 6 then 4s: 0b100_100_100_110_011_101_111_000, 0b100_100_… three times
    3: ([-4, 3, 1, -1, 2], bytes([0x78, 0x67, 0x92]) + bytes([0x24, 0x49, 0x92]) * 3),
    # u = 0 15 | 7 8 | 11 then 8s
    4: ([-8, 7, -1, 0, 3], bytes([0xF0, 0x87, 0x8B]) + bytes([0x88]) * 13),
    # u = 0 63 31 32 | 37 then 32s: 0b100000_011111_111111_000000, 0b100000_100000_100000_100101 …
    6: ([-32, 31, -1, 0, 5], bytes([0xC0, 0xFF, 0x81, 0x25, 0x08, 0x82]) + bytes([0x20, 0x08, 0x82]) * 6),
    8: ([-128, 127, -1, 0, 5], bytes([0x00, 0xFF, 0x7F, 0x80, 0x85]) + bytes([0x80]) * 27),
}


def slow_pack(row: list[int], bits: int, padding: int) -> int:
    """A row as one long integer: the docstring's rule, word for word."""
    padded = [*row, *[padding] * (-len(row) % 32)]
    return sum((q + (1 << (bits - 1))) << (bits * i) for i, q in enumerate(padded))


@st.composite
def packed_cases(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray | None]:
    bits = draw(st.sampled_from(WEIGHT_BITS))
    n, k = draw(st.integers(1, 7)), draw(st.integers(1, 99))
    half = 1 << (bits - 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight_q = rng.integers(-half, half, (n, k)).astype(np.int8)
    groups = draw(st.sampled_from([(), *((c,) for c in range(2, k + 1) if k % c == 0)]))
    zero = rng.integers(-half, half, (n, *groups)).astype(np.int8) if draw(st.booleans()) else None
    return bits, weight_q, zero


@given(packed_cases())
def test_round_trip(case):
    bits, weight_q, zero = case
    words = pack(weight_q, bits, zero)
    assert words.dtype == np.uint32
    assert words.shape == (weight_q.shape[0], packed_words(weight_q.shape[1], bits))
    restored = unpack(words, bits, weight_q.shape[1])
    assert restored.dtype == np.int8
    np.testing.assert_array_equal(restored, weight_q)


@given(packed_cases())
def test_rows_are_the_documented_bit_string(case):
    bits, weight_q, zero = case
    for index, row in enumerate(pack(weight_q, bits, zero)):
        padding = 0 if zero is None else int(np.atleast_1d(zero[index])[-1])
        expected = slow_pack(weight_q[index].tolist(), bits, padding)
        assert int.from_bytes(row.astype("<u4").tobytes(), "little") == expected


@given(packed_cases())
def test_padding_is_the_zero_point(case):
    bits, weight_q, zero = case
    k = weight_q.shape[1]
    padded_k = -(-k // 32) * 32
    padding = unpack(pack(weight_q, bits, zero), bits, padded_k)[:, k:]
    expected = np.zeros(len(weight_q)) if zero is None else zero.reshape(len(zero), -1)[:, -1]
    np.testing.assert_array_equal(padding, np.repeat(expected[:, None], padded_k - k, axis=1))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_golden_bytes(bits):
    values, expected = GOLDEN[bits]
    words = pack(np.array([values], np.int8), bits)
    assert words.astype("<u4").tobytes() == expected
    assert len(expected) == 4 * bits


def test_golden_bytes_of_padding_with_a_zero_point():
    words = pack(np.array([[1], [1]], np.int8), 4, np.array([-8, 7], np.int8))
    assert words.astype("<u4").tobytes() == bytes([0x09]) + bytes(15) + bytes([0xF9]) + bytes([0xFF]) * 15


@pytest.mark.parametrize(
    ("k", "bits", "words"),
    [(32, 3, 3), (1, 3, 3), (33, 3, 6), (32, 2, 2), (32, 4, 4), (32, 6, 6), (32, 8, 8), (1152, 3, 108), (65, 2, 6)],
)
def test_words_of_a_row(k, bits, words):
    assert packed_words(k, bits) == words
    assert pack(np.zeros((2, k), np.int8), bits).shape == (2, words)


def test_many_rows_are_packed_as_few():
    rng = np.random.default_rng(0)
    weight_q = rng.integers(-4, 4, (2050, 33)).astype(np.int8)
    words = pack(weight_q, 3)
    for start in (0, 1000, 1024, 2047):
        np.testing.assert_array_equal(words[start : start + 3], pack(weight_q[start : start + 3], 3))
    np.testing.assert_array_equal(unpack(words, 3, 33), weight_q)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("side", ["below", "above"])
def test_values_out_of_range_are_refused(bits, side):
    half = 1 << (bits - 1)
    weight_q = np.zeros((2, 3), np.int16)
    weight_q[1, 2] = half if side == "above" else -half - 1
    with pytest.raises(ValueError, match=f"{bits} bits hold {-half} … {half - 1}"):
        pack(weight_q, bits)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3,)])
def test_words_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="need 3 words"):
        unpack(np.zeros(shape, np.uint32), 3, 32)


def test_words_in_any_memory_order_unpack_alike():
    weight_q = np.random.default_rng(1).integers(-8, 8, (5, 70)).astype(np.int8)
    words = pack(weight_q, 4)
    np.testing.assert_array_equal(unpack(np.asfortranarray(words), 4, 70), weight_q)
    np.testing.assert_array_equal(unpack(words.astype(">u4"), 4, 70), weight_q)


@given(st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=70))
def test_signs_come_back(signs):
    values = np.array(signs, np.float32)
    packed = pack_signs(values)
    assert (packed.dtype, len(packed)) == (np.uint8, -(-len(values) // 8))
    assert (packed[0] & 1) == (signs[0] < 0)
    found = unpack_signs(packed, len(values))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    with pytest.raises(ValueError, match="signs of"):
        unpack_signs(packed, len(values) + 8)
