"""Smoothing (SmoothQuant, arXiv 2211.10438): an input's outlying features move into the weights that read it.

Symbols: S recorded time steps, K input features. Salience: a feature's largest magnitude, of the activations at each
step [S, K] or of the weights [K].
"""

from __future__ import annotations

import torch

from qvdit.method.recipe import StepStatistic

_EMA_DECAY, _EMA_UPDATES = 0.95, 200  # Q-VDiT's code: two updates at each of 100 steps, the noisiest last


def weight_salience(weights: list[torch.Tensor]) -> torch.Tensor:
    """max |w| over the outputs of all the linears that read an input: [N_i, K] each → [K]."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def step_weights(statistic: StepStatistic, abs_max_by_step: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """How much each time step counts in an input's salience: float32 [S], summing to 1.

    abs_max_by_step: [S, K], most noise first. peak: [K], the weights' salience.

    ``mean``: all alike. ``spearman``: PTQ4DiT's Spearman's-ρ-guided salience calibration (arXiv 2405.16005),
    η_t = softmax over t of -ρ(activations' salience at t, weights' salience): a step counts the more the less its
    salient features are the weights' too, because balancing has the most to gain there. ``ema``: the moving average of
    Q-VDiT's code, which ends at the noisiest step: a row at place p in 0 (least noise) … 1 (most) counts as
    0.95^(200 (1 - p)).
    """
    steps = len(abs_max_by_step)
    if statistic == "spearman":
        correlations = torch.stack([spearman(row, peak) for row in abs_max_by_step])
        return torch.softmax(-correlations, 0)
    if statistic == "ema":
        before_last = torch.linspace(0, 1, steps, device=abs_max_by_step.device)  # 1 - p, row by row
        decayed = _EMA_DECAY ** (_EMA_UPDATES * before_last)
        return decayed / decayed.sum()
    return torch.full((steps,), 1 / steps, device=abs_max_by_step.device)


def salience(statistic: StepStatistic, abs_max_by_step: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """An input's salience over all time steps, float32 [K]."""
    return step_weights(statistic, abs_max_by_step, peak) @ abs_max_by_step


def spearman(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Spearman's ρ of two vectors [K]: the correlation of their ranks; 0 where one is constant. float32, scalar."""
    first, second = (_ranks(v) - (len(v) + 1) / 2 for v in (x, y))
    return ((first @ second) / (first.norm() * second.norm()).clamp(min=1e-12)).float()


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, equal values sharing their mean rank: float64 [K]."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def smoothing_scale(abs_max: torch.Tensor, peak: torch.Tensor, strength: float) -> torch.Tensor:
    """s = a^p / wmax^(1-p), float32 [K]: x is divided by it and the weights' columns are multiplied.

    abs_max: a [K], the input's salience. peak: wmax [K], the weights': one scale for all the linears that read the
    input, so that one quantized x serves q, k and v. strength: p in 0 … 1.

    p = 1/2 is PTQ4DiT's channel-wise salience balancing: it brings both sides to their geometric mean,
    x · √(a wmax) / a and w · √(a wmax) / wmax, and √(a wmax) / a = √(wmax / a) = 1 / s.
    """
    scale = abs_max.clamp(min=1e-5).pow(strength) / peak.clamp(min=1e-5).pow(1 - strength)
    # Only the ratios between features matter; a geometric mean of 1 keeps the numbers where they were.
    return scale / scale.log().mean().exp()
