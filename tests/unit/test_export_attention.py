"""Attention's translation: what PyTorch computes, in the few operators that runtimes fuse."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from qvdit.export.attention import TRANSLATIONS
from qvdit.export.functions import OPSET
from qvdit.runtimes.onnxruntime import session

BATCH, HEADS, ROWS, TEXT, SIZE = 2, 3, 5, 7, 8


class Attention(torch.nn.Module):
    def __init__(self, **how: Any):
        super().__init__()
        self.how = how

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **self.how)


def exported(model: Attention, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    program = torch.onnx.export(
        model.eval(), inputs, dynamo=True, opset_version=OPSET, custom_translation_table=TRANSLATIONS, verbose=False
    )
    return program.model_proto


def drawn(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


QUERY, KEY = (BATCH, HEADS, ROWS, SIZE), (BATCH, HEADS, TEXT, SIZE)


@pytest.mark.parametrize(
    ("how", "mask", "ours"),
    [
        ({}, None, True),
        ({"scale": 0.3}, None, True),
        ({}, torch.linspace(-2, 2, TEXT).expand(BATCH, 1, 1, TEXT).contiguous(), True),
        ({}, torch.arange(TEXT).lt(TEXT - 2).expand(BATCH, 1, ROWS, TEXT).contiguous(), False),
        ({"is_causal": True}, None, False),
    ],
    ids=["plain", "scaled", "additive mask", "boolean mask", "causal"],
)
def test_attention_is_pytorchs(how: dict[str, Any], mask: Any, ours: bool) -> None:
    model, inputs = Attention(**how), drawn(QUERY, KEY, KEY)
    inputs = inputs if mask is None else (*inputs, mask)
    graph = exported(model, inputs)
    names = [value.name for value in graph.graph.input]
    fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    found = session(graph.SerializeToString(), 1).run(None, fed)[0]
    np.testing.assert_allclose(found, model(*inputs).numpy(), rtol=0, atol=2e-6)
    counts = collections.Counter(node.op_type for node in graph.graph.node)
    assert (counts["Mul"] == 1 and counts["Reshape"] == 0) == ours
    assert (counts["MatMul"], counts["Softmax"]) == (2, 1)


def test_queries_alone_are_scaled_and_nothing_else_lies_between() -> None:
    nodes = exported(Attention(), drawn(QUERY, KEY, KEY)).graph
    by_output = {name: node for node in nodes.node for name in node.output}
    product = by_output[nodes.output[0].name]
    softmax = by_output[product.input[0]]
    scores = by_output[softmax.input[0]]
    assert (product.op_type, softmax.op_type, scores.op_type) == ("MatMul", "Softmax", "MatMul")
    scaled, keys = by_output[scores.input[0]], by_output[scores.input[1]]
    assert (scaled.op_type, scaled.input[0]) == ("Mul", "query")
    assert (keys.op_type, keys.input[0], helper.get_node_attr_value(keys, "perm")) == ("Transpose", "key", [0, 1, 3, 2])
    factor = next(tensor for tensor in nodes.initializer if tensor.name == scaled.input[1])
    assert onnx.numpy_helper.to_array(factor) == np.float32(1 / math.sqrt(SIZE))
