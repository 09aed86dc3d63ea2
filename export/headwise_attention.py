"""Attention as the plugin's node, which never holds the scores: what TensorRT leaves apart between nodes of a plugin.

A step between :func:`qvdit.export.prologue.with_prologues` and :func:`qvdit.export.opset.lowered`, and a second one,
:func:`pack`, once queries, keys and values are one product. Symbols: B batch, L rows of queries, S rows of keys and
values, H heads of D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import TensorProto

from qvdit.export.functions import DOMAIN
from qvdit.export.graph import is_layer
from qvdit.export.precision import LARGEST
from qvdit.export.values import Extent, Values, drop_unread

ATTENTION = "HeadwiseAttention"  # not Attention: newer ONNX has an operator of that name, which a parser would take
PLUGIN_VERSION = "4"
_LARGEST_HEAD, _STEP = 128, 8  # of qvdit_attention
_HEADS = [0, 2, 1, 3]  # [B, L, H, D] ↔ [B, H, L, D]


def with_attention(typed: onnx.ModelProto, largest: Mapping[str, float] | None = None) -> onnx.ModelProto:
    """A copy of a strongly typed graph with a node for every attention that the plugin computes; others stay.

    largest: the largest magnitude of each value; a float32 one is not narrowed where its type could not hold it. What
    is looked for: softmax(Q · scale Kᵀ) V in the low type without a mask, its result's heads joined again.
    ``HeadwiseAttention`` reads q, k and v of the low type, each [B, L, H·D], [B, L, H, D] (its ``layout`` 0) or
    [B, H, L, D] (1), and writes [B, L, H·D].
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    graph = model.graph
    finder = _Finder(graph, largest or {})
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "Softmax" and not node.domain:
            found |= finder.at(node)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += found.get(node.output[0], [node])
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(graph)
    return model


@dataclass(frozen=True)
class _Source:
    """Where a node reads q, k or v: a value, and whether its heads come before its rows."""

    name: str
    heads_first: bool
    path: tuple[str, ...]  # names of the same numbers on the way there
    extents: tuple[Extent, Extent, Extent, Extent]  # B, H, L, D


