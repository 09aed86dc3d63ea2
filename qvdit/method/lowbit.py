"""Frozen layers as PyTorch modules: the quantized model that runtimes are compared with."""

from __future__ import annotations

import numpy as np
import torch

from qvdit.contract import LowBitLayer, StaticInt8Layer
from qvdit.contract.layer import Layer, arrays
from qvdit.method import operator
from qvdit.method.weights import per_feature


class FrozenLinear(torch.nn.Module):
    """Holds a frozen layer's arrays as buffers; subclasses compute."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.shape
        for name, value in arrays(layer).items():
            # Half is how a term is stored; it is computed in float32, as everything else.
            kept = value.astype(np.float32) if value.dtype == np.float16 else value.copy()
            self.register_buffer(name, torch.from_numpy(kept), persistent=False)

    def optional(self, name: str) -> torch.Tensor | None:
        """A buffer that a layer may lack."""
        return self._buffers.get(name)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A pipeline's .half() must not round scales: only the device may change.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class LowBitLinear(FrozenLinear):
    """``qvdit::LowBitLinear`` by its reference definition."""

    weight_q: torch.Tensor
    weight_scale: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor
    levels: torch.Tensor

    def __init__(self, layer: LowBitLayer):
        super().__init__(layer)
        self.low_bit = layer
        levels = operator.act_levels(layer.act_bits, layer.act_symmetric)
        self.register_buffer("levels", torch.tensor(float(levels)), persistent=False)
        self.groups = self.in_features // layer.group
        self.sum_dtype = operator.exact_dtype(layer.group, levels, layer.weight_bits)

    def centred_weight(self) -> torch.Tensor:
        """weight_q - weight_zero as float32, [N, K]."""
        zero = self.optional("weight_zero")
        weight = self.weight_q.float()
        return weight if zero is None else weight - per_feature(zero.float(), self.in_features)

    def quantize(self, x: torch.Tensor) -> operator.QuantizedRows:
        """x_q, s_x and z_x of an input."""
        transformed = operator.transform(x, self.optional("inv_smooth"), self.low_bit.rotation)
        return operator.quantize_rows(transformed, self.levels, self.low_bit.act_symmetric)

    def accumulate(self, rows: operator.QuantizedRows) -> torch.Tensor:
        """The exact integers Σ (x_q - z_x)(weight_q - weight_zero): [..., N], or [C, ..., N] for C groups."""
        return operator.accumulate(rows, self.centred_weight(), self.sum_dtype, self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.quantize(x)
        term = None
        if self.low_bit.rank:
            term = operator.rank_term(rows, self.alpha, self.beta, self.optional("frame_gain"), self.low_bit.rows)
        return operator.finish(rows, self.accumulate(rows), self.weight_scale, term, self.optional("bias"), x.dtype)


class StaticInt8Linear(FrozenLinear):
    """Plain static INT8: what QuantizeLinear/DequantizeLinear around a MatMul compute."""

    weight_q: torch.Tensor
    weight_scale: torch.Tensor
    act_scale: torch.Tensor

    def __init__(self, layer: StaticInt8Layer):
        super().__init__(layer)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """x_q as float32 holding integers, [..., K]."""
        inv_smooth = self.optional("inv_smooth")
        scaled = x.float() if inv_smooth is None else x.float() * inv_smooth
        return torch.round(scaled / self.act_scale).clamp(-128, 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.quantize(x) * self.act_scale) @ (self.weight_q.float() * self.weight_scale[:, None]).T
        bias = self.optional("bias")
        return (y if bias is None else y + bias).to(x.dtype)


def frozen_linear(layer: Layer) -> FrozenLinear:
    """The module that computes a layer."""
    return LowBitLinear(layer) if isinstance(layer, LowBitLayer) else StaticInt8Linear(layer)


def replace_linears(model: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> None:
    """Put modules in the places that their names give."""
    for name, module in modules.items():
        model.set_submodule(name, module)
