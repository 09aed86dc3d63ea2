"""A folder for a machine without PyTorch: copied there, ``./build.sh`` builds, proves and times the engine.

It is a bundle itself (``qvdit parity`` checks it), with what the device needs beside: the C++ sources of kernels,
plugin and runner, the plugin compiled where there are tools, a sampling plan and the script.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from qvdit.contract.bundle import (
    DEVICE,
    ORT_MODEL,
    PARITY_HALF,
    PARITY_INPUTS,
    PARITY_REFERENCE,
    PLUGIN,
    SAMPLING_PLAN,
    TENSORRT_LAYERS,
    TENSORRT_MODEL,
    read_manifest,
    write_manifest,
)
from qvdit.contract.files import sha256, write_json
from qvdit.contract.plan import SamplingPlan, save_plan
from qvdit.export.cross import MissingToolError, Toolchain, compile_plugin
from qvdit.export.devices import EdgeDevice

SOURCES, SCRIPT = "csrc", "build.sh"
_COPIED = ("quantized/config.json", "quantized/model.safetensors", ORT_MODEL, TENSORRT_MODEL, TENSORRT_LAYERS)
_SUFFIXES = {".cc", ".cu", ".cuh", ".h", ".cmake", ".txt", ".map", ".sh"}


@dataclass(frozen=True)
class EdgeContents:
    """What goes into the folder beside the bundle's own files."""

    device: EdgeDevice
    sources: Path  # runtimes/csrc
    tools: Toolchain | MissingToolError | None  # None: the model has no plugin nodes
    plan: SamplingPlan | None


def export_edge(bundle: Path, contents: EdgeContents, folder: Path) -> None:
    """Write the folder, whole or not at all; what was there is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _bundle_files(bundle):
        _copy(bundle / name, partial / name)
    for source in source_files(contents.sources):
        _copy(contents.sources / source, partial / SOURCES / source)
    _copy(contents.sources / "runner" / SCRIPT, partial / SCRIPT)
    (partial / SCRIPT).chmod(0o755)
    if isinstance(contents.tools, Toolchain):
        compile_plugin(contents.tools, contents.sources, partial / PLUGIN)
    if contents.plan is not None:
        save_plan(contents.plan, partial / SAMPLING_PLAN)
    write_json(partial / DEVICE, _describe(contents))
    # Sorted, so that the same export gives the same bytes.
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    manifest = dataclasses.replace(read_manifest(bundle), files={name: sha256(partial / name) for name in files})
    write_manifest(partial, manifest)
    _replace(partial, folder)


def source_files(sources: Path) -> list[Path]:
    """What the device's own compilers need of runtimes/csrc, relative to it."""
    found = [path.relative_to(sources) for path in sources.rglob("*") if path.suffix in _SUFFIXES]
    return sorted(path for path in found if path.name != SCRIPT)


def _bundle_files(bundle: Path) -> list[str]:
    names = [*_COPIED, *(f"{name}.data" for name in _COPIED), PARITY_INPUTS, PARITY_REFERENCE, PARITY_HALF]
    return [name for name in names if (bundle / name).is_file()]


def _describe(contents: EdgeContents) -> dict[str, str | None]:
    device, tools = contents.device, contents.tools
    return {
        "device": device.name,
        "title": device.title,
        "machine": device.machine,
        "jetpack": device.jetpack,
        "tensorrt": device.tensorrt,
        "cuda": device.cuda,
        "architecture": tools.architecture if isinstance(tools, Toolchain) else device.architecture,
        "plugin": tools.describe() if isinstance(tools, Toolchain) else None,
        "missing": str(tools) if isinstance(tools, MissingToolError) else None,
    }


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _replace(partial: Path, folder: Path) -> None:
    """Put one folder in another's place: there is never half of either under the name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
