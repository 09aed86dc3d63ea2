"""Comparing a runtime with the PyTorch reference: integers for equality, floats by their error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from qvdit.contract.bundle import ORT_MODEL, PARITY_HALF, PARITY_INPUTS, PARITY_REFERENCE, TENSORRT_MODEL
from qvdit.contract.errors import QvditError
from qvdit.contract.files import sha256, write_atomic

_MODEL = "model_sha256"  # key of the parity files' metadata: the model they are a reference for


@dataclass(frozen=True)
class LayerOutputs:
    """What one layer computed. M rows, flattened."""

    x_q: np.ndarray  # int32 [M, K], as the operator defines it: signed if symmetric, unsigned if not
    # int64 [M, N], or [C, M, N] for C groups of input features; None for static layers, whose kernels do not show it
    acc: np.ndarray | None
    y: np.ndarray  # float32 [..., N]


@dataclass(frozen=True)
class LayerReference:
    """One layer of the PyTorch reference: its own input and what it made of it."""

    name: str
    x: np.ndarray  # float32 [..., K]
    tokens_per_frame: int
    outputs: LayerOutputs


@dataclass(frozen=True)
class LayerParity:
    """How one layer compares."""

    name: str
    xq_compared: int
    xq_mismatches: int
    acc_compared: int
    acc_mismatches: int
    rel_err: float  # ‖y - y_reference‖ / ‖y_reference‖


ERROR_RATIOS = (0.9, 1.1)
"""Of a runtime's error against full precision to the reference's: within them a model is proven.

An engine that computes in FP16 is held to the higher one by PyTorch's FP16 run, where there is one."""


@dataclass(frozen=True)
class ModelParity:
    """How whole models compare: runtime r, quantized reference q, full precision f."""

    rel_err: float  # ‖r - q‖ / ‖q‖
    cosine: float  # of r and q
    error_runtime: float  # ‖r - f‖ / ‖f‖
    error_reference: float  # ‖q - f‖ / ‖f‖

    @property
    def error_ratio(self) -> float:
        """The runtime's error against full precision over the reference's: 1 is parity."""
        return self.error_runtime / max(self.error_reference, 1e-30)


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value - reference‖ / ‖reference‖ in float64."""
    if value.shape != reference.shape:
        return math.inf
    difference = _norm(value.astype(np.float64) - reference.astype(np.float64))
    return difference / max(_norm(reference.astype(np.float64)), 1e-30)


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value))


def compare_layer(reference: LayerReference, found: LayerOutputs) -> LayerParity:
    """Compare one layer; shapes that differ count as all different."""
    expected = reference.outputs
    acc_compared = acc_mismatches = 0
    if expected.acc is not None and found.acc is not None:
        acc_compared, acc_mismatches = expected.acc.size, _differing(found.acc, expected.acc)
    return LayerParity(
        name=reference.name,
        xq_compared=expected.x_q.size,
        xq_mismatches=_differing(found.x_q, expected.x_q),
        acc_compared=acc_compared,
        acc_mismatches=acc_mismatches,
        rel_err=relative_error(found.y, expected.y),
    )


def compare_models(runtime: np.ndarray, quantized: np.ndarray, full: np.ndarray) -> ModelParity:
    """Compare outputs of whole models on the same input."""
    r, q = runtime.astype(np.float64).ravel(), quantized.astype(np.float64).ravel()
    cosine = float(r @ q) / max(_norm(r) * _norm(q), 1e-30)
    return ModelParity(
        rel_err=relative_error(runtime, quantized),
        cosine=cosine,
        error_runtime=relative_error(runtime, full),
        error_reference=relative_error(quantized, full),
    )


def _differing(found: np.ndarray, expected: np.ndarray) -> int:
    if found.size != expected.size:
        return expected.size
    return int(np.count_nonzero(found.ravel() != expected.ravel()))


@dataclass(frozen=True)
class SavedParity:
    """A reference run on disk, so that a device without PyTorch can check itself."""

    inputs: dict[str, np.ndarray]  # of the model, float32
    quantized: np.ndarray  # the reference's output
    full: np.ndarray  # full precision's output
    layers: tuple[LayerReference, ...]


def save_reference(saved: SavedParity, bundle: Path) -> None:
    """Write a reference run into a bundle. Inputs must be FP16-representable: they are stored so."""
    inputs = {f"model:{name}": value.astype(np.float16) for name, value in saved.inputs.items()}
    reference = {"model:quantized": saved.quantized, "model:full": saved.full}
    for layer in saved.layers:
        inputs[f"layer:{layer.name}:x"] = layer.x.astype(np.float16)
        reference[f"layer:{layer.name}:tokens_per_frame"] = np.array(layer.tokens_per_frame, np.int64)
        reference[f"layer:{layer.name}:x_q"] = layer.outputs.x_q.astype(np.int16)
        reference[f"layer:{layer.name}:y"] = layer.outputs.y
        if layer.outputs.acc is not None:
            reference[f"layer:{layer.name}:acc"] = layer.outputs.acc.astype(np.int32)
    metadata = {_MODEL: _model_hash(bundle)}
    for name, tensors in ((PARITY_INPUTS, inputs), (PARITY_REFERENCE, reference)):
        contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}
        write_atomic(bundle / name, partial(save_file, contiguous, metadata=metadata))


def _model_hash(bundle: Path) -> str:
    """Of the model that a reference is for: ONNX Runtime's, or TensorRT's where a folder has no other."""
    return sha256(bundle / (ORT_MODEL if (bundle / ORT_MODEL).is_file() else TENSORRT_MODEL))


def load_reference(bundle: Path) -> SavedParity:
    """Read a bundle's reference run."""
    model = _model_hash(bundle)
    inputs, reference = _load(bundle / PARITY_INPUTS, model), _load(bundle / PARITY_REFERENCE, model)
    try:
        return _restore(inputs, reference)
    except (KeyError, IndexError) as error:
        missing = f"parity files of {bundle} without {error}"
        raise QvditError(missing, "those of one export", "export the model again") from None


