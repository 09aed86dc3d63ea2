"""A quantized linear as a PyTorch module on the CUDA kernels.

Symbols: M rows of an input flattened to [M, K], N output features of one layer, S layers computed as one, R rank,
T frames, P tokens per frame.
"""

from __future__ import annotations

import numpy as np
import torch

from qvdit.contract import LowBitLayer
from qvdit.contract.kernels import KernelConstants, mergeable, unserved
from qvdit.runtimes import torch_ops  # noqa: F401  (torch_ops registers the operator)


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
    alpha: torch.Tensor | None  # float16 [S · R, K]
    beta: torch.Tensor | None  # [R, S · N], float16; of rank 1 float32
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
        self.rank, self.rows, self.rotation = first.rank, first.rows, first.rotation
        self.frames = 0 if first.frame_gain is None or not first.rank else len(first.frame_gain)
        self.segment = first.shape[0]
        for name, value in vars(KernelConstants.of(layers)).items():
            self.register_buffer(name, None if value is None else torch.from_numpy(np.array(value, order="C")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.qvdit.quantized_linear(
            x,
            self.act_bits,
            self.act_symmetric,
            self.words,
            self.weight_bits,
            self.weight_scale,
            self.weight_zero,
            self.bias,
            self.alpha,
            self.beta,
            self.frame_gain,
            self.tokens_per_frame(x),
            self.inv_smooth,
            self.rotation,
            self.segment,
        )

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
