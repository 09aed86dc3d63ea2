"""A bundle as the diffusers transformer it was made from, its quantized linears on the CUDA kernels.

Alone among the runtimes this needs the whole toolchain: PyTorch, diffusers, the model adapters, and the method's eager
layers for what the kernels do not serve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from qvdit.contract import QvditError, checkpoint
from qvdit.contract.bundle import KEPT_WEIGHTS, Manifest
from qvdit.contract.kernels import mergeable, unserved
from qvdit.contract.layer import Layer, LowBitLayer
from qvdit.method.lowbit import frozen_linear
from qvdit.models import ADAPTERS, Fusion, ModelAdapter, kept
from qvdit.runtimes import cuda
from qvdit.runtimes.torch_linear import KernelLinear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_logger = logging.getLogger("qvdit")


def check_device(name: str) -> torch.device:
    """The device ``cuda`` or ``cuda:N``, once it is known to be there and to have kernels; QvditError if not."""
    if not torch.cuda.is_available():
        raise QvditError(
            "device 'cuda' where PyTorch sees no CUDA device",
            "an NVIDIA GPU and a CUDA build of PyTorch",
            "see nvidia-smi and torch.version.cuda, or load with device='cpu'",
        )
    device, count = torch.device(name), torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise QvditError(f"device {name!r}", f"one of the {count} here: cuda:0 … cuda:{count - 1}", "choose another")
    kernels = cuda.library()
    with torch.cuda.device(device):
        kernels.check_device()
    return device


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """bfloat16, float16 or float32, by name or as PyTorch's own."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise QvditError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "choose one of them")
    return found


def load_transformer(
    bundle: Path, manifest: Manifest, device: torch.device, dtype: torch.dtype, fuse: bool = True
) -> Any:
    """The quantized transformer of a bundle whose files were checked: a module of ``manifest.class_name``.

    dtype: of what is not quantized; what diffusers keeps in float32 for the class stays so, and the quantized layers
    compute in integers and float32 whatever it is. fuse: merge layers that read the same input where they allow it.
    """
    adapter = next((a for a in ADAPTERS if a.class_name == manifest.class_name), None)
    if adapter is None:
        raise QvditError(
            f"{bundle} of class {manifest.class_name!r}",
            f"one of {', '.join(a.class_name for a in ADAPTERS)}",
            "use the version of qvdit that made it",
        )
    if KEPT_WEIGHTS not in manifest.files:
        raise QvditError(
            f"{bundle}, made before bundles held what is not quantized",
            f"{KEPT_WEIGHTS}, which a GPU needs",
            "export the model again into the same folder, or load with device='cpu'",
        )
    with init_empty_weights():  # its buffers are computed, its weights come from the bundle
        model = getattr(diffusers, manifest.class_name).from_config(manifest.source_config)
    install(model, checkpoint.load(bundle / "quantized").layers, adapter, device, fuse)
    kept.load(bundle / KEPT_WEIGHTS, model, dtype)
    adapter.complete(model)
    model.manifest = manifest
    return model.to(device).eval().requires_grad_(False)


def install(
    model: torch.nn.Module, layers: Iterable[Layer], adapter: ModelAdapter, device: torch.device, fuse: bool
) -> None:
    """Put kernel layers in the places of a model's quantized linears, eager ones where the kernels do not serve."""
    by_name = {layer.name: layer for layer in layers}
    reasons = {name: reason for name, layer in by_name.items() if (reason := unserved(layer))}
    if reasons:
        named = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        _logger.warning(
            "%d of %d quantized layers run as PyTorch's slow reference: %s", len(reasons), len(by_name), named
        )
    fusions = [f for f in adapter.fusions(model) if _fits(f, by_name)] if fuse else []
    for fusion in fusions:
        merged = KernelLinear(*(by_name.pop(name) for name in fusion.names()))  # type: ignore[arg-type]
        adapter.fuse(model, fusion, merged.to(device))
    for name, layer in by_name.items():
        kernel = isinstance(layer, LowBitLayer) and name not in reasons
        module = KernelLinear(layer) if kernel else frozen_linear(layer)  # type: ignore[arg-type]
        model.set_submodule(name, module.to(device))


def _fits(fusion: Fusion, layers: dict[str, Layer]) -> bool:
    names = fusion.names()
    return all(name in layers for name in names) and mergeable([layers[name] for name in names])
