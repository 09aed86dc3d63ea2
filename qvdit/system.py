"""What this machine has: versions of the tools, and what is missing for each target."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOOLS = (
    "qvdit",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "nvidia-modelopt",
    "numpy",
    "safetensors",
)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle."""
    return {name: found for name in TOOLS if (found := _version(name)) is not None}


def cpu_name() -> str:
    """The processor's model, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def missing_for_tensorrt() -> str | None:
    """What keeps this machine from building a TensorRT engine, or None."""
    if importlib.util.find_spec("tensorrt") is None:
        return "no TensorRT (Python package tensorrt)"
    import torch

    return None if torch.cuda.is_available() else "no GPU"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
