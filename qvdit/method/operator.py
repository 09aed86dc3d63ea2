"""The reference definition of ``LowBitLinear``, in eager PyTorch. Every runtime is compared with it.

    1  x̃   = x · inv_smooth                                                 float32
    2  s_x = max(max|x̃| / qmax, 1e-8),  x_q = clamp(round(x̃ / s_x), -qmax, qmax),  z_x = 0          symmetric
       lo = min(min x̃, 0), hi = max(max x̃, 0),  s_x = max((hi - lo) / (2^a - 1), 1e-8),             asymmetric
       z_x = round(-lo / s_x),  x_q = clamp(round(x̃ / s_x) + z_x, 0, 2^a - 1)
    3  acc = Σ_k (x_q - z_x)(weight_q - weight_zero)                        exact integer
    4  y   = s_x · scale · acc + gain[frame] · (s_x Σ_k (x_q - z_x) alpha) · beta + bias    float32, then cast

Rounding is half to even. Steps 2 and 3 are the same integers everywhere; step 4 may differ by float32 rounding.
A NaN or Inf anywhere in a row makes the whole row's output NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qvdit.contract import FrameRows

EPS_SCALE = 1e-8  # smallest activation scale: a zero row quantizes to zeros


@dataclass(frozen=True)
class QuantizedRows:
    """A quantized activation [..., K]: x ≈ scale · (x_q - zero)."""

    x_q: torch.Tensor  # float32 holding integers, [..., K]
    scale: torch.Tensor  # float32 [..., 1]; NaN for a row with NaN or Inf in it
    zero: torch.Tensor | None  # float32 holding integers, [..., 1]; None means 0

    def centred(self) -> torch.Tensor:
        """x_q - zero, [..., K]."""
        return self.x_q if self.zero is None else self.x_q - self.zero


def act_qmax(bits: int) -> int:
    """Largest magnitude of a symmetric activation: 127 or 31."""
    return (1 << (bits - 1)) - 1


def quantize_rows(x: torch.Tensor, bits: int, symmetric: bool, inv_smooth: torch.Tensor | None = None) -> QuantizedRows:
    """Steps 1 and 2: per-token dynamic quantization of x, [..., K] of any float type."""
    x = x.float()
    if inv_smooth is not None:
        x = x * inv_smooth
    # Tensors, not Python scalars: CUDA turns division by a scalar into multiplication by its reciprocal.
    if symmetric:
        qmax = x.new_tensor(act_qmax(bits))
        scale = (x.abs().amax(-1, keepdim=True) / qmax).clamp(min=EPS_SCALE)
        x_q = torch.round(x / scale).clamp(-qmax, qmax)
        zero = None
    else:
        levels = x.new_tensor((1 << bits) - 1)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / levels).clamp(min=EPS_SCALE)
        zero = torch.round(-low / scale)
        x_q = (torch.round(x / scale) + zero).clamp(x.new_tensor(0), levels)
    bad = ~x.isfinite().all(-1, keepdim=True)
    x_q = torch.where(bad, 0, x_q)
    zero = zero if zero is None else torch.where(bad, 0, zero)
    return QuantizedRows(x_q, torch.where(bad, torch.nan, scale), zero)


def accumulate(rows: QuantizedRows, weight: torch.Tensor, weight_peak: int) -> torch.Tensor:
    """Step 3 exactly, as float64 or float32 holding integers, [..., N].

    weight: float32 holding the integers weight_q - weight_zero, [N, K]; weight_peak bounds their magnitude.
    Floating point is exact while every partial sum stays below 2^24 (float32) or 2^53 (float64), and unlike
    integer matrix products it is fast on every device.
    """
    x = rows.centred()
    peak = 255 if rows.zero is not None else 127
    if x.shape[-1] * peak * weight_peak < 1 << 24:
        return x @ weight.T
    return x.double() @ weight.double().T


def rank_term(
    rows: QuantizedRows,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    gain: torch.Tensor | None,
    frame_rows: FrameRows,
) -> torch.Tensor:
    """TQE's run-time term: gain[frame] · (s_x Σ_k (x_q - z_x) alpha) · beta, float32 [..., N]."""
    factor = rows.scale * (rows.centred() @ alpha)  # [..., R]
    if gain is not None:
        factor = factor * row_gains(gain, frame_rows, factor.shape)
    return factor @ beta


def row_gains(gain: torch.Tensor, frame_rows: FrameRows, shape: torch.Size) -> torch.Tensor:
    """The gain of every row of an input of shape [..., L, K]: [..., L, 1]. gain: [T]."""
    rows = shape[:-1]
    per_frame = frame_rows.tokens_per_frame(rows[-1], len(gain))
    index = torch.arange(rows.numel(), device=gain.device)
    frame = torch.div(index, per_frame, rounding_mode="floor") % len(gain)
    return gain[frame].reshape(*rows, 1)


def finish(
    rows: QuantizedRows,
    acc: torch.Tensor,
    weight_scale: torch.Tensor,
    term: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Step 4: scales, TQE's term and the bias, in float32, then the cast."""
    y = rows.scale * (acc.float() * weight_scale)
    if term is not None:
        y = y + term
    if bias is not None:
        y = y + bias
    return y.to(dtype)