class _Finder:
    def __init__(self, graph: onnx.GraphProto, largest: Mapping[str, float]):
        self.graph, self.largest = graph, largest
        self.values = Values(graph)
        self.extents = _extents(graph, self.values)

    def at(self, softmax: onnx.NodeProto) -> dict[str, list[onnx.NodeProto]]:
        """What this softmax' attention ends with, and what writes that instead of it; nothing if nothing can."""
        values = self.values
        scores, (probabilities,) = values.writer.get(softmax.input[0]), softmax.output
        product = values.only_reader(probabilities, "MatMul")
        if scores is None or scores.op_type != "MatMul" or product is None or product.input[0] != probabilities:
            return {}
        if values.only_reader(scores.output[0], "Softmax") is None or _attribute(softmax, "axis", -1) not in (-1, 3):
            return {}
        (last,) = product.output
        low = values.type(last)
        between = (*scores.input, *scores.output, *product.input)
        joined, scaled = self.joined(last), self.scaled(scores.input[0])
        if low not in LARGEST or any(values.type(name) != low for name in between) or not joined or not scaled:
            return {}
        queries, factor = scaled
        found = (self.source(queries), self.keys(scores.input[1]), self.source(product.input[1]))
        sources = [source for source in found if source is not None and self.fits(source, low)]
        if len(sources) != 3:
            return {}
        q, k, v = sources
        if not self.suits(q, k, v, joined):
            return {}
        return {joined: self.made(sources, _exact(factor, sources[0]), low, joined)}

    def made(self, sources: Sequence[_Source], scale: float, low: int, y: str) -> list[onnx.NodeProto]:
        """The node that writes ``y``, and Casts of what is not in the low type before it."""
        nodes, inputs = [], []
        for of, source in zip("qkv", sources, strict=True):
            name = source.name
            if self.values.type(name) != low:
                name = f"{y}:{of}"
                nodes.append(onnx.helper.make_node("Cast", [source.name], [name], name, to=low))
                described = self.graph.value_info.add(name=name)
                described.type.tensor_type.CopyFrom(self.values.known[source.name])
                described.type.tensor_type.elem_type = low
            inputs.append(name)
        _, heads, _, size = sources[0].extents
        attributes = {
            "plugin_version": PLUGIN_VERSION,
            "plugin_namespace": "",
            "heads": heads,
            "head_size": size,
            "packed": 0,
            **{f"{of}_layout": int(source.heads_first) for of, source in zip("qkv", sources, strict=True)},
            "scale": int(np.array(scale, np.float32).view(np.int32)),
        }
        return [*nodes, onnx.helper.make_node(ATTENTION, inputs, [y], y, domain=DOMAIN, **attributes)]

    def joined(self, product: str) -> str | None:
        """What a product's heads are joined into, where nothing else reads them: of a Transpose and a Reshape."""
        transpose = self.values.only_reader(product, "Transpose")
        if transpose is None or _attribute(transpose, "perm") != _HEADS:
            return None
        reshape = self.values.only_reader(transpose.output[0], "Reshape")
        return reshape.output[0] if reshape is not None else None

    def scaled(self, name: str) -> tuple[str, np.ndarray] | None:
        """What a positive scalar constant scales, and the constant, of its own type."""
        mul = self.values.writer.get(self.uncast(name))
        if mul is None or mul.op_type != "Mul" or mul.domain:
            return None
        for factor, other in (mul.input, reversed(mul.input)):
            held = self.values.constants.get(factor)
            if held is not None and int(np.prod(held.dims)) == 1 and len(held.dims) <= 4:
                scale = onnx.numpy_helper.to_array(held).reshape(())
                return (other, scale) if np.isfinite(scale) and scale > 0 else None
        return None

    def keys(self, name: str) -> _Source | None:
        """Keys under the transposition that the product reads them in; the exporter merges it with that of heads."""
        transpose = self.values.writer.get(self.uncast(name))
        if transpose is None or transpose.op_type != "Transpose":
            return None
        perm, inner = _attribute(transpose, "perm"), transpose.input[0]
        if perm == [0, 1, 3, 2]:
            return self.source(inner)
        return self.rows_first(inner, (name,)) if perm == [0, 2, 3, 1] else None

    def source(self, name: str) -> _Source | None:
        """q, k or v of a value [B, H, L, D]."""
        inner = self.uncast(name)
        writer = self.values.writer.get(inner)
        if writer is not None and writer.op_type == "Transpose" and _attribute(writer, "perm") == _HEADS:
            return self.rows_first(writer.input[0], (name, inner))
        extents = self.extents.get(inner)
        if extents is None or len(extents) != 4:
            return None
        batch, heads, rows, size = extents
        return _Source(inner, True, (name,), (batch, heads, rows, size))

    def rows_first(self, name: str, path: tuple[str, ...]) -> _Source | None:
        """q, k or v of a value [B, L, H, D], or of the [B, L, H·D] that it is known to be."""
        inner = self.uncast(name)
        extents = self.extents.get(inner)
        if extents is None or len(extents) != 4:
            return None
        batch, rows, heads, size = extents
        reshape = self.values.writer.get(inner)
        whole = (batch, heads, rows, size)
        if reshape is not None and reshape.op_type == "Reshape" and isinstance(heads, int) and isinstance(size, int):
            flat = self.uncast(reshape.input[0])
            before = self.extents.get(flat)
            if before is not None and len(before) == 3 and self.same_rows(before, (batch, rows, heads * size)):
                return _Source(flat, False, (*path, name, inner, reshape.input[0]), whole)
        return _Source(inner, False, (*path, name), whole)

    def same_rows(self, before: Sequence[Extent], after: Sequence[Extent]) -> bool:
        """Whether two shapes [B, L, N] of one value's numbers are known to be the same."""
        return (
            before[2] is not None
            and before[2] == after[2]
            and any(one is not None and one == other for one, other in zip(before[:2], after[:2], strict=True))
        )

    def suits(self, q: _Source, k: _Source, v: _Source, joined: str) -> bool:
        """Whether the plugin's node takes these, and what it writes is what the heads are joined into."""
        batch, heads, rows, size = q.extents
        if not isinstance(heads, int) or not isinstance(size, int) or size % _STEP or not 0 < size <= _LARGEST_HEAD:
            return False
        # An unknown extent is no 1: none is broadcast. Dynamic extents of PyTorch's traces are 2 and more.
        same = all(source.extents[1::2] == (heads, size) for source in (k, v))
        numbers = {source.extents[0] if isinstance(source.extents[0], int) else None for source in (q, k, v)}
        after = self.extents.get(joined)
        whole = after is not None and len(after) == 3 and self.same_rows((batch, rows, heads * size), after)
        return same and len(numbers) == 1 and whole

    def fits(self, source: _Source, low: int) -> bool:
        kinds = {self.values.type(name) for name in (source.name, *source.path)}
        peak = max(self.largest.get(name, 0.0) for name in (source.name, *source.path))
        return kinds <= {low, TensorProto.FLOAT} and peak <= LARGEST[low]

    def uncast(self, name: str) -> str:
        """The value that a Cast between floating-point types made this one of, or itself."""
        inner = self.values.before_cast(name)
        return inner if self.values.type(inner) in (TensorProto.FLOAT, *LARGEST) else name


