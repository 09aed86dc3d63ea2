"""Attention as the few operators that runtimes look for: a product, a softmax and a product.

PyTorch's exporter scales queries and keys by the root of the scale each, flattens the keys to transpose them, and
computes shapes and scale in nodes of their own. TensorRT fuses attention where queries alone are scaled and nothing
else lies between the products and the softmax; ONNX Runtime has less to run.

For TensorRT, models of static Q/DQ are left as PyTorch translates them: what 8.6 fuses between INT8 layers is wrong.
On an H200 an engine of wan-shapes was off by 17 times what FP16 costs, one held NaN, others of the same file were
right, as its timings chose; with every value an output, and so unfused, all values are right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset21 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale · query keyᵀ + mask) value, for torch.onnx.export's table of translations.

    query, key and value: float [B, H, L, D]. Anything but heads of one known size, without causality and with an
    additive mask or none, is left to the exporter's own translation.
    """
    size: Any = query.shape[-1] if query.shape is not None else None
    ours = isinstance(size, int) and not is_causal and not enable_gqa and not dropout_p
    if not ours or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = op.Constant(value_float=1 / math.sqrt(size) if scale is None else scale)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


TRANSLATIONS = {torch.ops.aten.scaled_dot_product_attention.default: attention}
