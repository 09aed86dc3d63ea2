"""LowBitLinear as the TensorRT plugin's node: constants as inputs, never as attributes (those know no external data).

Inputs and attributes are those that the plugin reads by position and name. Symbols: M rows, K input features, K_pad the
next multiple of 32, N output features of one layer, S layers computed by one node, R rank of each, T frames,
b weight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.contract import FrameRows, LowBitLayer, QvditError
from qvdit.contract.kernels import KernelConstants, mergeable, unserved
from qvdit.contract.layer import Layer, padded_size
from qvdit.contract.packing import unpack
from qvdit.export.files import save_model
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE
from qvdit.export.graph import Fill, FullWeights, GraphEditor, fill, is_layer, placeholder_name, plain_fills
from qvdit.export.headwise_attention import ATTENTION, PLUGIN_VERSION, attention_written_out, pack
from qvdit.export.opset import TENSORRT_OPSET
from qvdit.export.prologue import Reading, written_out
from qvdit.export.residual import RESIDUAL, residual_written_out
from qvdit.export.values import Values

ROWS = (FrameRows.NONE, FrameRows.SEQUENCE, FrameRows.SPATIAL, FrameRows.TEMPORAL)  # attribute rows: the index
Y_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)  # attribute y_type: the index
TEST_OUTPUTS = ("y", "x_q", "scale", "zero", "acc")
_NAMED = 8  # layers that a refusal names; a large model has hundreds
_BETWEEN_NAMES = ","  # of the layers that one node computes

_CONSTANTS = ("words", "weight_scale", "weight_zero", "bias", "inv_smooth", "alpha", "beta", "frame_gain")


def refuse_unserved(reasons: dict[str, str | None]) -> None:
    """Raise QvditError if the kernels do not serve a layer; reasons: by layer, None where there is none."""
    found = {name: reason for name, reason in reasons.items() if reason}
    if found:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(found.items())[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise QvditError(
            f"--target tensorrt with {len(found)} layers that its plugin does not compute: {named}{more}",
            "one scale a row, at most 16384 input features and rank 32 in every layer",
            "choose another recipe or --rank, or --target onnxruntime",
        )


def plugin_model(
    typed: onnx.ModelProto,
    layers: Sequence[Layer],
    kept: dict[str, FullWeights] | None = None,
    merge: bool = True,
) -> onnx.ModelProto:
    """A strongly typed graph with plugin nodes in the placeholders.

    kept: weights of the linears that stay in full precision; they get a MatMul of their placeholder's type. merge:
    layers of one input share a node where the kernels can (:func:`same_input`), which attention then reads as it is.
    Layers that the kernels do not serve raise QvditError.
    """
    refuse_unserved({layer.name: unserved(layer) for layer in layers})
    low_bit = [layer for layer in layers if isinstance(layer, LowBitLayer)]
    calls = {placeholder_name(node): node for node in typed.graph.node if is_layer(node)}
    types = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.output)}
    fills: dict[str, Fill] = {}
    for group in same_input(typed, low_bit) if merge else [(layer,) for layer in low_bit]:
        fills |= {layer.name: lambda node, editor: [] for layer in group[1:]}  # the first one's node writes them all
        outputs = [calls[layer.name].output[0] for layer in group]
        fills[group[0].name] = _call(group, outputs, types[outputs[0]])
    model = fill(typed, fills | plain_fills(typed, kept or {}))
    pack(model.graph)
    return model


def same_input(typed: onnx.ModelProto, layers: Sequence[LowBitLayer]) -> list[tuple[LowBitLayer, ...]]:
    """The layers in groups that one node can compute: queries, keys and values of one attention that read one value.

    Not across attentions: a text's keys and values of all blocks would be one product, but would be held for all of
    the model's time.
    """
    by_name = {layer.name: layer for layer in layers}
    readers: dict[tuple[Reading, str], list[LowBitLayer]] = {}
    for node in typed.graph.node:
        if is_layer(node) and placeholder_name(node) in by_name:
            layer = by_name[placeholder_name(node)]
            readers.setdefault((Reading.of(node), layer.name.rpartition(".")[0]), []).append(layer)
    groups: list[tuple[LowBitLayer, ...]] = []
    for found in readers.values():
        groups += [tuple(found)] if len(found) == 1 or mergeable(found) else [(layer,) for layer in found]
    return groups


def _call(group: Sequence[LowBitLayer], outputs: list[str], y_type: int) -> Fill:
    def build(node: onnx.NodeProto, editor: GraphEditor) -> list[onnx.NodeProto]:
        if len(group) == 1:
            return [plugin_node(group, Reading.of(node), outputs, y_type, editor)]
        merged = f"{outputs[0]}:merged"
        sizes = np.array([layer.shape[0] for layer in group], np.int64)
        split = [merged, editor.constant(f"{merged}:sizes", sizes)]
        editor.describe_like(merged, outputs[0], int(sizes.sum()))
        return [
            plugin_node(group, Reading.of(node), [merged], y_type, editor),
            onnx.helper.make_node("Split", split, outputs, f"{merged}:split", axis=-1),
        ]

    return build


def plugin_node(
    group: Sequence[LowBitLayer],
    reading: Reading,
    outputs: list[str],
    y_type: int,
    editor: GraphEditor,
    test_outputs: bool = False,
) -> onnx.NodeProto:
    """One plugin node for a layer, or for several that are mergeable; its constants become initializers.

    outputs: y, or :data:`TEST_OUTPUTS` where ``test_outputs``; y is of ``y_type``, one of :data:`Y_TYPES`. The node's
    name holds the layers'.
    """
    first, constants = group[0], KernelConstants.of(group)
    name = _BETWEEN_NAMES.join(layer.name for layer in group)
    held = {field: getattr(constants, field) for field in _CONSTANTS}
    if held["weight_zero"] is not None:
        held["weight_zero"] = _bytes_in_words(held["weight_zero"])
    n, k = first.shape
    frames = 0 if held["frame_gain"] is None else held["frame_gain"].shape[1]
    attributes = {
        "plugin_version": PLUGIN_VERSION,
        "plugin_namespace": "",
        "in_features": k,
        "out_features": n * len(group),
        "weight_bits": first.weight_bits,
        "act_bits": first.act_bits,
        "act_symmetric": int(first.act_symmetric),
        "rank": first.rank,
        "segment": n,
        "rows": ROWS.index(first.rows) if frames else 0,
        "frames": frames,
        "rotation": first.rotation,
        **reading.attributes,
        "y_type": Y_TYPES.index(y_type),
        "has_zero": int(held["weight_zero"] is not None),
        "has_bias": int(held["bias"] is not None),
        "has_smooth": int(held["inv_smooth"] is not None),
        "test_outputs": int(test_outputs),
    }
    inputs = [editor.constant(f"{name}:{field}", value) for field, value in held.items() if value is not None]
    return onnx.helper.make_node(NODE, [*reading.inputs, *inputs], outputs, name, domain=DOMAIN, **attributes)


def _bytes_in_words(values: np.ndarray) -> np.ndarray:
    """int8 [N] → int32 [ceil(N / 4)], little-endian: TensorRT 8.6 takes an INT8 tensor for a quantized one."""
    padded = np.zeros(-(-len(values) // 4) * 4, np.int8)
    padded[: len(values)] = values
    return padded.view("<i4")


# Back again -----------------------------------------------------------------------------------------------------------


def with_placeholders(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[LowBitLayer, ...]]:
    """The inverse of :func:`plugin_model`: placeholders again, and the layers that the nodes' constants hold.

    A merged node becomes its layers and a Concat, and a prologue is written out before them, so that any body of
    ``LowBitLinear`` can stand in for the plugin. So are attention, in float32, and residual sums.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    values = Values(result.graph)
    constants = values.constants
    nodes: list[onnx.NodeProto] = []
    layers: list[LowBitLayer] = []
    for node in result.graph.node:
        if node.domain == DOMAIN and node.op_type == ATTENTION:
            nodes += attention_written_out(node, values.type(node.output[0]), result.graph)
            continue
        if node.domain == DOMAIN and node.op_type == RESIDUAL:
            _, rows, features = values.shape(node.input[1]) or (0, 0, 0)
            nodes += residual_written_out(node, rows, features, result.graph)
            continue
        if not is_layer(node):
            nodes.append(node)
            continue
        group = decoded(node, constants)
        layers += group
        y, y_type = node.output[0], Y_TYPES[onnx.helper.get_node_attr_value(node, "y_type")]
        x, before = written_out(Reading.of(node), y, y_type, group[0].shape[1], result.graph)
        nodes += before
        parts = [y] if len(group) == 1 else [f"{y}:{layer.name}" for layer in group]
        for layer, part in zip(group, parts, strict=True):
            nodes.append(onnx.helper.make_node(NODE, [x], [part], domain=DOMAIN, layer=layer.name))
        if len(group) > 1:
            nodes.append(onnx.helper.make_node("Concat", parts, [y], axis=-1))
    used = {name for node in nodes for name in node.input}
    held = [tensor for tensor in result.graph.initializer if tensor.name in used]
    for field, kept in (("node", nodes), ("initializer", held)):
        del getattr(result.graph, field)[:]
        getattr(result.graph, field).extend(kept)
    return result, tuple(layers)


