"""Scaled dot-product attention as the four operators in which runtimes recognise it.

PyTorch's own translation scales queries and keys each by the fourth root and transposes the keys through three
dimensions; TensorRT neither fuses that nor runs its pieces well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qvdit.contract import QvditError


def translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` takes as its custom translations."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale · query keyᵀ + mask) value, each [batch, heads, tokens, features]; mask: float, or True: attend."""
    from onnxscript import opset21 as op  # of the exporter's requirements

    if is_causal or enable_gqa or dropout_p or len(key.shape) != 4:
        raise QvditError(
            "a model with causal, grouped, dropped-out or other than four-dimensional attention",
            "attention of video diffusion transformers",
            "choose another model",
        )
    features = query.shape[-1]
    factor = op.CastLike(op.Constant(value_float=features**-0.5 if scale is None else scale), query)
    # Before the product: FP16 would have to hold unscaled scores otherwise.
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype.is_floating_point():
        scores = op.Add(scores, attn_mask)
    elif attn_mask is not None:
        scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=float("-inf")), query))
    return op.MatMul(op.Softmax(scores, axis=-1), value)
