"""The canonical packing of low-bit weights: portable, one rule for 2, 3, 4, 6 and 8 bits.

A row of K values is padded to K_pad, the next multiple of 32, with its zero point, its last group's where it has
several (padding contributes nothing). The stored code is u = q + 2^(b-1). Value i of a row takes bits
b·i … b·i + b - 1 of the row's little-endian bit string; a row is therefore b·K_pad / 32 words of 32 bits, and a 3-bit
layer really takes 3 bits.
"""

from __future__ import annotations

import numpy as np

from qvdit.contract.layer import ROW_PAD

_ROWS_AT_ONCE = 1024  # bounds the memory of the expanded bits


def packed_words(k: int, bits: int) -> int:
    """Words of 32 bits that a row of k values takes."""
    return -(-k // ROW_PAD) * ROW_PAD * bits // 32


def pack(weight_q: np.ndarray, bits: int, zero: np.ndarray | None = None) -> np.ndarray:
    """int8 [N, K] in -2^(b-1) … 2^(b-1) - 1, int8 [N], [N, C] or None → uint32 [N, b·K_pad/32]."""
    n, k = weight_q.shape
    half = 1 << (bits - 1)
    if weight_q.size and (weight_q.min() < -half or weight_q.max() >= half):
        raise ValueError(f"weights span {weight_q.min()} … {weight_q.max()}, {bits} bits hold {-half} … {half - 1}")
    if zero is not None and zero.size and (zero.min() < -half or zero.max() >= half):
        raise ValueError(f"zero points span {zero.min()} … {zero.max()}, {bits} bits hold {-half} … {half - 1}")
    padding = np.zeros((n, 1), np.int8) if zero is None else zero.reshape(n, -1)[:, -1:].astype(np.int8)
    padding = np.repeat(padding, -k % ROW_PAD, axis=1)
    codes = (np.concatenate([weight_q, padding], axis=1).astype(np.int16) + half).astype(np.uint8)
    if 8 % bits == 0:
        return _side_by_side(codes, bits).view("<u4").astype(np.uint32, copy=False)
    words = np.empty((n, packed_words(k, bits)), np.uint32)
    for start in range(0, n, _ROWS_AT_ONCE):
        block = codes[start : start + _ROWS_AT_ONCE]
        expanded = np.unpackbits(block[..., None], axis=-1, count=bits, bitorder="little")  # [n, K_pad, b]
        packed = np.packbits(expanded.reshape(len(block), -1), axis=1, bitorder="little")
        words[start : start + _ROWS_AT_ONCE] = packed.view("<u4")
    return words


def _side_by_side(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, K_pad] → uint8 [N, b·K_pad/8], for widths of which a byte holds whole codes."""
    packed = codes[:, :: 8 // bits].copy()
    for place in range(1, 8 // bits):
        packed |= codes[:, place :: 8 // bits] << (bits * place)
    return packed


def _apart(packed: np.ndarray, bits: int, out: np.ndarray) -> None:
    """The inverse, of as many features as ``out`` has: int8 [N, k], codes less 2^(b-1)."""
    for place in range(8 // bits):
        part = out[:, place :: 8 // bits]
        codes = (packed[:, : part.shape[1]] >> (bits * place)) & ((1 << bits) - 1)
        part[:] = (codes - np.uint8(1 << (bits - 1))).view(np.int8)


def pack_signs(signs: np.ndarray) -> np.ndarray:
    """float32 [K] of 1 and -1 → uint8 [K/8 rounded up]: bit i mod 8 of byte i / 8 says that value i is negative."""
    return np.packbits(signs < 0, bitorder="little")


def unpack_signs(packed: np.ndarray, k: int) -> np.ndarray:
    """The inverse of :func:`pack_signs`: float32 [k]."""
    if packed.shape != (-(-k // 8),):
        raise ValueError(f"signs of {k} features in {packed.shape} bytes")
    return 1 - 2 * np.unpackbits(packed, count=k, bitorder="little").astype(np.float32)


def unpack(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The inverse of :func:`pack`: uint32 [N, b·K_pad/32] → int8 [N, k]."""
    n = words.shape[0]
    if words.ndim != 2 or words.shape[1] != packed_words(k, bits):
        raise ValueError(
            f"packed weights have shape {words.shape}, {k} values of {bits} bits need {packed_words(k, bits)} words"
        )
    out = np.empty((n, k), np.int8)
    if 8 % bits == 0:
        _apart(np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8), bits, out)
        return out
    for start in range(0, n, _ROWS_AT_ONCE):
        block = np.ascontiguousarray(words[start : start + _ROWS_AT_ONCE]).astype("<u4").view(np.uint8)
        expanded = np.unpackbits(block, axis=1, bitorder="little").reshape(len(block), -1, bits)
        codes = np.packbits(expanded, axis=-1, bitorder="little")[..., 0][:, :k]
        out[start : start + _ROWS_AT_ONCE] = (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return out
