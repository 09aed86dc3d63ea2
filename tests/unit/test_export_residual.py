"""Residual sums: what the plugin's nodes take over of a graph, what they leave alone, and that it is the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from onnx import TensorProto
from test_export_plugin import in_onnxruntime
from test_export_prologue import K, call, types_of

from qvdit.contract.parity import relative_error
from qvdit.export import plugin
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION
from qvdit.export.graph import placeholder_name
from qvdit.export.opset import lowered
from qvdit.export.precision import strongly_typed
from qvdit.export.prologue import with_prologues
from qvdit.export.residual import RESIDUAL, with_residuals
from qvdit.export.values import fits

make = onnx.helper.make_node
GATES = make("ReduceMean", ["x", "tokens"], ["gate"], keepdims=1)  # [B, 1, K]
TOKENS = {"tokens": np.array([1])}
SWAP = (
    make("Reshape", ["sum", "apart"], ["axes"]),
    make("Transpose", ["axes"], ["turned"], perm=[0, 2, 1, 3]),
    make("Reshape", ["turned", "together"], ["y"]),
)
SHAPES = {"apart": [-1, 2, 4, K], "together": [-1, 2, K]}


def graph_of(
    *nodes: onnx.NodeProto,
    inputs: dict[str, list[int | str]] | None = None,
    **constants: np.ndarray | Sequence[int],
) -> onnx.ModelProto:
    """A strongly typed graph of nodes that make ``y`` of ``x`` [B, 4, K] or of other inputs, with constants."""
    held = {name: np.asarray(v, None if isinstance(v, np.ndarray) else np.int64) for name, v in constants.items()}
    value, batch = onnx.helper.make_tensor_value_info, ["batch", 4, K]
    y = ["rows", *constants["together"][1:]] if "together" in constants else batch
    given = {"x": batch} if inputs is None else inputs
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value(name, TensorProto.FLOAT, shape) for name, shape in given.items()],
        [value("y", TensorProto.FLOAT, y)],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    widths = {placeholder_name(node): (K, K) for node in nodes if node.domain == DOMAIN}
    return strongly_typed(onnx.helper.make_model(graph, opset_imports=opsets), widths)


def sums(model: onnx.ModelProto) -> list[tuple[list[str], list[str], dict[str, int]]]:
    """Inputs, outputs and attributes of the nodes for residual sums."""
    return [
        (
            list(node.input),
            list(node.output),
            {a.name: a.i for a in node.attribute if a.name in ("gated", "swapped")},
        )
        for node in model.graph.node
        if node.domain == DOMAIN and node.op_type == RESIDUAL
    ]


def test_a_sum():
    typed = graph_of(call("x", "a", "layer"), make("Add", ["x", "a"], ["y"]))
    (found,) = sums(with_residuals(typed))
    assert found[0][0] == "x"
    assert types_of(typed)[found[0][1]] == TensorProto.FLOAT16
    assert found[1:] == (["y"], {"gated": 0, "swapped": 0})
    assert not sums(typed)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_gated_sum(flipped: bool):
    def order(*names: str) -> list[str]:
        return list(reversed(names)) if flipped else list(names)

    nodes = GATES, call("x", "a", "layer"), make("Mul", order("gate", "a"), ["m"]), make("Add", order("x", "m"), ["y"])
    model = with_residuals(graph_of(*nodes, **TOKENS))
    ((inputs, outputs, attributes),) = sums(model)
    assert (inputs[0], inputs[2], outputs, attributes) == ("x", "gate", ["y"], {"gated": 1, "swapped": 0})
    assert not {"Mul", "Add"} & {node.op_type for node in model.graph.node}


def test_a_sum_in_another_order():
    nodes = call("x", "a", "layer"), make("Add", ["x", "a"], ["sum"]), *SWAP
    ((_, outputs, attributes),) = sums(with_residuals(graph_of(*nodes, **SHAPES)))
    assert (outputs, attributes) == (["y"], {"gated": 0, "swapped": 2})


@pytest.mark.parametrize(
    "shapes",
    [
        {"apart": [-1, 2, 2, K], "together": [-1, 2, K]},  # other tokens than the sum's
        {"apart": [-1, 2, 4, K], "together": [-1, 4, K]},  # other tokens than the transposed ones
        {"apart": [-1, 2, 4, K], "together": [-1, 2 * K]},
    ],
)
def test_another_order_that_is_no_swap_stays(shapes: dict[str, list[int]]):
    nodes = call("x", "a", "layer"), make("Add", ["x", "a"], ["sum"]), *SWAP
    ((_, outputs, attributes),) = sums(with_residuals(graph_of(*nodes, **shapes)))
    assert (outputs, attributes["swapped"]) == (["sum"], 0)


LAYER = call("x", "a", "layer")
ALONE: dict[str, tuple[tuple[onnx.NodeProto, ...], dict[str, np.ndarray]]] = {
    "another reader of the layer": (
        (LAYER, make("Neg", ["a"], ["n"]), make("Add", ["x", "a"], ["s"]), make("Add", ["s", "n"], ["y"])),
        {},
    ),
    "another reader of the product": (
        (
            GATES,
            LAYER,
            make("Mul", ["a", "gate"], ["m"]),
            make("Add", ["x", "m"], ["s"]),
            make("Add", ["s", "m"], ["y"]),
        ),
        TOKENS,
    ),
    "a gate for each token": ((LAYER, make("Mul", ["a", "x"], ["m"]), make("Add", ["x", "m"], ["y"])), {}),
    "a gate without a batch": (
        (
            make("ReduceMean", ["x", "tokens"], ["gate"], keepdims=0),
            LAYER,
            make("Mul", ["a", "gate"], ["m"]),
            make("Add", ["x", "m"], ["y"]),
        ),
        {"tokens": np.array([0, 1])},
    ),
    "a gate in the low type": (
        (LAYER, make("Mul", ["a", "gate"], ["m"]), make("Add", ["x", "m"], ["y"])),
        {"gate": np.ones((1, 1, K), np.float32)},
    ),
    "a bias in the residual's place": ((LAYER, make("Add", ["a", "bias"], ["y"])), {"bias": np.ones(K, np.float32)}),
    "a residual of one token": (
        (LAYER, make("Add", ["a", "token"], ["y"])),
        {"token": np.ones((1, 1, K), np.float32)},
    ),
    "a layer of one batch": (
        (
            make("ReduceMean", ["x", "batch"], ["b"], keepdims=1),
            call("b", "a", "layer"),
            make("Add", ["x", "a"], ["y"]),
        ),
        {"batch": np.array([0])},
    ),
    "a residual of one batch": (
        (make("ReduceMean", ["x", "batch"], ["b"], keepdims=1), LAYER, make("Add", ["b", "a"], ["y"])),
        {"batch": np.array([0])},
    ),
    "the layer twice": ((LAYER, make("Add", ["a", "a"], ["y"])), {}),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_is_left_alone(case: str):
    nodes, constants = ALONE[case]
    typed = graph_of(*nodes, **constants)
    assert not sums(with_residuals(typed))


def test_tokens_that_are_not_known_are_not_swapped():
    """A 0 in a Reshape is no extent, and of the layer's tokens alone the node is written out again."""
    unknown, known = ["batch", "tokens", K], ["batch", 4, K]
    for x, z, inner in ((unknown, unknown, 0), (known, unknown, 4)):
        nodes = call("z", "a", "layer"), make("Add", ["x", "a"], ["sum"]), *SWAP
        typed = graph_of(*nodes, inputs={"x": x, "z": z}, **(SHAPES | {"apart": [-1, 2, inner, K]}))
        ((_, outputs, attributes),) = sums(with_residuals(typed))
        assert (outputs, attributes["swapped"]) == (["sum"], 0)


