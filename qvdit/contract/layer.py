"""Frozen layers: everything a runtime needs to execute one quantized linear.

Symbols: K input features, N output features, R rank, T frames, G features of a group, C = K/G groups, B features of a
rotation's block, M rows of an input flattened to [M, K].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np

ROW_PAD = 32  # a packed row is padded to a multiple of this many values


def padded_size(shape: tuple[int, int]) -> int:
    """How many values a weight [N, K] takes when its rows are padded for packing."""
    return shape[0] * -(-shape[1] // ROW_PAD) * ROW_PAD


def group_size(k: int, wanted: int) -> int:
    """G for K input features: the largest divisor of K that is not above ``wanted``; K itself where that is 0.

    The one place where a recipe's group meets a layer's K, so that groups are always whole.
    """
    return next(g for g in range(min(wanted, k) or k, 0, -1) if k % g == 0)


MAX_ROTATION = 1024  # input features that are rotated with each other: what one warp of a GPU can hold


def rotation_block(k: int) -> int:
    """B for K input features: the largest power of two that divides K, to 1024; 0, none, where K is odd."""
    block = min(k & -k, MAX_ROTATION)
    return block if block > 1 else 0


def are_signs(inv_smooth: np.ndarray) -> bool:
    """Whether an inv_smooth [K] is a rotation's random signs alone: they are stored in a bit each."""
    return bool((np.abs(inv_smooth) == 1).all())


