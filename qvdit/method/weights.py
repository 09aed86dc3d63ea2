"""Weight quantizers: a grid per output channel, found by clip search, and two ways to round to it.

Symbols: N output features, K input features, b bits. Integers are signed, -2^(b-1) … 2^(b-1) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MIN_SCALE = 1e-8
_CLIP_RATIOS = torch.arange(2, 101, 2) / 100  # 0.02 … 1.0: the authors' grid stops at 0.98 and starts at a useless 0


@dataclass(frozen=True)
class WeightGrid:
    """The values an output channel may take: scale · (q - zero)."""

    bits: int
    scale: torch.Tensor  # float32 [N]
    zero: torch.Tensor  # float32 holding integers [N], in the same range as q; 0 if symmetric

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest integers of a weight [N, K], as float32."""
        return (torch.round(weight / self.scale[:, None]) + self.zero[:, None]).clamp(self.low, self.high)

    def dequantize(self, weight_q: torch.Tensor) -> torch.Tensor:
        """Integers [N, K] → values, float32."""
        return (weight_q - self.zero[:, None]) * self.scale[:, None]


def search_grid(weight: torch.Tensor, bits: int, symmetric: bool, importance: torch.Tensor | None = None) -> WeightGrid:
    """The grid, over ratios of the channel's range, with the least Σ_k importance_k (w_k - ŵ_k)².

    weight: float32 [N, K]. importance: [K], the mean square of each input feature; equal weights when absent.
    The range includes 0, so that 0 is representable and padding costs nothing.
    """
    half = 1 << (bits - 1)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        full = torch.maximum(-low, high) / (half - 1)
        zero = torch.zeros_like(full)
    else:
        full = (high - low) / (2 * half - 1)
        zero = torch.round(-low / full.clamp(min=_MIN_SCALE)).clamp(0, 2 * half - 1) - half
    best_scale, best_error = full.clamp(min=_MIN_SCALE), torch.full_like(full, torch.inf)
    for ratio in _CLIP_RATIOS.tolist():
        grid = WeightGrid(bits, (full * ratio).clamp(min=_MIN_SCALE), zero)
        error = (grid.dequantize(grid.quantize(weight)) - weight).square()
        error = error.sum(1) if importance is None else error @ importance
        better = error < best_error
        best_scale = torch.where(better, grid.scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return WeightGrid(bits, best_scale, zero)


def damped(second_moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """E[x xᵀ] made safely positive definite: a share of its mean diagonal is added to the diagonal, float64 [K, K]."""
    matrix = second_moment.double()
    mean = matrix.diagonal().mean().clamp(min=1e-12)
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (damping * mean)


def round_second_order(weight: torch.Tensor, grid: WeightGrid, second_moment: torch.Tensor) -> torch.Tensor:
    """Second-order rounding (GPTQ, arXiv 2210.17323): integers [N, K] that keep W x rather than W.

    Features are rounded one after the other, the most active first; the error of each is spread over those still to
    come as the inverse of E[x xᵀ] says.
    """
    order = second_moment.diagonal().argsort(descending=True)
    matrix = damped(second_moment)[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, order].clone()
    rounded = torch.empty_like(left)
    block = 64
    for start in range(0, left.shape[1], block):
        stop = min(start + block, left.shape[1])
        errors = torch.zeros(len(left), stop - start, device=left.device)
        for k in range(start, stop):
            column = left[:, k : k + 1]
            rounded[:, k : k + 1] = grid.quantize(column)
            error = (column - grid.dequantize(rounded[:, k : k + 1])) / spread[k, k]
            left[:, k:stop] -= error @ spread[k : k + 1, k:stop]
            errors[:, k - start] = error[:, 0]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return rounded[:, order.argsort()]
