"""What this machine has: versions of the tools, and what is missing for each target."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

TOOLS = ("qvdit", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "nvidia-modelopt", "numpy", "safetensors")


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle."""
    return {name: found for name in TOOLS if (found := _version(name)) is not None}


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