class FrameRows(str, Enum):
    """How the rows of a layer's input [..., L, K] relate to frames: row m is of frame (m // P) mod T."""

    NONE = "none"  # the rows are not video tokens, or the layer has no frame gain
    SEQUENCE = "sequence"  # [B, T·P, K]: full 3D attention (Wan); P = L / T
    SPATIAL = "spatial"  # [B·T, P, K]: spatial attention (Latte); P = L
    TEMPORAL = "temporal"  # [B·S, T, K]: temporal attention (Latte); P = 1

    def tokens_per_frame(self, length: int, frames: int) -> int:
        """P for an input of L = ``length`` rows in its second to last dimension and T = ``frames``."""
        if self is FrameRows.SEQUENCE and length % frames:
            raise ValueError(f"a sequence of {length} tokens cannot hold {frames} frames of equal size")
        return {"none": 1, "sequence": length // frames, "spatial": length, "temporal": 1}[self.value]


@dataclass(frozen=True)
class LowBitLayer:
    """One ``LowBitLinear``: low-bit weights, activations quantized per token at run time, TQE.

    x̃ = FWHT(x · inv_smooth), from which x_q, s_x and z_x are made,
    y = s_x · Σ_g scale[g] · Σ_{k in g} (x_q - z_x)(weight_q - weight_zero[g])
        + gain[frame] · (s_x Σ (x_q - z_x) alpha) · beta + bias

    Weights have one scale and zero an output feature, [N], or one for every group of G input features, [N, C].
    Arrays that do not fit each other, or K, raise ValueError.
    """

    kind: ClassVar[str] = "low_bit"

    name: str
    weight_bits: int
    act_bits: int
    act_symmetric: bool
    rows: FrameRows
    weight_q: np.ndarray  # int8 [N, K], in -2^(b-1) … 2^(b-1) - 1
    weight_scale: np.ndarray  # float32 [N] or [N, C]
    weight_zero: np.ndarray | None = None  # int8, of the scale's shape
    bias: np.ndarray | None = None  # float32 [N]
    inv_smooth: np.ndarray | None = None  # float32 [K]; negative where a rotation's random sign is
    alpha: np.ndarray | None = None  # float16 [K, R]
    beta: np.ndarray | None = None  # float16 [R, N]
    frame_gain: np.ndarray | None = None  # float32 [T]
    rotation: int = 0  # B of the Walsh-Hadamard transform that x · inv_smooth goes through; 0: none

    def __post_init__(self) -> None:
        n, k = self.shape
        shape = self.weight_scale.shape
        if shape != (n,) and not (len(shape) == 2 and shape[0] == n and shape[1] > 1 and k % shape[1] == 0):
            raise ValueError(f"{self.name}: scales of shape {shape} for weights of shape {(n, k)}")
        if self.weight_zero is not None and self.weight_zero.shape != shape:
            raise ValueError(f"{self.name}: zeros of shape {self.weight_zero.shape} beside scales of shape {shape}")
        block = self.rotation
        if block and (block < 2 or block & (block - 1) or k % block):
            raise ValueError(f"{self.name}: a rotation of {block} features, no power of two that divides {k}")

    @property
    def group(self) -> int:
        """G: input features that share a scale; K where a whole row does."""
        return self.shape[1] if self.weight_scale.ndim == 1 else self.shape[1] // self.weight_scale.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_q.shape[0], self.weight_q.shape[1]

    @property
    def rank(self) -> int:
        """R of the run-time TQE term."""
        return 0 if self.alpha is None else int(self.alpha.shape[1])

    def stored_bits(self) -> int:
        """Bits of everything stored for the layer, padding included, bias aside."""
        zero = 0 if self.weight_zero is None else 8 * self.weight_zero.size
        smooth = 0
        if self.inv_smooth is not None:
            smooth = -(-self.shape[1] // 8) * 8 if are_signs(self.inv_smooth) else 32 * self.shape[1]
        others = (self.weight_scale, self.alpha, self.beta, self.frame_gain)
        more = zero + smooth + sum(8 * a.nbytes for a in others if a is not None)
        return padded_size(self.shape) * self.weight_bits + more


@dataclass(frozen=True)
class StaticInt8Layer:
    """A linear with calibrated per-tensor activation scale and per-channel weights: plain INT8 Q/DQ.

    y = act_scale · weight_scale · Σ x_q weight_q + bias,  x_q = clamp(round(x · inv_smooth / act_scale), -128, 127)
    """

    kind: ClassVar[str] = "static_int8"
    weight_bits: ClassVar[int] = 8
    act_bits: ClassVar[int] = 8
    rank: ClassVar[int] = 0

    name: str
    weight_q: np.ndarray  # int8 [N, K], in -127 … 127
    weight_scale: np.ndarray  # float32 [N]
    act_scale: np.ndarray  # float32 []
    bias: np.ndarray | None = None  # float32 [N]
    inv_smooth: np.ndarray | None = None  # float32 [K]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_q.shape[0], self.weight_q.shape[1]

    def stored_bits(self) -> int:
        """Bits of everything stored for the layer, padding included, bias aside."""
        others = (self.weight_scale, self.act_scale, self.inv_smooth)
        return padded_size(self.shape) * self.weight_bits + sum(32 * a.size for a in others if a is not None)


Layer = LowBitLayer | StaticInt8Layer


def arrays(layer: Layer) -> dict[str, np.ndarray]:
    """The arrays a layer holds, by field name; absent ones are left out."""
    fields = ((f.name, getattr(layer, f.name)) for f in dataclasses.fields(layer))
    return {name: value for name, value in fields if isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class WeightSize:
    """What the quantized linears of a model take, bias aside."""

    weights: int  # how many
    fp16_bytes: int
    quantized_bytes: int
    nominal_bits: float  # mean of the layers' weight bits
    effective_bits: float  # everything stored / number of weights

    @staticmethod
    def of(layers: Iterable[Layer]) -> WeightSize:
        """Add up a model's layers."""
        layers = list(layers)
        counts = [layer.shape[0] * layer.shape[1] for layer in layers]
        stored = sum(layer.stored_bits() for layer in layers)
        total = sum(counts)
        nominal = sum(c * layer.weight_bits for c, layer in zip(counts, layers, strict=True))
        return WeightSize(total, 2 * total, -(-stored // 8), nominal / max(total, 1), stored / max(total, 1))
