"""The quantized model in PyTorch as the reference of parity: every layer's own input and integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qvdit.contract import FrameRows
from qvdit.contract.layer import Layer
from qvdit.contract.parity import LayerOutputs, LayerReference
from qvdit.method.lowbit import FrozenLinear, LowBitLinear, StaticInt8Linear, frozen_linear
from qvdit.models.copies import copy_with

Visit = Callable[[LayerReference], None]

_SAVED_TOKENS = 4  # tokens kept of every frame in a bundle's parity files


def quantized_transformer(transformer: torch.nn.Module, layers: tuple[Layer, ...]) -> Any:
    """A copy of a transformer with its linears replaced by frozen layers: their weights are not copied."""
    device = next(transformer.parameters()).device
    return copy_with(transformer, {layer.name: frozen_linear(layer).to(device) for layer in layers}).eval()


@torch.no_grad()
def visit_layers(model: torch.nn.Module, inputs: dict[str, torch.Tensor], visit: Visit) -> torch.Tensor:
    """Run a quantized transformer, hand every layer's reference to ``visit`` as it is computed, return the output."""
    frozen = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    handles = [
        module.register_forward_pre_hook(lambda module, args: visit(layer_reference(module, args[0])))
        for module in frozen.values()
    ]
    try:
        return model(**inputs, return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sampled_layers(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, tuple[LayerReference, ...]]:
    """Run a quantized transformer; its output, and every layer's reference on a few rows (:func:`saved_input`)."""
    found: list[LayerReference] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, FrozenLinear)
        found.append(layer_reference(module, saved_input(module, args[0])))

    modules = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        return model(**inputs, return_dict=False)[0], tuple(found)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_reference(module: FrozenLinear, x: torch.Tensor) -> LayerReference:
    """What the reference operator computes for one input."""
    y = module.forward(x)
    if isinstance(module, LowBitLinear):
        rows = module.quantize(x)
        x_q, acc = rows.x_q, _flat_rows(module, module.accumulate(rows))
        gain = module.low_bit.frame_gain
        frames = 1 if gain is None else len(gain)
        per_frame = module.low_bit.rows.tokens_per_frame(x.shape[-2], frames)
    else:
        assert isinstance(module, StaticInt8Linear)
        x_q, acc, per_frame = module.quantize(x), None, 1
    outputs = LayerOutputs(x_q.cpu().numpy().astype(np.int32).reshape(-1, x.shape[-1]), acc, y.cpu().numpy())
    return LayerReference(module.layer.name, x.detach().cpu().float().numpy(), per_frame, outputs)


def _flat_rows(module: LowBitLinear, acc: torch.Tensor) -> np.ndarray:
    """acc as int64 [M, N], or [C, M, N] for C groups."""
    groups = module.low_bit.weight_scale.shape[1:]
    return acc.cpu().numpy().astype(np.int64).reshape(*groups, -1, module.out_features)


def saved_input(module: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
    """A few FP16-representable rows of a layer's input [..., L, K] that keep its frame structure."""
    x = x.half().float()
    if not isinstance(module, LowBitLinear) or module.low_bit.frame_gain is None:
        return x[:1, : 16 * _SAVED_TOKENS]
    frames = len(module.low_bit.frame_gain)
    if module.low_bit.rows is FrameRows.SEQUENCE:
        by_frame = x[:1].unflatten(1, (frames, -1))
        stride = max(1, by_frame.shape[2] // _SAVED_TOKENS)
        return by_frame[:, :, ::stride][:, :, :_SAVED_TOKENS].flatten(1, 2)
    if module.low_bit.rows is FrameRows.SPATIAL:
        return x[:frames, :_SAVED_TOKENS]
    return x[:_SAVED_TOKENS]
