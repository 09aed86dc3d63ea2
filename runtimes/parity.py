"""A runtime against the saved or live PyTorch reference, layer by layer and as a whole. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qvdit.contract import QvditError
from qvdit.contract.bundle import ORT_MODEL
from qvdit.contract.parity import (
    LayerParity,
    LayerReference,
    ModelParity,
    compare_layer,
    compare_models,
    load_reference,
)
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession

if TYPE_CHECKING:
    from qvdit.runtimes.layers import LayerModels


def compare_layers(models: LayerModels, references: Iterable[LayerReference]) -> Iterator[LayerParity]:
    """Run every reference's input through the runtime's own layer and compare."""
    for reference in references:
        yield compare_layer(reference, models.run(reference.name, reference.x, reference.tokens_per_frame))


def check_bundle(
    bundle: Path, threads: int | None = None, device: str = "cpu"
) -> tuple[list[LayerParity], ModelParity]:
    """A bundle's own parity check in ONNX Runtime on this machine: every layer, then the whole model. No PyTorch.

    device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    try:
        from qvdit.runtimes.layers import LayerModels
    except ImportError:
        raise QvditError("no onnx", "the package onnx, to look inside the model", "pip install onnx") from None
    saved = load_reference(bundle)
    layers = list(compare_layers(LayerModels(bundle / ORT_MODEL, threads, device), saved.layers))
    with OnnxRuntimeSession(bundle / ORT_MODEL, threads, device) as session:
        output = session.infer(saved.inputs)
    return layers, compare_models(output, saved.quantized, saved.full)
