"""Smoothing (SmoothQuant, arXiv 2211.10438): an input's outlying features move into the weights that read it."""

from __future__ import annotations

import torch


def smoothing_scale(abs_max: torch.Tensor, weights: list[torch.Tensor], strength: float) -> torch.Tensor:
    """s = a^p / wmax^(1-p), float32 [K]: x is divided by it and the weights' columns are multiplied.

    abs_max: [K], of the input. weights: [N_i, K] of every linear that reads the input: one scale for all of them, so
    that one quantized x serves q, k and v. strength: p in 0 … 1.
    """
    peak = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scale = abs_max.clamp(min=1e-5).pow(strength) / peak.clamp(min=1e-5).pow(1 - strength)
    # Only the ratios between features matter; a geometric mean of 1 keeps the numbers where they were.
    return scale / scale.log().mean().exp()
