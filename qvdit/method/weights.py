"""Weight quantizers: a grid per output channel or group of it, found by clip search, and two ways to round to it.

Symbols: N output features, K input features, C groups of input features, b bits. Integers are signed,
-2^(b-1) … 2^(b-1) - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qvdit.contract import QvditError
from qvdit.contract.layer import group_size
from qvdit.method.recipe import ClipGrid

_MIN_SCALE = 1e-8
_TRIES = 4  # dampings that are tried, each ten times the last
_AROUND = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of the scale that nearest rounding likes best
_TRIED_AT_ONCE = 1 << 26  # weights, to bound memory


@dataclass(frozen=True)
class ClipSearch:
    """How the clip search looks for a scale."""

    ratios: tuple[float, ...]  # of the range
    slack: float  # added to Δ where the search divides by it, not where it multiplies


CLIP_SEARCHES: dict[ClipGrid, ClipSearch] = {
    "clean": ClipSearch(tuple(i / 100 for i in range(2, 101, 2)), 0.0),
    # Q-VDiT's code: never the whole range, a useless 0, and a Δ that is another one when it divides. At 8 bits, where Δ
    # is not large against 1e-4, that costs much.
    "authors": ClipSearch(tuple(i / 100 for i in range(0, 100, 2)), 1e-4),
}


def per_feature(values: torch.Tensor, k: int) -> torch.Tensor:
    """What scales or zeros say of every weight: [N] → [N, 1]; [N, C] → [N, K], K = ``k``."""
    if values.ndim == 1:
        return values[:, None]
    return values[..., None].expand(-1, -1, k // values.shape[1]).flatten(1)


@dataclass(frozen=True)
class WeightGrid:
    """The values that the weights of an output channel, or of each of its C groups, may take: scale · (q - zero)."""

    bits: int
    scale: torch.Tensor  # float32 [N] or [N, C]
    zero: torch.Tensor  # float32 holding integers, of the scale's shape, in the same range as q; 0 if symmetric

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
        scale, zero = (per_feature(values, weight.shape[1]) for values in (self.scale, self.zero))
        return (torch.round(weight / scale) + zero).clamp(self.low, self.high)

    def dequantize(self, weight_q: torch.Tensor) -> torch.Tensor:
        """Integers [N, K] → values, float32."""
        scale, zero = (per_feature(values, weight_q.shape[1]) for values in (self.scale, self.zero))
        return (weight_q - zero) * scale


def search_grid(
    weight: torch.Tensor,
    bits: int,
    symmetric: bool,
    importance: torch.Tensor | None = None,
    group: int = 0,
    clip_grid: ClipGrid = "clean",
) -> WeightGrid:
    """The grid, over ratios of the range of a channel or group, with the least Σ_k importance_k (w_k - ŵ_k)².

    weight: float32 [N, K]. importance: [K], the mean square of each input feature; equal weights when absent.
    group: how many features share a scale, as near to it as K allows; 0: all of a row.
    The range includes 0, so that 0 is representable and padding costs nothing.
    """
    half, search = 1 << (bits - 1), CLIP_SEARCHES[clip_grid]
    n, k = weight.shape
    grouped = (n,) if group_size(k, group) == k else (n, k // group_size(k, group))
    by_group = weight.reshape(*grouped, -1)
    low, high = by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)
    if symmetric:
        full = torch.maximum(-low, high) / (half - 1)
        zero = torch.zeros_like(full)
    else:
        full = (high - low) / (2 * half - 1)
        zero = torch.round(-low / full.clamp(min=_MIN_SCALE)).clamp(0, 2 * half - 1) - half
    best_scale, best_error = full.clamp(min=_MIN_SCALE), torch.full_like(full, torch.inf)
    for ratio in search.ratios:
        grid = WeightGrid(bits, (full * ratio).clamp(min=_MIN_SCALE), zero)
        divided = WeightGrid(bits, grid.scale + search.slack, zero) if search.slack else grid
        error = (grid.dequantize(divided.quantize(weight)) - weight).square()
        if importance is not None:
            error = error * importance
        error = error.reshape(*grouped, -1).sum(-1)
        better = error < best_error
        best_scale = torch.where(better, grid.scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return WeightGrid(bits, best_scale, zero)


def damped(second_moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """E[x xᵀ] made safely positive definite: a share of its mean diagonal is added to the diagonal, float64 [K, K]."""
    matrix = second_moment.double()
    mean = matrix.diagonal().mean().clamp(min=1e-12)
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (damping * mean)


def cholesky(second_moment: torch.Tensor, damping: float = 0.01, order: torch.Tensor | None = None) -> torch.Tensor:
    """The lower root L of the damped E[x xᵀ] = L Lᵀ, float64 [K, K]; order: of the features, int64 [K].

    Where inputs lie almost on a line, the moments' float32 sums leave eigenvalues further below zero than a small
    damping lifts them: it is then ten times what it was, until they are positive.
    """
    for _ in range(_TRIES):
        matrix = damped(second_moment, damping)
        root, failed = torch.linalg.cholesky_ex(matrix if order is None else matrix[order][:, order])
        if not failed:
            return root
        damping *= 10
    raise QvditError(
        "activations that are no numbers, or too large for their second moments",
        "finite inputs of every quantized linear",
        "look at the model's output in full precision; calibrate with other prompts",
    )


def search_second_order(
    weight: torch.Tensor, grid: WeightGrid, second_moment: torch.Tensor
) -> tuple[WeightGrid, torch.Tensor]:
    """Second-order rounding on grids around the given one: each output channel keeps that of the least E‖(w - ŵ) x‖².

    Returns the grid and the integers [N, K]. Rounding that passes its errors on clips differently from rounding to
    nearest, so the scale that a search by nearest rounding finds is only where this one begins.
    """
    rows = max(1, _TRIED_AT_ONCE // (len(_AROUND) * weight.shape[1]))
    spread = ErrorSpread.of(second_moment)
    parts = zip(weight.split(rows), grid.scale.split(rows), grid.zero.split(rows), strict=True)
    found = [_search_rows(w, WeightGrid(grid.bits, s, z), second_moment, spread) for w, s, z in parts]
    scale, weight_q = (torch.cat(values) for values in zip(*found, strict=True))
    return WeightGrid(grid.bits, scale, grid.zero), weight_q


def _search_rows(
    weight: torch.Tensor, grid: WeightGrid, second_moment: torch.Tensor, spread: ErrorSpread
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and the integers of some channels. Channels are rounded independently: all tries are one call."""
    scale = torch.cat([grid.scale * factor for factor in _AROUND])
    tried = WeightGrid(grid.bits, scale, torch.cat([grid.zero] * len(_AROUND)))
    repeated = torch.cat([weight] * len(_AROUND))
    weight_q = spread.rounded(repeated, tried)
    error = tried.dequantize(weight_q) - repeated
    cost = ((error @ second_moment) * error).sum(1).view(len(_AROUND), -1)
    best = cost.argmin(0) * len(weight) + torch.arange(len(weight), device=weight.device)
    return scale[best], weight_q[best]


