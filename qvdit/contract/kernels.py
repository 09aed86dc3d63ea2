"""What the CUDA kernels serve, and a layer's constants in the form they take them.

The PyTorch runtime and the TensorRT export share it. Symbols: N output features of one layer, K input features, K_pad
the next multiple of 32, S layers computed as one, R rank of each, T frames, b weight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from qvdit.contract.layer import Layer, LowBitLayer, StaticInt8Layer
from qvdit.contract.packing import pack

MAX_FEATURES = 16384  # K
MAX_RANK = 32  # S · R
SEGMENT = 128  # a merged layer's N is a multiple of this: a tile of the GEMM then lies in one layer


class Prologue(IntEnum):
    """What happens to x before it is quantized: enum qvdit_prologue of ``runtimes/csrc/qvdit_kernels.h``."""

    PLAIN = 0
    LAYERNORM = 1
    GELU = 2


def unserved(layer: Layer) -> str | None:
    """Why the kernels cannot compute a layer, or None."""
    if isinstance(layer, StaticInt8Layer):
        return "static activations"
    return unserved_shape(layer.shape[1], layer.group, layer.rank)


def unserved_shape(k: int, group: int, rank: int) -> str | None:
    """:func:`unserved` by K, G and R, before there is a layer."""
    if group < k:
        return "groups"
    if k > MAX_FEATURES:
        return f"more than {MAX_FEATURES} input features"
    if rank > MAX_RANK:
        return f"rank above {MAX_RANK}"
    return None


def mergeable(layers: Sequence[Layer]) -> bool:
    """Whether layers that read the same input can be computed as one.

    They must quantize it alike, and their weights must be of one shape, one width and one rank; gains may differ.
    """
    low_bit = [layer for layer in layers if isinstance(layer, LowBitLayer) and unserved(layer) is None]
    if len(low_bit) < len(layers):
        return False
    first = low_bit[0]
    ranks = sum(layer.rank for layer in low_bit)
    return first.shape[0] % SEGMENT == 0 and ranks <= MAX_RANK and all(_alike(first, other) for other in low_bit)


def _alike(a: LowBitLayer, b: LowBitLayer) -> bool:
    def kind(layer: LowBitLayer) -> tuple[object, ...]:
        gain = None if layer.frame_gain is None else (layer.rows, len(layer.frame_gain))
        widths = (layer.weight_bits, layer.act_bits, layer.act_symmetric, layer.rotation)
        return (layer.shape, *widths, layer.rank, gain, layer.weight_zero is None)

    return kind(a) == kind(b) and _same(a.inv_smooth, b.inv_smooth)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


@dataclass(frozen=True)
class KernelConstants:
    """The constants of one layer, or of several :func:`mergeable` ones side by side."""

    words: np.ndarray  # int32 [S · N, b · K_pad / 32]: qvdit.contract.packing's
    weight_scale: np.ndarray  # float32 [S · N]
    weight_zero: np.ndarray | None  # int8 [S · N]
    bias: np.ndarray | None  # float32 [S · N]
    inv_smooth: np.ndarray | None  # float32 [K]
    alpha: np.ndarray | None  # float16 [S · R, K]: transposed
    beta: np.ndarray | None  # [R, S · N], float16; of rank 1 float32, which a kernel of one rank reads faster
    frame_gain: np.ndarray | None  # float32 [S, T]

    @staticmethod
    def of(layers: Sequence[LowBitLayer]) -> KernelConstants:
        """Pack layers that the kernels serve; several must be :func:`mergeable`."""
        alphas = [layer.alpha.T for layer in layers if layer.alpha is not None]
        betas = [layer.beta for layer in layers if layer.beta is not None]
        gains = [layer.frame_gain for layer in layers if layer.frame_gain is not None and layer.rank]
        packed = [pack(layer.weight_q, layer.weight_bits, layer.weight_zero) for layer in layers]
        return KernelConstants(
            words=np.concatenate(packed).view(np.int32),
            weight_scale=np.concatenate([layer.weight_scale for layer in layers]),
            weight_zero=_joined([layer.weight_zero for layer in layers]),
            bias=_biases(layers),
            inv_smooth=layers[0].inv_smooth,
            alpha=np.concatenate(alphas) if alphas else None,
            beta=np.concatenate(betas, axis=1, dtype=np.float32 if layers[0].rank == 1 else None) if betas else None,
            frame_gain=np.stack(gains) if gains else None,
        )


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Arrays [N] one after the other; None where there are none."""
    found = [array for array in arrays if array is not None]
    return np.concatenate(found) if found else None


def _biases(layers: Sequence[LowBitLayer]) -> np.ndarray | None:
    """Biases one after the other, zeros where a layer has none; None where no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [np.zeros(layer.shape[0]) if layer.bias is None else layer.bias for layer in layers]
    return np.concatenate(biases).astype(np.float32)
