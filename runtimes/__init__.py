"""Execution: sessions and drop-in transformers. Needs numpy and the one engine that is used; torch on a GPU alone.

pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8")                    # ONNX Runtime, on the CPU
pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8", device="cuda")     # PyTorch, on the CUDA kernels
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def load(bundle: str | Path, threads: int | None = None, device: str = "cpu", dtype: Any = None) -> Any:
    """The quantized transformer of a bundle, checked against its manifest, to take the place of ``pipe.transformer``.

    device: ``cpu``, ONNX Runtime, which computes in float32; or ``cuda`` or ``cuda:1``, a module of the source model's
    diffusers class whose quantized linears are CUDA kernels. The pipeline's other parts stay where they are.
    dtype: on a GPU, of all that is not quantized: ``bfloat16`` (the default), ``float16`` or ``float32``, as a name or
    as PyTorch's. threads: of ONNX Runtime; 0 or None lets it choose. QvditError says what is missing or does not fit.
    """
    from qvdit.contract import QvditError

    path, device = Path(bundle), str(device)
    if re.fullmatch(r"cuda(:\d+)?", device):
        return _on_gpu(path, device, dtype, threads)
    if device != "cpu":
        raise QvditError(f"device {device!r}", "cpu, cuda or cuda:N", "choose one of them")
    if dtype is not None:
        raise QvditError(f"dtype {dtype!r} on the CPU", "no dtype: ONNX Runtime computes in float32", "leave it out")
    return _on_cpu(path, threads)


def _on_cpu(bundle: Path, threads: int | None) -> Any:
    from qvdit.contract.bundle import ORT_MODEL, verify
    from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
    from qvdit.runtimes.transformer import RuntimeTransformer

    manifest = verify(bundle)
    return RuntimeTransformer(OnnxRuntimeSession(bundle / ORT_MODEL, threads=threads), manifest)


def _on_gpu(bundle: Path, device: str, dtype: Any, threads: int | None) -> Any:
    from qvdit.contract import QvditError
    from qvdit.contract.bundle import verify

    try:
        from qvdit.runtimes import torch_transformer
    except ImportError as error:
        raise QvditError(
            f"a package that is missing ({error})", "PyTorch, diffusers and accelerate, for a GPU", "pip install qvdit"
        ) from None
    if threads:
        raise QvditError(f"{threads} threads on a GPU", "no threads: they are ONNX Runtime's", "leave them out")
    wanted = torch_transformer.parse_dtype("bfloat16" if dtype is None else dtype)
    found = torch_transformer.check_device(device)
    return torch_transformer.load_transformer(bundle, verify(bundle), found, wanted)
