"""A quantized linear as a PyTorch module on the CUDA kernels.

Symbols: M rows of an input flattened to [M, K], N output features of one layer, S layers computed as one, R rank,
T frames, P tokens per frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qvdit.contract import LowBitLayer
from qvdit.contract.layer import Layer
from qvdit.contract.packing import pack
from qvdit.runtimes import cuda, torch_ops  # noqa: F401  (torch_ops registers the operators)

SEGMENT = 128  # a merged layer's N is a multiple of this: a tile of the GEMM then lies in one layer


def unserved(layer: Layer) -> str | None:
    """Why the kernels cannot compute a layer, or None."""
    if not isinstance(layer, LowBitLayer):
        return "static activations"
    if layer.weight_scale.ndim > 1:
        return "groups"
    if layer.rotation:
        return "rotation"
    if layer.shape[1] > cuda.MAX_FEATURES:
        return f"more than {cuda.MAX_FEATURES} input features"
    if layer.rank > cuda.MAX_RANK:
        return f"rank above {cuda.MAX_RANK}"
    return None


def mergeable(layers: Sequence[Layer]) -> bool:
    """Whether layers that read the same input can be one :class:`KernelLinear`.

    They must quantize it alike, and their weights must be of one shape, one width and one rank; gains may differ.
    """
    low_bit = [layer for layer in layers if isinstance(layer, LowBitLayer) and unserved(layer) is None]
    if len(low_bit) < len(layers):
        return False
    first = low_bit[0]
    ranks = sum(layer.rank for layer in low_bit)
    return first.shape[0] % SEGMENT == 0 and ranks <= cuda.MAX_RANK and all(_alike(first, other) for other in low_bit)


def _alike(a: LowBitLayer, b: LowBitLayer) -> bool:
    def kind(layer: LowBitLayer) -> tuple[object, ...]:
        gain = None if layer.frame_gain is None else (layer.rows, len(layer.frame_gain))
        widths = (layer.weight_bits, layer.act_bits, layer.act_symmetric)
        return (layer.shape, *widths, layer.rank, gain, layer.weight_zero is None)

    return kind(a) == kind(b) and _same(a.inv_smooth, b.inv_smooth)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


class KernelLinear(torch.nn.Module):
    """``LowBitLinear`` by :mod:`qvdit.runtimes.torch_ops`: x [..., K] → [..., S · N] of x's dtype. Inference only.

    Several layers of one input, if they are :func:`mergeable`, are computed as one: quantized once, multiplied once,
    their outputs side by side. x: float32, float16 or bfloat16, on a GPU; rows belong to frames as
    ``qvdit.method.operator.row_gains`` says. Layers that the kernels do not serve raise ValueError.

    Its tensors are buffers; ``.to`` moves them and never changes their types: scales must not be rounded.
    """

    words: torch.Tensor  # int32 [S · N, b · K_pad / 32]: qvdit.contract.packing's
    weight_scale: torch.Tensor  # float32 [S · N]
    weight_zero: torch.Tensor | None  # int8 [S · N]
    bias: torch.Tensor | None  # float32 [S · N]
    inv_smooth: torch.Tensor | None  # float32 [K]
    alpha: torch.Tensor | None  # float32 [S · R, K]
    beta: torch.Tensor | None  # float32 [R, S · N]
    frame_gain: torch.Tensor | None  # float32 [S, T]

    def __init__(self, *layers: LowBitLayer):
        super().__init__()
        first = layers[0]
        reasons = [reason for reason in map(unserved, layers) if reason]
        if reasons or (len(layers) > 1 and not mergeable(layers)):
            names = ", ".join(layer.name for layer in layers)
            raise ValueError(f"{names}: {reasons[0] if reasons else 'not to be merged'}")
        self.names = tuple(layer.name for layer in layers)
        self.in_features, self.out_features = first.shape[1], sum(layer.shape[0] for layer in layers)
        self.weight_bits, self.act_bits, self.act_symmetric = first.weight_bits, first.act_bits, first.act_symmetric
        self.rank, self.rows = first.rank, first.rows
        self.frames = 0 if first.frame_gain is None or not first.rank else len(first.frame_gain)
        self.row_sums = first.weight_zero is not None and first.weight_bits == 8
        self.segment = first.shape[0]
        for name, value in _buffers(layers).items():
            self.register_buffer(name, None if value is None else torch.from_numpy(np.array(value, order="C")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.qvdit.quantize_rows(
            x,
            self.act_bits,
            self.act_symmetric,
            inv_smooth=self.inv_smooth,
            alpha=self.alpha,
            frame_gain=self.frame_gain,
            tokens_per_frame=self.tokens_per_frame(x),
            row_sums=self.row_sums,
        )
        y = torch.ops.qvdit.low_bit_linear(
            *rows,
            self.words,
            self.weight_bits,
            self.in_features,
            self.weight_scale,
            self.weight_zero,
            self.beta,
            self.bias,
            x.dtype,
            segment=self.segment,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def tokens_per_frame(self, x: torch.Tensor) -> int:
        """P for an input [..., L, K]: row m of the flattened input is of frame (m // P) mod T; 1 without gains."""
        if not self.frames:
            return 1
        return max(self.rows.tokens_per_frame(x.shape[-2], self.frames), 1)  # 1 where L = 0: there are no rows

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self

    def extra_repr(self) -> str:
        kind = f"w{self.weight_bits}a{self.act_bits}, rank={self.rank}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def _buffers(layers: Sequence[LowBitLayer]) -> dict[str, np.ndarray | None]:
    """A :class:`KernelLinear`'s tensors, shapes as there."""
    first = layers[0]
    alphas = [layer.alpha.T for layer in layers if layer.alpha is not None]
    betas = [layer.beta for layer in layers if layer.beta is not None]
    gains = [layer.frame_gain for layer in layers if layer.frame_gain is not None and layer.rank]
    packed = [pack(layer.weight_q, layer.weight_bits, layer.weight_zero) for layer in layers]
    return {
        "words": np.concatenate(packed).view(np.int32),
        "weight_scale": np.concatenate([layer.weight_scale for layer in layers]),
        "weight_zero": _joined([layer.weight_zero for layer in layers]),
        "bias": _biases(layers),
        "inv_smooth": first.inv_smooth,
        "alpha": np.concatenate(alphas).astype(np.float32) if alphas else None,
        "beta": np.concatenate(betas, axis=1).astype(np.float32) if betas else None,
        "frame_gain": np.stack(gains) if gains else None,
    }


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