def _exact(factor: np.ndarray, queries: _Source) -> float:
    """A scale in float32, before it was rounded to the low type if it is the usual one."""
    usual = 1 / np.sqrt(queries.extents[-1])
    return float(usual if usual.astype(factor.dtype) == factor else factor)


def _attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# Shapes ---------------------------------------------------------------------------------------------------------------

_SAME_SHAPE = {"Cast", "Gelu", "Identity", "LayerNormalization", "Reciprocal", "Sigmoid", "Softmax", "Sqrt", "Tanh"}
_BROADCAST = {"Add", "Div", "Mul", "Pow", "Sub"}


def _extents(graph: onnx.GraphProto, values: Values) -> dict[str, tuple[Extent, ...]]:
    """The extents of a graph's values, as far as they are noted or can be followed from one value to the next.

    Shape inference follows numbers; what is computed at run time is followed here by its name, too.
    """
    found: dict[str, tuple[Extent, ...]] = {name: tuple(tensor.dims) for name, tensor in values.constants.items()}
    found |= {name: extents for name in values.known if (extents := values.extents(name)) is not None}
    for node in graph.node:
        followed = _followed(node, found, values)
        (first, *_) = node.output
        noted = found.get(first, followed)
        if followed is not None and noted is not None and len(noted) == len(followed):
            pairs = zip(noted, followed, strict=True)
            found[first] = tuple(one if isinstance(one, int) or other is None else other for one, other in pairs)
    return found


def _followed(
    node: onnx.NodeProto, found: Mapping[str, tuple[Extent, ...]], values: Values
) -> tuple[Extent, ...] | None:
    """The extents of a node's first output that those of its inputs tell."""
    given = [found.get(name) for name in node.input]
    if not given or given[0] is None:
        return None
    first = given[0]
    if is_layer(node):
        return (*first[:-1], None)
    if node.domain:
        return None
    if node.op_type in _SAME_SHAPE:
        return first
    if node.op_type == "Transpose":
        perm = _attribute(node, "perm")
        return tuple(first[axis] for axis in perm) if isinstance(perm, list) else None
    if node.op_type == "Reshape":
        target = _target(node.input[1], found, values)
        return None if target is None else _reshaped(first, target, bool(_attribute(node, "allowzero", 0)))
    second = given[1] if len(given) > 1 else None
    if second is None:
        return None
    if node.op_type in _BROADCAST:
        return _broadcast(first, second)
    if node.op_type == "MatMul" and len(first) > 1 and len(second) > 1:
        return (*_broadcast(first[:-2], second[:-2]), first[-2], second[-1])
    return None