@pytest.mark.parametrize(
    ("x", "z", "found"),
    [("tokens", "tokens", 1), ("tokens", "others", 0), ("tokens", None, 1), (None, None, 1), ("tokens", 4, 1)],
)
def test_extents_of_different_names_are_not_the_same(x: int | str | None, z: int | str | None, found: int):
    """The plugin's node broadcasts nothing: its engine would be refused where they differ."""
    inputs: dict[str, Any] = {"x": ["batch", x, K], "z": ["batch", z, K]}
    typed = graph_of(call("z", "a", "layer"), make("Add", ["x", "a"], ["y"]), inputs=inputs)
    assert len(sums(with_residuals(typed))) == found


@pytest.mark.parametrize(
    ("groups", "batches"),
    [(None, ()), (0, (0, 2, 4)), (1, (0, 1, 2, 4)), (2, (0, 2)), (4, (0, 4))],
)
def test_a_gate_is_one_for_all_or_one_for_each(groups: int | None, batches: tuple[int, ...]):
    assert tuple(batch for batch in (0, 1, 2, 4) if fits(groups, batch)) == batches


@pytest.mark.parametrize(("family", "gated", "plain", "swapped"), [("wan", 4, 2, 0), ("latte", 4, 1, 2)])
@torch.no_grad()
def test_whole_models_are_the_same(
    family: str,
    gated: int,
    plain: int,
    swapped: int,
    wide_traced: Any,
    wide_models: Any,
    wide_inputs: Any,
    rtn_layers: Any,
):
    layers = rtn_layers(wide_models[family], 4, bits=8, rank=1)
    names = [layer.name for layer in layers]
    typed = with_prologues(strongly_typed(wide_traced(family), {layer.name: layer.shape for layer in layers}), names)
    summed = with_residuals(typed)
    found = [attributes for _, _, attributes in sums(summed)]
    assert sum(a["gated"] for a in found) == gated
    assert sum(not a["gated"] for a in found) == plain
    assert sum(a["swapped"] > 0 for a in found) == swapped
    before, after = (
        in_onnxruntime(plugin.plugin_model(lowered(graph), layers), wide_inputs[family]) for graph in (typed, summed)
    )
    assert relative_error(after, before) < 1e-6
