"""The folder that an export leaves: its manifest, and the check that its files are what the manifest says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qvdit.contract.errors import QvditError
from qvdit.contract.files import inside, read_json, sha256, write_json
from qvdit.contract.video import OPTIONAL, described

SCHEMA = 1
# What TensorRT's graphs compute in where 16 bits are enough, the default first: --precision → as numpy and PyTorch say.
PRECISIONS: dict[str, Literal["float16", "bfloat16"]] = {"fp16": "float16", "bf16": "bfloat16"}
MANIFEST = "manifest.json"
QDQ_MODEL, ORT_MODEL = "onnx/model.onnx", "onnx/model.ort.onnx"
KEPT_WEIGHTS = "quantized/kept.safetensors"  # of all that is not quantized
TENSORRT_MODEL = "tensorrt/model.onnx"
TENSORRT_INT4_MODEL = "tensorrt/model.int4.onnx"  # weights only, for TensorRT 10 and later; where it was asked for
TENSORRT_LAYERS = "tensorrt/layers.onnx"  # every layer with its integers in view, for the engine's parity check
ENGINE, ENGINE_FACTS = "tensorrt/model.plan", "tensorrt/engine.json"  # built on the device that it runs on
ENGINE_PARITY = "tensorrt/parity.json"
PLUGIN = "tensorrt/libqvdit_tensorrt.so"  # compiled for the device that the bundle is for
SAMPLING_PLAN = "sample/plan.safetensors"  # one video's sampling, for a device without PyTorch
EDGE, DEVICE = "edge", "device.json"  # the folder to copy to a device, and in it which one
PARITY_INPUTS, PARITY_REFERENCE = "parity/inputs.safetensors", "parity/reference.safetensors"
PARITY_HALF = "parity/half.safetensors"  # PyTorch's 16-bit run on a GPU, where one was made; not in the manifest


@dataclass(frozen=True)
class Manifest:
    """What a bundle is. It holds no time and no path, so that the same job gives the same bytes."""

    model: str  # name of the source model
    source: str  # fingerprint of the source transformer
    family: str  # of the model adapter
    class_name: str  # of diffusers
    source_config: dict[str, Any]  # of the transformer
    recipe: str
    bits: str
    target: str
    inputs: dict[str, list[Any]]  # input name → dimensions, a name where dynamic
    frames: int  # T
    versions: dict[str, str]  # of the tools that made it
    files: dict[str, str]  # path inside the bundle → sha256
    size: str | None = None  # of the videos, FRAMESxHEIGHTxWIDTH; left out where they are of the pipeline's own
    precision: str | None = None  # bf16: of TensorRT's graphs; left out where that is FP16
    schema: int = SCHEMA


def precision_of(manifest: Manifest) -> str:
    """The key of PRECISIONS that a bundle's graphs for TensorRT are of."""
    return manifest.precision or next(iter(PRECISIONS))


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write a bundle's manifest; do it last."""
    write_json(bundle / MANIFEST, described(manifest))


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest without looking at the files it names."""
    if not bundle.is_dir():
        raise QvditError(f"no folder {bundle}", "a bundle that qvdit-export made", "check the path")
    if not (bundle / MANIFEST).is_file():
        raise QvditError(
            f"{bundle} without a manifest.json",
            "a finished bundle",
            "check the path, or finish it: qvdit-export --out …",
        )
    content = read_json(bundle / MANIFEST, "a bundle's manifest.json")
    names = {field.name for field in dataclasses.fields(Manifest)}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or set(content) | OPTIONAL != names:
        raise QvditError(f"{bundle / MANIFEST} of another version", f"schema {SCHEMA}", "export the model again")
    if not isinstance(content["files"], dict):
        raise QvditError(
            f"{bundle / MANIFEST} without its files", "a path and a sha256 for each", "export the model again"
        )
    return Manifest(**content)


def verify(bundle: Path) -> Manifest:
    """Read the manifest and compare the sha256 of every file it names."""
    manifest = read_manifest(bundle)
    for name, expected in manifest.files.items():
        path = inside(bundle, name)
        if not path.is_file():
            raise QvditError(
                f"a bundle without {name}", "every file that its manifest names", "export or copy it again"
            )
        found = sha256(path)
        if found != expected:
            raise QvditError(
                f"{path} with sha256 {found[:12]}…", f"{expected[:12]}… as its manifest says", "export or copy it again"
            )
    return manifest