def round_second_order(weight: torch.Tensor, grid: WeightGrid, second_moment: torch.Tensor) -> torch.Tensor:
    """Second-order rounding (GPTQ, arXiv 2210.17323): integers [N, K] that keep W x rather than W."""
    return ErrorSpread.of(second_moment).rounded(weight, grid)


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread of the CPU, for many small steps.

    Several would wait for each other after every step, and where something else has a core, for that: many times as
    long as one thread takes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ErrorSpread:
    """How second-order rounding passes errors on, the same for all channels of an input, factored once.

    Features are rounded one after the other, the most active first; the error of each is spread over those still to
    come as the inverse of E[x xᵀ] says.
    """

    order: torch.Tensor  # int64 [K]: the features, as they are rounded
    spread: torch.Tensor  # float32 [K, K], upper: the root of the inverse, in that order

    @staticmethod
    def of(second_moment: torch.Tensor) -> ErrorSpread:
        """Of an input's E[x xᵀ], float32 [K, K]."""
        order = second_moment.diagonal().argsort(descending=True)
        inverse = torch.cholesky_inverse(cholesky(second_moment, order=order))
        return ErrorSpread(order, torch.linalg.cholesky(inverse, upper=True).float())

    def rounded(self, weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
        """Integers [N, K] of a weight [N, K], as float32."""
        order, spread = self.order, self.spread
        scale, zero = (per_feature(v, len(order)).expand(-1, len(order))[:, order] for v in (grid.scale, grid.zero))
        left = weight[:, order].clone()
        rounded = torch.empty_like(left)
        block = 64
        for start in range(0, left.shape[1], block):
            stop = min(start + block, left.shape[1])
            errors = torch.zeros(len(left), stop - start, device=left.device)
            with _one_thread():
                for k in range(start, stop):
                    column, own = left[:, k : k + 1], WeightGrid(grid.bits, scale[:, k], zero[:, k])
                    rounded[:, k : k + 1] = own.quantize(column)
                    error = (column - own.dequantize(rounded[:, k : k + 1])) / spread[k, k]
                    left[:, k:stop] -= error @ spread[k : k + 1, k:stop]
                    errors[:, k - start] = error[:, 0]
            left[:, stop:] -= errors @ spread[start:stop, stop:]
        return rounded[:, order.argsort()]
