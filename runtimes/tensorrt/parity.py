"""An engine against the bundle's saved PyTorch reference: every layer's integers, then the whole model. No PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvdit.contract import QvditError
from qvdit.contract.bundle import TENSORRT_LAYERS, precision_of, read_manifest
from qvdit.contract.files import finite
from qvdit.contract.parity import (
    ERROR_RATIOS,
    LayerOutputs,
    LayerParity,
    LayerReference,
    ModelParity,
    SavedParity,
    compare_layer,
    compare_models,
    load_half,
    relative_error,
)
from qvdit.runtimes.cuda import STORED_ZERO
from qvdit.runtimes.tensorrt.session import TensorRtSession

if TYPE_CHECKING:
    from qvdit.runtimes.tensorrt.build import Builder, Say

STATIC_TOLERANCE = 1e-2  # relative error of a layer that TensorRT's own INT8 kernels compute
_LAYER_LEVEL = 0  # the layers' engine runs once: quick to build. Its kernels are the plugin's, whatever the level

_BETWEEN_NAMES = ","  # of the layers that one node computes: qvdit/export/plugin.py's
_WORDS = {"x_q": 0, "x_q_less_128": STORED_ZERO}  # output → what was taken from the integers to fit int8


# Layers --------------------------------------------------------------------------------------------------------------


class LayerEngine:
    """All layers of a bundle in one engine, each node with an input and outputs of its own."""

    def __init__(self, bundle: Path, references: tuple[LayerReference, ...], builder: Builder):
        self._references = {reference.name: reference for reference in references}
        plan = builder.build(bundle / TENSORRT_LAYERS, self._shapes, _LAYER_LEVEL)
        self._session = TensorRtSession(plan, builder.device, builder.log)
        self.nodes = [name.removesuffix(":x") for name in self._session.inputs]

    def _group(self, node: str) -> list[LayerReference]:
        names = node.split(_BETWEEN_NAMES)
        missing = [name for name in names if name not in self._references]
        if missing:
            raise QvditError(
                f"no saved reference of layer {missing[0]}", "one of every layer", "export the model again"
            )
        return [self._references[name] for name in names]

    def _shapes(self, name: str) -> list[list[int]]:
        shapes = [_rows_3d(reference.x).shape for reference in self._group(name.removesuffix(":x"))]
        return [
            [min(sizes) for sizes in zip(*shapes, strict=True)],
            list(shapes[0]),
            [max(s) for s in zip(*shapes, strict=True)],
        ]

    def compare(self) -> list[LayerParity]:
        """Run every node on each of its layers' saved inputs, which are one as a rule, and compare."""
        groups = {node: self._group(node) for node in self.nodes}
        found: list[LayerParity] = []
        for index in range(max(len(group) for group in groups.values())):
            chosen = {node: group[min(index, len(group) - 1)] for node, group in groups.items()}
            outputs = self._session.infer_all(
                {f"{node}:x": _rows_3d(reference.x) for node, reference in chosen.items()}
            )
            for node, reference in chosen.items():
                if index < len(groups[node]):
                    found.append(compare_layer(reference, _layer_outputs(node, reference, groups[node], outputs)))
        return found

    def close(self) -> None:
        """Free the engine."""
        self._session.close()


def _rows_3d(x: np.ndarray) -> np.ndarray:
    """[..., L, K] as [B, L, K]."""
    return x.reshape(-1, *x.shape[-2:])


def _layer_outputs(
    node: str, reference: LayerReference, group: list[LayerReference], outputs: Mapping[str, np.ndarray]
) -> LayerOutputs:
    """One layer's part of a node's outputs, in the operator's terms."""
    k, n = reference.x.shape[-1], reference.outputs.y.shape[-1]
    first = n * [other.name for other in group].index(reference.name)
    y = outputs[f"{node}:y"][..., first : first + n].reshape(reference.outputs.y.shape)
    if f"{node}:acc" not in outputs:  # TensorRT's own INT8 kernels show no integers
        return LayerOutputs(reference.outputs.x_q, None, y)
    name, taken = next((name, taken) for name, taken in _WORDS.items() if f"{node}:{name}" in outputs)
    words = np.ascontiguousarray(outputs[f"{node}:{name}"].reshape(-1, outputs[f"{node}:{name}"].shape[-1]))
    x_q = words.view(np.int8)[:, :k].astype(np.int32) + taken
    acc = outputs[f"{node}:acc"][..., first : first + n].reshape(-1, n).astype(np.int64)
    return LayerOutputs(x_q, acc, y)


# The whole -----------------------------------------------------------------------------------------------------------


