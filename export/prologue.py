"""What the plugin computes of x while it quantizes it, taken out of the graph and put into the placeholders.

TensorRT would write such a value in float32, cast it and move it before the plugin reads it; the kernels compute it in
registers. A step between :func:`qvdit.export.precision.strongly_typed` and :func:`qvdit.export.opset.lowered`, which
knows no Gelu any more. Symbols: L rows of K features; G modulations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.contract.kernels import Prologue
from qvdit.export.graph import is_layer, placeholder_name
from qvdit.export.opset import gelu
from qvdit.export.precision import LARGEST
from qvdit.export.values import Values, beside, drop_unread, fits

_EPSILON = 1e-5  # LayerNormalization's where it does not say


@dataclass(frozen=True)
class Reading:
    """What a placeholder or the plugin's node reads, and what it computes of that before it quantizes it."""

    inputs: tuple[str, ...]  # x; with a LayerNorm also the modulation's scale, without its 1, and shift: [G, 1, K]
    prologue: Prologue = Prologue.PLAIN
    epsilon: int = 0  # of the LayerNorm: the bits of a float32

    @staticmethod
    def of(node: onnx.NodeProto) -> Reading:
        """The reading of a placeholder or of the plugin's node."""
        given = {a.name: a.i for a in node.attribute if a.name in ("prologue", "epsilon")}
        prologue = Prologue(given.get("prologue", Prologue.PLAIN))
        count = 3 if prologue is Prologue.LAYERNORM else 1
        return Reading(tuple(node.input[:count]), prologue, given.get("epsilon", 0))

    @property
    def attributes(self) -> dict[str, int]:
        """The node's attributes for it."""
        return {"prologue": int(self.prologue), "epsilon": self.epsilon}


