"""TQE in closed form: the best rank-R correction of a quantized linear's output error, and its gain by frame.

Source: Q-VDiT (arXiv 2505.22167), Δ̂β = (M ⊙ Q̂(x)) αβ; the closed form is ours and replaces its zero initialisation.
"""

from __future__ import annotations

import torch

from qvdit.contract import FrameRows
from qvdit.method.weights import cholesky


def best_correction(error: torch.Tensor, second_moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha [K, R] and beta [R, N] that minimise E‖(error - betaᵀ alphaᵀ) x‖².

    error: W - Ŵ, float32 [N, K]. second_moment: E[x xᵀ] [K, K] = S Sᵀ. By Eckart-Young the answer is the truncated SVD
    of error · S, with S taken back out of its right factor.
    """
    root = cholesky(second_moment, 1e-4)
    alpha, beta = _truncated_svd(error.double() @ root, rank)
    alpha = torch.linalg.solve_triangular(root.T, alpha, upper=True)
    return alpha.float().contiguous(), beta.float().contiguous()


def best_approximation(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha [K, R] and beta [R, N] that minimise ‖W - betaᵀ alphaᵀ‖, W float32 [N, K]: its truncated SVD.

    Source: SVDQuant (arXiv 2411.05007), which keeps this branch at high precision and quantizes what is left of W.
    """
    alpha, beta = _truncated_svd(weight.double(), rank)
    return alpha.float().contiguous(), beta.float().contiguous()


def _truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """right · √σ [K, R] and √σ · leftᵀ [R, N] of a float64 matrix [N, K]."""
    left, sigma, right = _leading(matrix, rank)
    strength = sigma.sqrt()
    return right * strength, (left * strength).T


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first ``rank`` singular triplets of a matrix [N, K]: [N, R], [R], [K, R].

    Through the smaller Gram matrix, many times faster than a full decomposition; float64 makes up for the squaring.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    chosen = vectors[:, -rank:].flip(1)
    sigma = values[-rank:].flip(0).clamp(min=0).sqrt()
    other = (matrix.T @ chosen if wide else matrix @ chosen) / sigma.clamp(min=1e-30)
    return (chosen, sigma, other) if wide else (other, sigma, chosen)


class GainFit:
    """Least-squares gain of one layer's rank-R term for every frame, gathered over batches.

    For frame t: the g that minimises Σ ‖e - g·d‖², e = (W - Ŵ) x being the error, d = (x alpha) beta its correction.
    """

    def __init__(self, frames: int, rows: FrameRows):
        self.frames, self.rows = frames, rows
        self.product = torch.zeros(frames, dtype=torch.float64)
        self.square = torch.zeros(frames, dtype=torch.float64)

    def add(self, error: torch.Tensor, correction: torch.Tensor) -> None:
        """Add a batch of errors and corrections, [..., L, N] each."""
        shape = error.shape[:-1]
        per_frame = self.rows.tokens_per_frame(shape[-1], self.frames)
        frame = torch.arange(shape.numel(), device=error.device).div(per_frame, rounding_mode="floor") % self.frames
        for total, other in ((self.product, error), (self.square, correction)):
            by_row = (correction * other).sum(-1).flatten().double()
            total.index_add_(0, frame.cpu(), by_row.cpu())

    def gain(self, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        """The gains, float32 [T], 1 where there is nothing to correct; bounded, for frames seen seldom."""
        gain = self.product / self.square.clamp(min=1e-12)
        return torch.where(self.square > 1e-12, gain, 1.0).clamp(low, high).float()