def check_engine(
    bundle: Path, saved: SavedParity, session: TensorRtSession, builder: Builder, say: Say
) -> dict[str, Any]:
    """The engine of ``session`` and the bundle's layers, compared; what ``tensorrt/parity.json`` holds."""
    layers = LayerEngine(bundle, saved.layers, builder)
    try:
        compared = layers.compare()
    finally:
        layers.close()
    output = session.infer(saved.inputs)
    result = summary(compared, compare_models(output, saved.quantized, saved.full))
    half = load_half(bundle)
    if half is not None:
        result |= _against_half(output, half, saved.full) | {"half": precision_of(read_manifest(bundle)).upper()}
    name, error = standard(result)
    say(
        f"parity: {result['layers_compared']} layers, {result['xq_mismatches']} x_q and {result['acc_mismatches']} acc "
        f"differ; model: relative error {_text(result['model_rel_err'])} to PyTorch's quantized model, error against "
        f"full precision {_text(error)} of that of {name}"
    )
    return result


def _against_half(output: np.ndarray, half: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """The engine beside PyTorch's 16-bit run of the same quantized model."""
    error_half = relative_error(half, full)
    return _finite(
        {
            "error_half": error_half,
            "half_rel_err": relative_error(output, half),
            "half_error_ratio": relative_error(output, full) / max(error_half, 1e-30),
        }
    )


_EXACT = "PyTorch's float32 run of it"


def standard(result: Mapping[str, Any]) -> tuple[str, float | None]:
    """What the engine's error is measured by: its name, and the ratio.

    That is PyTorch's 16-bit run, whose rounding is the engine's kind, or its float32 run where there is no other.
    """
    if "half_error_ratio" in result:
        return f"PyTorch's {result.get('half', 'FP16')} run of it", result["half_error_ratio"]
    return _EXACT, result["error_ratio"]


def summary(layers: list[LayerParity], model: ModelParity) -> dict[str, Any]:
    """Both as JSON, as the parity stage's result names them."""
    rows = [dataclasses.asdict(layer) for layer in layers]
    for row in rows:
        row["runtime_rel_err"] = row.pop("rel_err")
        row["integers"] = row["acc_compared"] > 0
    counted = [row for row in rows if row["integers"]]
    measured = dataclasses.asdict(model) | {"error_ratio": model.error_ratio}
    counts = ("xq_compared", "xq_mismatches", "acc_compared", "acc_mismatches")
    result = {
        "layers_compared": len(rows),
        **{name: sum(row[name] for row in counted) for name in counts},
        "model_rel_err": measured.pop("rel_err"),
        "model_cosine": measured.pop("cosine"),
        **measured,
    }
    # JSON has no NaN: null says that something was not a number.
    return {**_finite(result), "layers": [_finite(row) for row in rows]}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: finite(value) if isinstance(value, float) else value for key, value in values.items()}


def failures(result: Mapping[str, Any]) -> list[str]:
    """Why an engine is not proven; empty where it is."""
    found = []
    wrong = [row["name"] for row in result["layers"] if row["xq_mismatches"] or row["acc_mismatches"]]
    if wrong:
        found.append(f"integers that differ in {len(wrong)} layers, the first {wrong[0]}")
    static = [
        row
        for row in result["layers"]
        if not row["integers"] and not _within(row["runtime_rel_err"], 0, STATIC_TOLERANCE)
    ]
    if static:
        found.append(f"{len(static)} static layers off by more than {STATIC_TOLERANCE}, the first {static[0]['name']}")
    name, ratio = standard(result)
    if not _within(ratio, 0, ERROR_RATIOS[1]):
        found.append(f"an error against full precision of {_text(ratio)} of that of {name}")
    # An engine may well round better than PyTorch in FP16; without the quantized model's error it is another model.
    elif not _within(result["error_ratio"], ERROR_RATIOS[0], math.inf):
        found.append(f"an error against full precision of {_text(result['error_ratio'])} of that of {_EXACT}")
    return found


def _within(value: float | None, low: float, high: float) -> bool:
    return value is not None and low <= value <= high


def _text(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"


def refuse_failed(result: Mapping[str, Any], where: Path) -> None:
    """Raise QvditError unless the engine is proven."""
    found = failures(result)
    if found:
        raise QvditError(
            f"an engine that fails parity: {'; '.join(found)}",
            f"equal integers, and an error of at most {ERROR_RATIOS[1]} of that and at least {ERROR_RATIOS[0]} of the "
            "float32 run's",
            f"look at {where}; at another --optimization-level TensorRT takes other kernels of its own; the engine "
            "that was there before is untouched",
        )
