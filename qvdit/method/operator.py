"""The reference definition of ``LowBitLinear``, in eager PyTorch. Every runtime is compared with it.

    1  x̃   = FWHT_B(x · inv_smooth)                                         float32
    2  s_x = max(max|x̃| / qmax, 1e-8),  x_q = clamp(round(x̃ / s_x), -qmax, qmax),  z_x = 0          symmetric
       lo = min(min x̃, 0), hi = max(max x̃, 0),  s_x = max((hi - lo) / (2^a - 1), 1e-8),             asymmetric
       z_x = round(-lo / s_x),  x_q = clamp(round(x̃ / s_x) + z_x, 0, 2^a - 1)
    3  acc[g] = Σ_{k in g} (x_q - z_x)(weight_q - weight_zero[g])           exact integer, one a group of features
    4  y   = s_x · Σ_g scale[g] · acc[g] + gain[frame] · (s_x Σ_k (x_q - z_x) alpha) · beta + bias    float32, then cast

Rounding is half to even. Steps 1, 2 and 3 give the same numbers everywhere; step 4 may differ by float32 rounding.
A NaN or Inf anywhere in a row of x̃ makes the whole row's output NaN.

FWHT_B is the unnormalised Walsh-Hadamard transform of every block of B features, absent where B = 0. It is a butterfly
of float32 additions in one fixed order, so that every runtime computes the same bits: for h = 1, 2, 4 … B/2, each pair
(a, b) of features h apart, a's index having no bit h, becomes (a + b, a - b). The weights carry its inverse, H_B / B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvdit.contract import FrameRows

EPS_SCALE = 1e-8  # smallest activation scale: a zero row quantizes to zeros
_RADIX = 8  # of the transform: three levels of its butterfly in one pass over memory


@dataclass(frozen=True)
class QuantizedRows:
    """A quantized activation [..., K]: x ≈ scale · (x_q - zero)."""

    x_q: torch.Tensor  # float32 holding integers, [..., K]
    scale: torch.Tensor  # float32 [..., 1]; NaN for a row with NaN or Inf in it
    zero: torch.Tensor | None  # float32 holding integers, [..., 1]; None means 0

    def centred(self) -> torch.Tensor:
        """x_q - zero, [..., K]."""
        return self.x_q if self.zero is None else self.x_q - self.zero


def act_levels(bits: int, symmetric: bool) -> int:
    """Largest x_q: 127 or 31 where activations are symmetric, 255 or 63 where they are not."""
    return (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1


def walsh_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """H_B applied to every block of B = ``block`` features of x [..., K]; unnormalised, symmetric, H_B H_B = B · I.

    Source: QuaRot (arXiv 2404.00456), whose transform is this one over √B. A block of 0 or 1 changes nothing.
    """
    shape, half = x.shape, 1
    while half < block:
        parts = min(_RADIX, block // half)
        rows = x.reshape(*shape[:-1], -1, parts, half).unbind(-2)
        x = torch.stack(_butterfly(rows), -2).reshape(shape)
        half *= parts
    return x


def _butterfly(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The transform of a power of two of tensors: a + b and a - b of each pair, level by level."""
    found, distance = list(parts), 1
    while distance < len(found):
        for i in range(len(found)):
            if not i & distance:
                a, b = found[i], found[i + distance]
                found[i], found[i + distance] = a + b, a - b
        distance *= 2
    return found


def transform(x: torch.Tensor, inv_smooth: torch.Tensor | None = None, rotation: int = 0) -> torch.Tensor:
    """Step 1: x̃ of an input x [..., K] of any float type."""
    x = x.float()
    return walsh_hadamard(x if inv_smooth is None else x * inv_smooth, rotation)


def quantize_rows(x: torch.Tensor, levels: torch.Tensor, symmetric: bool) -> QuantizedRows:
    """Step 2: per-token dynamic quantization of x̃, float32 [..., K].

    levels: :func:`act_levels`, float32 [] on x's device. A tensor, because CUDA turns division by a Python scalar into
    multiplication by its reciprocal, and because compiled code then serves every width.
    """
    if symmetric:
        scale = (x.abs().amax(-1, keepdim=True) / levels).clamp(min=EPS_SCALE)
        x_q = torch.round(x / scale).clamp(-levels, levels)
        zero = None
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / levels).clamp(min=EPS_SCALE)
        zero = torch.round(-low / scale)
        x_q = (torch.round(x / scale) + zero).clamp(x.new_tensor(0), levels)
    bad = ~x.isfinite().all(-1, keepdim=True)
    x_q = torch.where(bad, 0, x_q)
    zero = zero if zero is None else torch.where(bad, 0, zero)
    return QuantizedRows(x_q, torch.where(bad, torch.nan, scale), zero)


def exact_dtype(features: int, levels: int, weight_bits: int) -> torch.dtype:
    """The fastest float type in which a sum of ``features`` products is exact.

    In float32 no partial sum may reach 2^24. levels bounds |x_q - z_x|, 2^weight_bits bounds |weight_q - weight_zero|;
    float64 is good for any layer there is.
    """
    return torch.float32 if features * levels * (1 << weight_bits) < 1 << 24 else torch.float64


def accumulate(rows: QuantizedRows, weight: torch.Tensor, dtype: torch.dtype, groups: int = 1) -> torch.Tensor:
    """Step 3 exactly, in floats that hold integers: [..., N], or [C, ..., N] for C = ``groups`` above 1.

    weight: float32 holding the integers weight_q - weight_zero, [N, K]. dtype: :func:`exact_dtype` of a group's sums;
    floating-point products are, unlike integer ones, fast on every device.
    """
    x, weight = rows.centred().to(dtype), weight.to(dtype)
    if groups == 1:
        return x @ weight.T
    by_group = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)  # [C, M, G]
    acc = by_group @ weight.reshape(len(weight), groups, -1).permute(1, 2, 0)
    return acc.reshape(groups, *x.shape[:-1], -1)


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
    """Step 4: scales, TQE's term and the bias, in float32, then the cast.

    acc and weight_scale: [..., N] and [N], or [C, ..., N] and [N, C].
    """
    if weight_scale.ndim == 1:
        scaled = acc.float() * weight_scale
    else:  # group after group: as one product it would be N of them, each with a single column
        scaled = acc[0].float() * weight_scale[:, 0]
        for group in range(1, len(acc)):
            scaled = scaled + acc[group].float() * weight_scale[:, group]
    y = rows.scale * scaled
    if term is not None:
        y = y + term
    if bias is not None:
        y = y + bias
    return y.to(dtype)
