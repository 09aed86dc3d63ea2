"""The quantized linear while it is trained: everything that folding later freezes is still a parameter.

    Ŵ = Q_w(W + B·A; Δ),   y = Q_a(x̃) Ŵᵀ + gain[frame] · (Q_a(x̃) alpha) beta + bias,   x̃ = FWHT(x · inv_smooth)

Source: Q-VDiT (arXiv 2505.22167). Gradients pass through rounding unchanged (straight-through estimator).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qvdit.contract import FrameRows, LowBitLayer
from qvdit.method import operator
from qvdit.method.weights import WeightGrid, per_feature


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round, with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


def rotated_by_product(x: torch.Tensor, hadamard: torch.Tensor) -> torch.Tensor:
    """FWHT of x [..., K] as a product with H_B: what the operator's butterfly gives but for rounding, in one pass.

    Training a network goes through it twice as often as running it does, and integers need not be equal there.
    """
    return (x.unflatten(-1, (-1, len(hadamard))) @ hadamard).flatten(-2)


class TrainableLinear(torch.nn.Module):
    """A linear that is quantized in every forward pass, with what can be trained as parameters."""

    weight: torch.Tensor
    zero: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    levels: torch.Tensor
    inv_smooth: torch.Tensor | None
    hadamard: torch.Tensor | None

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,  # [N, K], smoothed and rotated already; nearest rounding gives the starting integers
        bias: torch.Tensor | None,  # [N]
        grid: WeightGrid,
        act_bits: int,
        act_symmetric: bool,
        rows: FrameRows,
        inv_smooth: torch.Tensor | None = None,  # [K]
        alpha: torch.Tensor | None = None,  # [K, R]
        beta: torch.Tensor | None = None,  # [R, N]
        gain: torch.Tensor | None = None,  # [T]
        rotation: int = 0,  # B
    ):
        super().__init__()
        self.name, self.act_bits, self.act_symmetric, self.rows = name, act_bits, act_symmetric, rows
        self.weight_bits, self.rotation = grid.bits, rotation
        # The rotation of the operator makes inputs √B times as large, and weights and alpha as much smaller. What is
        # trained is what it would be with an orthonormal one: an optimizer's steps are then as far, rotated or not.
        self.rotated = max(rotation, 1) ** -0.5
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("zero", grid.zero)
        self.register_buffer("inv_smooth", inv_smooth)
        matrix = operator.walsh_hadamard(torch.eye(rotation, device=weight.device), rotation) if rotation else None
        self.register_buffer("hadamard", matrix)  # H_B
        # Buffers, not numbers: compiled code then serves every width.
        self.register_buffer("low", torch.tensor(float(grid.low), device=weight.device))
        self.register_buffer("high", torch.tensor(float(grid.high), device=weight.device))
        levels = float(operator.act_levels(act_bits, act_symmetric))
        self.register_buffer("levels", torch.tensor(levels, device=weight.device))
        self.log_scale = torch.nn.Parameter(grid.scale.log())  # the logarithm keeps Δ positive
        self.bias = None if bias is None else torch.nn.Parameter(bias.clone())
        self.alpha = None if alpha is None else torch.nn.Parameter(alpha / self.rotated)
        self.beta = None if beta is None else torch.nn.Parameter(beta)
        self.gain = None if gain is None else torch.nn.Parameter(gain)
        self.inner_a: torch.nn.Parameter | None = None
        self.inner_b: torch.nn.Parameter | None = None
        self.quantize_activations = True

    def add_inner_term(self, rank: int, generator: torch.Generator) -> None:
        """Give the quantizer its rank-``rank`` term B·A; B is zero, so nothing changes until it is trained."""
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = √5, as the authors
        a = (torch.rand(rank, self.in_features, generator=generator) * 2 - 1) * bound
        self.inner_a = torch.nn.Parameter(a.to(self.weight.device))
        self.inner_b = torch.nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))

    @property
    def grid(self) -> WeightGrid:
        """The grid as it is now."""
        return WeightGrid(self.weight_bits, self.log_scale.exp(), self.zero)

    @property
    def operator_alpha(self) -> torch.Tensor:
        """alpha as the operator takes it, [K, R]."""
        assert self.alpha is not None
        return self.alpha * self.rotated

    def latent_weight(self) -> torch.Tensor:
        """What is rounded: W + B·A / √block, [N, K]."""
        if self.inner_a is None or self.inner_b is None:
            return self.weight
        return self.weight + self.rotated * (self.inner_b @ self.inner_a)

    def quantized_weight(self) -> torch.Tensor:
        """Ŵ, [N, K], differentiable in Δ, A and B."""
        scale, zero = (per_feature(values, self.in_features) for values in (self.log_scale.exp(), self.zero))
        weight_q = (round_through(self.latent_weight() / scale) + zero).clamp(self.low, self.high)
        return (weight_q - zero) * scale

    def transformed_input(self, x: torch.Tensor) -> torch.Tensor:
        """x̃, float32 [..., K]; on a GPU the rotation is a product, in whatever precision float32 products have."""
        if self.hadamard is None or not x.is_cuda:
            return operator.transform(x, self.inv_smooth, self.rotation)
        return rotated_by_product(operator.transform(x, self.inv_smooth), self.hadamard)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """Q_a(x̃), or without Q_a where activations are kept in floating point."""
        transformed = self.transformed_input(x)
        if not self.quantize_activations:
            return transformed
        rows = operator.quantize_rows(transformed.detach(), self.levels, self.act_symmetric)
        return transformed + (rows.scale * rows.centred() - transformed).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round what has just been quantized
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x_hat = self.quantized_input(x)
        y = torch.nn.functional.linear(x_hat, self.quantized_weight(), self.bias)
        if self.alpha is None or self.beta is None:
            return y
        factor = x_hat @ self.operator_alpha
        if self.gain is not None:
            factor = factor * operator.row_gains(self.gain, self.rows, factor.shape)
        return y + factor @ self.beta

    @torch.no_grad()
    def fold(self) -> LowBitLayer:
        """Freeze: B·A disappears into the integers, everything else becomes an array of the operator."""
        grid = self.grid
        alpha, beta, gain = None, None, None
        if self.alpha is not None and self.beta is not None and bool(self.beta.any()):  # one never trained: nothing
            (alpha, beta), gain = half_term(self.operator_alpha, self.beta), self.gain
        return LowBitLayer(
            name=self.name,
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            act_symmetric=self.act_symmetric,
            rows=self.rows if gain is not None else FrameRows.NONE,
            weight_q=grid.quantize(self.latent_weight()).to(torch.int8).cpu().numpy(),
            weight_scale=_array(grid.scale),
            weight_zero=self.zero.to(torch.int8).cpu().numpy() if bool(self.zero.any()) else None,
            bias=None if self.bias is None else _array(self.bias),
            inv_smooth=None if self.inv_smooth is None else _array(self.inv_smooth),
            alpha=alpha,
            beta=beta,
            frame_gain=None if gain is None else _array(gain),
            rotation=self.rotation,
        )


def half_term(alpha: torch.Tensor, beta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """alpha [K, R] and beta [R, N] as float16, their product kept: each rank's two vectors are given the same peak.

    What a half cannot hold of a correction, 2^-11 of it, is far below the rounding it corrects.
    """
    peaks = [alpha.detach().float().abs().amax(0), beta.detach().float().abs().amax(1)]  # [R] each
    balance = (peaks[1] / peaks[0].clamp(min=1e-30)).sqrt()
    balance = torch.where(balance > 0, balance, 1.0)
    return _array(alpha * balance).astype(np.float16), _array(beta / balance[:, None]).astype(np.float16)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
