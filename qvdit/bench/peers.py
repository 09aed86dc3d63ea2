"""What a user could take instead of our kernels, as plain PyTorch. Compiled by the benchmark, run eagerly by its tests.

Shapes: x [M, K] bf16 → [M, N] bf16; s_x [M, 1] and scales of weights [1, N] are float32.
"""

from __future__ import annotations

import torch

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LEAST = 1e-12  # absmax of a row of zeros


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x by rows: int8 [M, K] and s_x."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST) / 127
    return (x / scale).round().to(torch.int8), scale


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x by rows: fp8 (e4m3) [M, K] and s_x."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST) / _FP8_MAX
    return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


def expand_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2], low nibbles first, each a value plus 8 → int8 [N, K]."""
    low, high = (packed & 15).to(torch.int8) - 8, (packed >> 4).to(torch.int8) - 8
    return torch.stack((low, high), -1).flatten(1)


def unfused_w4a8(x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Quantize, expand the weights to memory, cuBLASLt's int8 product, scale: four kernels. bias: float32 [N]."""
    x_q, scale = int8_rows(x)
    acc = torch._int_mm(x_q, expand_int4(packed).t())
    return (acc * scale * weight_scale + bias).to(x.dtype)


def fp8_row(x_q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """The fp8 product alone, scaled by rows of both. weight: fp8 [N, K]."""
    scales = {"scale_a": scale, "scale_b": weight_scale}
    return torch._scaled_mm(x_q, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def fp8_row_linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Quantize by rows, then :func:`fp8_row`. No bias, in its favour."""
    return fp8_row(*fp8_rows(x), weight, weight_scale)
