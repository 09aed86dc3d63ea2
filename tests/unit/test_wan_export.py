"""Wan as it is exported: what its size must not change."""

from __future__ import annotations

from typing import Any

import onnx
import torch

from qvdit.export.graph import placeholder_name
from qvdit.export.opset import lowered
from qvdit.export.precision import strongly_typed
from qvdit.export.trace import trace
from qvdit.models import WanAdapter
from qvdit.models.adapter import pair_turn, rotate_pairs
from tests.conftest import wan


def traced(example_inputs: Any, features: int) -> tuple[onnx.ModelProto, dict[str, tuple[int, int]]]:
    model = wan(attention_head_dim=features)
    shapes = {site.name: model.get_submodule(site.name).weight.shape for site in WanAdapter().sites(model)}
    layers = {name: (int(n), int(k)) for name, (n, k) in shapes.items()}
    inputs = example_inputs((3, 4, 32, 32), 64)
    return trace(model, WanAdapter(), {name: n for name, (n, _) in layers.items()}, inputs), layers


def test_heads_of_128_features_reach_tensorrt(example_inputs):
    """Wan 2.1's. The rotary embedding's matrix is a constant, made before the trace and shared by all attentions."""
    model, layers = traced(example_inputs, 128)
    kinds = {node.op_type for node in model.graph.node}
    assert not {"ScatterND", "ScatterElements", "EyeLike"} & kinds
    assert [tuple(t.dims) for t in model.graph.initializer].count((128, 128)) == 1
    typed = lowered(strongly_typed(model, layers))
    assert {placeholder_name(node) for node in typed.graph.node if node.domain} == set(layers)


def test_pairs_are_turned_by_their_angle():
    generator = torch.Generator().manual_seed(0)
    x, angle = torch.randn(3, 5, 8, generator=generator), torch.randn(5, 4, generator=generator)
    cos, sin = (f(angle).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotate_pairs(x, cos, sin, pair_turn(8)), expected)
