"""The parity stage: PyTorch's quantized model against the exported one, and a reference run for other devices."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from qvdit.contract.bundle import ORT_MODEL
from qvdit.contract.layer import Layer
from qvdit.contract.parity import (
    LayerParity,
    LayerReference,
    SavedParity,
    compare_layer,
    compare_models,
    relative_error,
    save_reference,
)
from qvdit.method.calibration import Progress
from qvdit.method.lowbit import FrozenLinear
from qvdit.method.reference import layer_reference, quantized_transformer, saved_input, visit_layers
from qvdit.runtimes.layers import LayerModels
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession


@torch.no_grad()
def prove(
    transformer: torch.nn.Module,
    layers: tuple[Layer, ...],
    inputs: dict[str, torch.Tensor],
    bundle: Path,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Compare every layer on PyTorch's own input of it, then the whole model; save a reference run in the bundle.

    inputs: FP16-representable, on the CPU. Returns what report.json holds under ``parity``.
    """
    full_model = copy.deepcopy(transformer).cpu().float()
    model = quantized_transformer(full_model, layers)
    runtime = LayerModels(bundle / ORT_MODEL, threads)
    compared: list[dict[str, Any]] = []
    saved: list[LayerReference] = []

    def visit(reference: LayerReference) -> None:
        progress(len(compared), len(layers) + 2)
        found = compare_layer(reference, runtime.run(reference.name, reference.x, reference.tokens_per_frame))
        frozen = model.get_submodule(reference.name)
        compared.append(_row(found, frozen, full_model.get_submodule(reference.name), reference))
        saved.append(layer_reference(frozen, saved_input(frozen, torch.from_numpy(reference.x))))

    quantized = visit_layers(model, inputs, visit).numpy()
    progress(len(layers), len(layers) + 2)
    full = full_model(**inputs, return_dict=False)[0].numpy()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    with OnnxRuntimeSession(bundle / ORT_MODEL, threads) as session:
        whole = compare_models(session.infer(arrays), quantized, full)
    save_reference(SavedParity(arrays, quantized, full, tuple(saved)), bundle)
    progress(len(layers) + 2, len(layers) + 2)
    return {
        "layers_total": len(layers),
        "layers_compared": len(compared),
        **{name: sum(row[name] for row in compared) for name in _COUNTS},
        "model_rel_err": whole.rel_err,
        "model_cosine": whole.cosine,
        "error_runtime": whole.error_runtime,
        "error_reference": whole.error_reference,
        "error_ratio": whole.error_ratio,
        "layers": compared,
    }


_COUNTS = ("xq_compared", "xq_mismatches", "acc_compared", "acc_mismatches")


def _row(found: LayerParity, frozen: FrozenLinear, full: torch.nn.Module, reference: LayerReference) -> dict[str, Any]:
    """One layer of the report: parity, and how far quantization moved its output from full precision's."""
    exact = full(torch.from_numpy(reference.x)).numpy()
    row = dataclasses.asdict(found)
    row["runtime_rel_err"] = row.pop("rel_err")
    row["quantization_error"] = relative_error(reference.outputs.y, exact)
    row["weight_bits"] = frozen.layer.weight_bits
    return row