def _target(name: str, found: Mapping[str, tuple[Extent, ...]], values: Values) -> tuple[Extent, ...] | None:
    """The numbers of a vector of extents, or their names; None where not even their number is known."""
    if name in values.constants:
        return tuple(int(value) for value in onnx.numpy_helper.to_array(values.constants[name]).reshape(-1))
    writer = values.writer.get(name)
    if writer is None:
        return None
    if writer.op_type == "Concat":
        parts = [_target(part, found, values) for part in writer.input]
        return None if None in parts else tuple(entry for part in parts for entry in part or ())
    if found.get(name) != (1,):
        return None
    if writer.op_type == "Shape":
        shape, start = found.get(writer.input[0]), _attribute(writer, "start", 0)
        if shape is not None and isinstance(start, int) and shape[start] is not None:
            return (shape[start],)
    return (f"[{name}]",)


def _reshaped(before: tuple[Extent, ...], target: tuple[Extent, ...], allow_zero: bool) -> tuple[Extent, ...]:
    kept = (*before, *[None] * len(target))
    copied = [kept[axis] if entry == 0 and not allow_zero else entry for axis, entry in enumerate(target)]
    return tuple(None if entry == -1 else entry for entry in copied)


def _broadcast(one: tuple[Extent, ...], other: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Extents that are not known are no 1: torch.export traces none that is as one that may vary."""
    rank = max(len(one), len(other))
    padded = [(*[1] * (rank - len(extents)), *extents) for extents in (one, other)]
    return tuple(_wider(*pair) for pair in zip(*padded, strict=True))


def _wider(one: Extent, other: Extent) -> Extent:
    for extent, beside in ((one, other), (other, one)):
        if extent == 1 or extent is None:
            return beside if extent == 1 or beside != 1 else None
    return one if isinstance(one, int) else other


# Packed inputs --------------------------------------------------------------------------------------------------------


def pack(graph: onnx.GraphProto) -> None:
    """Have attention read queries, keys and values, or the latter two, as one node writes them, and no Split.

    That is wherever they alone read a product's parts in their order: [B, L, 3·H·D] or [B, S, 2·H·D].
    """
    values = Values(graph)
    nodes: list[onnx.NodeProto] = []
    gone: set[str] = set()  # values and constants that nothing reads any more
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == ATTENTION:
            nodes += _pack(node, graph, values, gone)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in gone)
    for described in (graph.value_info, graph.initializer):  # one by one: constants may be large
        for index in reversed(range(len(described))):
            if described[index].name in gone:
                del described[index]


def _pack(node: onnx.NodeProto, graph: onnx.GraphProto, values: Values, gone: set[str]) -> list[onnx.NodeProto]:
    """Have a node read a whole product, if its parts come of one; returns what it needs before it."""
    features = _integer(node, "heads") * _integer(node, "head_size")
    for count in (3, 2):
        if any(_integer(node, f"{of}_layout") for of in "qkv"[3 - count :]):
            continue  # parts of a product have their rows first
        reads = list(node.input[3 - count :])
        reshapes = [values.writer[name] for name in reads if name in values.writer]
        shaped = len(reshapes) == count and all(reshape.op_type == "Reshape" for reshape in reshapes)
        parts = [reshape.input[0] for reshape in reshapes] if shaped else reads
        split = values.writer.get(parts[0])
        if split is None or split.op_type != "Split" or list(split.output) != parts or len(split.input) != 2:
            continue
        whole, sizes = split.input[0], values.constants.get(split.input[1])
        alone = all(len(values.readers[name]) == 1 and name not in values.outputs for name in {*parts, *reads})
        if sizes is None or set(onnx.numpy_helper.to_array(sizes)) != {features} or not alone:
            continue
        if len(values.shape(whole) or ()) != 3 or _attribute(split, "axis", 0) not in (-1, 2):
            continue
        before: list[onnx.NodeProto] = []
        if shaped:
            if len({(reshape.input[1], _integer(reshape, "allowzero")) for reshape in reshapes}) != 1:
                continue
            whole, before = _reshape_whole(whole, reshapes[0], count * features, graph)
        node.input[3 - count :] = [whole]
        next(attribute for attribute in node.attribute if attribute.name == "packed").i = count
        gone |= {*parts, *reads} | ({sizes.name} if len(values.readers[sizes.name]) == 1 else set())
        return before
    return []


def _reshape_whole(
    whole: str, part: onnx.NodeProto, features: int, graph: onnx.GraphProto
) -> tuple[str, list[onnx.NodeProto]]:
    """A product [B, L, N] with the rows that its parts were given with their heads: its name, and the nodes."""
    make, name = onnx.helper.make_node, f"{whole}:rows"
    constants = {"first": [0], "last": [2], "features": [features]}
    for key, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), f"{name}:{key}"))
    nodes = [
        make("Slice", [part.input[1], f"{name}:first", f"{name}:last"], [f"{name}:leading"]),
        make("Concat", [f"{name}:leading", f"{name}:features"], [f"{name}:shape"], axis=0),
        make("Reshape", [whole, f"{name}:shape"], [name], name, allowzero=_integer(part, "allowzero")),
    ]
    described = [value.type for value in graph.value_info if value.name == whole]
    for kind in described[:1]:
        value = graph.value_info.add(name=name, type=kind)
        for dimension in value.type.tensor_type.shape.dim[:2]:
            dimension.Clear()
    return name, nodes


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


# Back again -----------------------------------------------------------------------------------------------------------


def attention_written_out(node: onnx.NodeProto, kind: int, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A node as nodes of opset 17, in float32, its result cast to ``kind``. Constants are added to the graph."""
    make, (y,) = onnx.helper.make_node, node.output
    heads, size, count = (_integer(node, name) for name in ("heads", "head_size", "packed"))
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{y}:{name}"))
        return f"{y}:{name}"

    reads = list(node.input)
    if count:
        parts = [f"{y}:part{index}" for index in range(count)]
        sizes = constant("sizes", np.full(count, heads * size, np.int64))
        nodes.append(make("Split", [reads.pop(), sizes], parts, axis=-1))
        reads += parts
    split, joined = constant("split", np.array([0, 0, heads, size])), constant("joined", np.array([0, 0, heads * size]))
    for of, name in zip("qkv", reads, strict=True):
        exact, rows, whole = (f"{y}:{of}:{step}" for step in ("float", "rows", "heads"))
        nodes.append(
            make("Cast", [name], [exact if not _integer(node, f"{of}_layout") else whole], to=TensorProto.FLOAT)
        )
        if not _integer(node, f"{of}_layout"):
            nodes.append(make("Reshape", [exact, split], [rows]))  # a [B, L, H, D] stays what it is
            nodes.append(make("Transpose", [rows], [whole], perm=_HEADS))
    scale = constant("scale", np.array(_integer(node, "scale"), np.int32).view(np.float32))
    q, k, v = (f"{y}:{of}:heads" for of in "qkv")
    names = ("scaled", "keys", "scores", "probabilities", "product", "result", "rows")
    scaled, keys, scores, probabilities, product, result, exact = (f"{y}:{name}" for name in names)
    return [
        *nodes,
        make("Mul", [q, scale], [scaled]),
        make("Transpose", [k], [keys], perm=[0, 1, 3, 2]),
        make("MatMul", [scaled, keys], [scores]),
        make("Softmax", [scores], [probabilities], axis=-1),
        make("MatMul", [probabilities, v], [product]),
        make("Transpose", [product], [result], perm=_HEADS),
        make("Reshape", [result, joined], [exact]),
        make("Cast", [exact], [y], to=kind),
    ]