def with_prologues(typed: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """A copy of a strongly typed graph in which placeholders read what the plugin's prologue reads, and say which.

    layers: those that the plugin computes; no other placeholder is touched. Two patterns are looked for, each where
    such layers alone read its last value, and nothing else the ones between:

    - GELU, tanh approximation, of a value of the low type;
    - a LayerNorm without weights of a float32 [G or more, L, K], · (1 + scale) + shift, both float32 [G, 1, K].
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    values = Values(model.graph)
    for node in model.graph.node:
        if not node.domain and node.op_type in _FUSED:
            _FUSED[node.op_type](node, values, layers)
    drop_unread(model.graph)
    return model


def written_out(
    reading: Reading, name: str, kind: int, features: int, graph: onnx.GraphProto
) -> tuple[str, list[onnx.NodeProto]]:
    """A prologue as nodes of opset 17, in float32, cast to ``kind``: the name of what is quantized, and the nodes.

    name: what the values' names begin with. features: K. Constants are added to the graph.
    """
    if reading.prologue is Prologue.PLAIN:
        return reading.inputs[0], []
    make, result = onnx.helper.make_node, f"{name}:prologue"
    exact, inner = f"{result}:x", f"{result}:float"
    nodes = [make("Cast", [reading.inputs[0]], [exact], to=TensorProto.FLOAT)]
    if reading.prologue is Prologue.GELU:
        nodes += gelu(make("Gelu", [exact], [inner], approximate="tanh"), graph)
    else:
        _, scale, shift = reading.inputs
        ones, one = (_ones(graph, shape) for shape in ((features,), ()))
        epsilon = float(np.array(reading.epsilon, np.int32).view(np.float32))
        norm, factor, scaled = (f"{result}:{part}" for part in ("norm", "factor", "scaled"))
        nodes += [
            make("LayerNormalization", [exact, ones], [norm], axis=-1, epsilon=epsilon),
            make("Add", [scale, one], [factor]),
            make("Mul", [norm, factor], [scaled]),
            make("Add", [scaled, shift], [inner]),
        ]
    return result, [*nodes, make("Cast", [inner], [result], to=kind)]


def _ones(graph: onnx.GraphProto, shape: tuple[int, ...]) -> str:
    """A float32 constant of ones, made when it is first asked for; returns its name."""
    name = f"prologue:ones:{'x'.join(map(str, shape))}"
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    return name


def _placeholders(name: str, values: Values, layers: Collection[str]) -> list[onnx.NodeProto]:
    """The placeholders that read a value, through a Cast or not; none if anything else reads it."""
    found: list[onnx.NodeProto] = []
    casts = [node for node in values.readers.get(name, []) if node.op_type == "Cast"]
    for read in (name, *(cast.output[0] for cast in casts)):
        direct = [node for node in values.readers.get(read, []) if node not in casts]
        ours = all(is_layer(node) and placeholder_name(node) in layers for node in direct)
        if read in values.outputs or not ours:
            return []
        found += direct
    return found


def _give_low(placeholders: Iterable[onnx.NodeProto], values: Values) -> bool:
    """Whether all write the low type: TensorRT 8.6, which knows no types between its layers, takes a prologue to."""
    return all(values.type(placeholder.output[0]) in LARGEST for placeholder in placeholders)


def _fuse_gelu(node: onnx.NodeProto, values: Values, layers: Collection[str]) -> None:
    x = values.before_cast(node.input[0])
    tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
    placeholders = _placeholders(node.output[0], values, layers)
    if tanh and values.type(x) in LARGEST and _give_low(placeholders, values):
        _mark(placeholders, Reading((x,), Prologue.GELU))


def _fuse_layer_norm(node: onnx.NodeProto, values: Values, layers: Collection[str]) -> None:
    modulation = _modulation(node, values)
    if modulation is None:
        return
    last, scale, shift = modulation
    placeholders = _placeholders(last, values, layers)
    if _give_low(placeholders, values):
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), _EPSILON)
        bits = int(np.array(epsilon, np.float32).view(np.int32))
        _mark(placeholders, Reading((node.input[0], scale, shift), Prologue.LAYERNORM, bits))


def _modulation(norm: onnx.NodeProto, values: Values) -> tuple[str, str, str] | None:
    """The modulated value, scale and shift of a LayerNorm that the kernels compute with what follows; else None."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
    x, (weight, *bias) = norm.input[0], norm.input[1:]
    shape, between = values.shape(x), norm.output[0]
    if shape is None or len(shape) != 3 or given.get("axis", -1) not in (-1, 2) or len(norm.output) != 1:
        return None
    if not values.is_constant(weight, 1.0) or any(name and not values.is_constant(name, 0.0) for name in bias):
        return None
    product = values.only_reader(between, "Mul")
    if product is None:
        return None
    factor = beside(product, between)
    plus_one = values.writer.get(factor)
    if plus_one is None or plus_one.op_type != "Add":
        return None
    scales = [name for name in plus_one.input if not _is_one(name, values)]
    total = values.only_reader(product.output[0], "Add")
    if total is None or len(scales) != 1:
        return None
    shift = beside(total, product.output[0])
    (scale,), features = scales, shape[2] or int(np.prod(values.constants[weight].dims))
    groups = [values.groups(name, features) for name in (scale, shift)]
    floats = (x, between, factor, scale, shift, product.output[0], total.output[0])
    if groups[0] != groups[1] or any(values.type(name) != TensorProto.FLOAT for name in floats):
        return None
    return (total.output[0], scale, shift) if fits(groups[0], shape[0]) else None


def _is_one(name: str, values: Values) -> bool:
    return values.is_constant(name, 1.0) and int(np.prod(values.constants[name].dims)) == 1


_FUSED = {"Gelu": _fuse_gelu, "LayerNormalization": _fuse_layer_norm}


def _mark(placeholders: Iterable[onnx.NodeProto], reading: Reading) -> None:
    for placeholder in placeholders:
        placeholder.input[:] = reading.inputs
        placeholder.attribute.extend(onnx.helper.make_attribute(*item) for item in reading.attributes.items())