def decoded(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> tuple[LowBitLayer, ...]:
    """The layers of one plugin node, as the checkpoint holds them (a merged layer without a bias gets zeros)."""
    value = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    present = {
        "words": True,
        "weight_scale": True,
        "weight_zero": value["has_zero"],
        "bias": value["has_bias"],
        "inv_smooth": value["has_smooth"],
        "alpha": value["rank"],
        "beta": value["rank"],
        "frame_gain": value["frames"],
    }
    fields = [field for field in _CONSTANTS if present[field]]
    names = node.input[len(Reading.of(node).inputs) :]
    held = {f: onnx.numpy_helper.to_array(constants[name]) for f, name in zip(fields, names, strict=True)}
    n, k, r = value["segment"], value["in_features"], value["rank"]
    weight_q = unpack(held["words"].view(np.uint32), value["weight_bits"], k)
    layers = []
    for index, name in enumerate(node.name.split(_BETWEEN_NAMES)):
        rows = slice(index * n, (index + 1) * n)
        layer = LowBitLayer(
            name=name,
            weight_bits=value["weight_bits"],
            act_bits=value["act_bits"],
            act_symmetric=bool(value["act_symmetric"]),
            rows=ROWS[value["rows"]],
            weight_q=weight_q[rows],
            weight_scale=held["weight_scale"][rows],
            weight_zero=held["weight_zero"].view(np.int8)[rows] if value["has_zero"] else None,
            bias=held["bias"][rows] if value["has_bias"] else None,
            inv_smooth=held.get("inv_smooth"),
            alpha=held["alpha"][index * r : (index + 1) * r].T if r else None,
            beta=held["beta"][:, rows].astype(np.float16) if r else None,
            frame_gain=held["frame_gain"][index] if value["frames"] else None,
            rotation=value["rotation"],
        )
        layers.append(layer)
    return tuple(layers)


# Single layers, for parity by integers --------------------------------------------------------------------------------


def layer_model(*group: LowBitLayer, x_type: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """A model of one plugin node that shows its integers; several mergeable layers may be given.

    ``x`` [B, L, K] of ``x_type`` → ``y`` [B, L, S·N] of the same, ``x_q`` int32 [B, L, K_pad/4] (four int8 values a
    word, as they are stored), ``scale`` float32 [B, L], ``zero`` int32 [B, L], ``acc`` int32 [B, L, S·N].
    """
    n, k = sum(layer.shape[0] for layer in group), group[0].shape[1]
    value, leading = onnx.helper.make_tensor_value_info, ["batch", "tokens"]
    shapes: dict[str, tuple[int, list[int]]] = {
        "y": (x_type, [n]),
        "x_q": (TensorProto.INT32, [padded_size((1, k)) // 4]),
        "scale": (TensorProto.FLOAT, []),
        "zero": (TensorProto.INT32, []),
        "acc": (TensorProto.INT32, [n]),
    }
    outputs = [value(name, shapes[name][0], [*leading, *shapes[name][1]]) for name in TEST_OUTPUTS]
    graph = onnx.helper.make_graph([], "layer", [value("x", x_type, [*leading, k])], outputs)
    node = plugin_node(group, Reading(("x",)), list(TEST_OUTPUTS), x_type, GraphEditor(graph), test_outputs=True)
    graph.node.append(node)
    opsets = [onnx.helper.make_opsetid("", TENSORRT_OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="qvdit")


def write_layers(layers: Sequence[LowBitLayer], folder: Path) -> list[Path]:
    """Write :func:`layer_model` of each layer as ``NAME.onnx``; returns the files."""
    refuse_unserved({layer.name: unserved(layer) for layer in layers})
    return [path for layer in layers for path in save_model(layer_model(layer), folder / f"{layer.name}.onnx")]
