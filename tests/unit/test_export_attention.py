"""Attention as the exporter writes it: the operators that runtimes recognise, and the same numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from qvdit.export.attention import translations
from qvdit.export.functions import OPSET
from qvdit.runtimes.onnxruntime import session

QUERY, KEY = (2, 3, 5, 8), (2, 3, 7, 8)  # batch, heads, tokens, features


class Attention(torch.nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **self.options)


def exported(model: Attention, inputs: tuple[torch.Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=OPSET, custom_translation_table=translations(), verbose=False
        )
    return program.model_proto


@pytest.mark.parametrize("mask", [None, "float", "bool"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}])
def test_attention_is_two_products_around_a_softmax(mask: str | None, options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(size, generator=generator) for size in (QUERY, KEY, KEY)]
    if mask is not None:
        drawn = torch.randn(2, 1, 5, 7, generator=generator)
        inputs.append(drawn if mask == "float" else drawn > -0.5)
    model = Attention(**options)
    proto = exported(model, tuple(inputs))
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds == {"MatMul": 2, "Mul": 1, "Softmax": 1, "Transpose": 1} | ({} if mask is None else {ADDED[mask]: 1})
    run = session(proto.SerializeToString(), 1)
    found = run.run(None, {put.name: x.numpy() for put, x in zip(run.get_inputs(), inputs, strict=True)})[0]
    np.testing.assert_allclose(found, model(*inputs).numpy(), atol=2e-6)


ADDED = {"float": "Add", "bool": "Where"}


@pytest.mark.parametrize("options", [{"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 0.5}])
def test_other_attentions_are_refused(options: dict[str, Any]) -> None:
    inputs = tuple(torch.zeros(QUERY) for _ in range(3))
    with pytest.raises(torch.onnx.OnnxExporterError, match="attention of video diffusion transformers"):
        exported(Attention(**options), inputs)
