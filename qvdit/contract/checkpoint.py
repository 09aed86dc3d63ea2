"""The quantized checkpoint: ``quantized/config.json`` and ``quantized/model.safetensors``.

The safetensors file holds the quantized linears alone, weights in the canonical packing, a rotation's signs in a bit
each; embeddings, norms and whatever else stays in full precision is the source model's, and in a bundle beside it
(``qvdit.models.kept``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qvdit.contract import packing
from qvdit.contract.errors import QvditError
from qvdit.contract.files import read_json, write_atomic, write_json
from qvdit.contract.layer import FrameRows, Layer, LowBitLayer, StaticInt8Layer, are_signs, arrays

FORMAT = 3
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SIGNS = "signs"  # in the place of an inv_smooth that is nothing else


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The frozen layers of one model and where they come from."""

    layers: tuple[Layer, ...]
    family: str  # of the model adapter
    source: str  # fingerprint of the source model
    source_config: dict[str, Any]  # of its transformer
    recipe: str
    bits: str


def save(checkpoint: QuantizedCheckpoint, folder: Path) -> None:
    """Write a checkpoint; the configuration comes last, so that a folder with one is whole."""
    tensors: dict[str, np.ndarray] = {}
    described = []
    for layer in checkpoint.layers:
        for field, value in arrays(layer).items():
            if field == "weight_q":
                value = packing.pack(value, layer.weight_bits, getattr(layer, "weight_zero", None))
            elif field == "inv_smooth" and isinstance(layer, LowBitLayer) and are_signs(value):
                field, value = _SIGNS, packing.pack_signs(value)
            tensors[f"{layer.name}:{field}"] = np.asarray(value, order="C")
        described.append(_describe(layer))
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomic(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "layers"}
    write_json(folder / CONFIG, {"format": FORMAT, "layers": described, **fields})


def load(folder: Path) -> QuantizedCheckpoint:
    """Read a checkpoint."""
    config = read_json(folder / CONFIG, "a quantized checkpoint")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise QvditError(f"{folder / CONFIG} of another format", f"format {FORMAT}", "quantize the model again")
    try:
        tensors = load_file(folder / WEIGHTS)
        layers = tuple(_restore(described, tensors) for described in config["layers"])
        fields = {f.name for f in dataclasses.fields(QuantizedCheckpoint)} - {"layers"}
        return QuantizedCheckpoint(layers=layers, **{name: config[name] for name in fields})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise QvditError(
            f"a damaged checkpoint in {folder} ({error})", "a whole one", "quantize the model again"
        ) from None


def _describe(layer: Layer) -> dict[str, Any]:
    n, k = layer.shape
    described: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "n": n, "k": k}
    if isinstance(layer, LowBitLayer):
        described |= {
            "weight_bits": layer.weight_bits,
            "act_bits": layer.act_bits,
            "act_symmetric": layer.act_symmetric,
            "rows": layer.rows.value,
            "rotation": layer.rotation,
        }
    return described


def _restore(described: dict[str, Any], tensors: dict[str, np.ndarray]) -> Layer:
    name = described["name"]
    prefix = f"{name}:"
    held: dict[str, Any] = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    static = described["kind"] == StaticInt8Layer.kind
    bits = 8 if static else described["weight_bits"]
    held["weight_q"] = packing.unpack(held["weight_q"], bits, described["k"])
    if _SIGNS in held:
        held["inv_smooth"] = packing.unpack_signs(held.pop(_SIGNS), described["k"])
    if static:
        return StaticInt8Layer(name=name, **held)
    return LowBitLayer(
        name=name,
        weight_bits=described["weight_bits"],
        act_bits=described["act_bits"],
        act_symmetric=described["act_symmetric"],
        rows=FrameRows(described["rows"]),
        rotation=described["rotation"],
        **held,
    )