def save_half(bundle: Path, output: np.ndarray) -> None:
    """Keep what PyTorch's FP16 run of the quantized model made of a bundle's saved inputs."""
    tensors = {"model:half": np.asarray(output, np.float32, order="C")}
    write_atomic(bundle / PARITY_HALF, partial(save_file, tensors, metadata={_MODEL: _model_hash(bundle)}))


def load_half(bundle: Path) -> np.ndarray | None:
    """What :func:`save_half` kept, float32, or None where there was no such run."""
    path = bundle / PARITY_HALF
    if not path.is_file():
        return None
    try:
        return _load(path, _model_hash(bundle))["model:half"]
    except KeyError:
        raise QvditError(f"{path} without its tensor", "PyTorch's FP16 run", f"remove {path}") from None


def _load(path: Path, model: str) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            of_model = (file.metadata() or {}).get(_MODEL)
        if of_model != model:
            raise QvditError(f"{path} of another model", "the parity files of this bundle", "export the model again")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        found = f"{path}, which is damaged ({error})" if path.is_file() else f"no file {path}"
        raise QvditError(found, "the bundle's parity files", "make them: qvdit-export, the whole job") from None


def _restore(inputs: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> SavedParity:
    layers = []
    for key, x in inputs.items():
        if key.startswith("layer:"):
            prefix = key.removesuffix(":x")
            acc = reference.get(f"{prefix}:acc")
            outputs = LayerOutputs(
                reference[f"{prefix}:x_q"].astype(np.int32),
                None if acc is None else acc.astype(np.int64),
                reference[f"{prefix}:y"],
            )
            per_frame = int(reference[f"{prefix}:tokens_per_frame"])
            layers.append(LayerReference(prefix.removeprefix("layer:"), x.astype(np.float32), per_frame, outputs))
    model = {key.removeprefix("model:"): v.astype(np.float32) for key, v in inputs.items() if key.startswith("model:")}
    return SavedParity(model, reference["model:quantized"], reference["model:full"], tuple(layers))
