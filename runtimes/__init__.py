"""Execution: sessions and drop-in transformers. Needs numpy and the one engine that is used; torch for PyTorch alone.

pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8")                    # ONNX Runtime, on the CPU
pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8", device="cuda")     # PyTorch, on the CUDA kernels
pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8", device="cuda", engine="tensorrt")
pipe.transformer = qvdit.runtimes.load("out/wan-shapes-w4a8", device="cuda", engine="onnxruntime")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# By kind of device; the first is the default.
ENGINES = {"cpu": ("onnxruntime",), "cuda": ("pytorch", "tensorrt", "onnxruntime")}


def load(
    bundle: str | Path,
    threads: int | None = None,
    device: str = "cpu",
    dtype: Any = None,
    engine: str | None = None,
    **options: Any,
) -> Any:
    """The quantized transformer of a bundle, checked against its manifest, to take the place of ``pipe.transformer``.

    device: ``cpu``, ``cuda`` or ``cuda:1``. engine: what runs it there; None is the first of

    - ``onnxruntime``, on the CPU, which computes in float32 what is not quantized;
    - ``pytorch``, on a GPU: a module of the source model's diffusers class whose quantized linears are CUDA kernels;
    - ``tensorrt``, on a GPU: the engine that ``qvdit engine`` built there;
    - ``onnxruntime``, on a GPU: the file that runs on the CPU, its products in int8 x int8 (onnxruntime-gpu, onnx).

    The pipeline's other parts stay where they are. dtype: of PyTorch, for all that is not quantized: ``bfloat16`` (the
    default), ``float16`` or ``float32``, as a name or as PyTorch's. threads: of ONNX Runtime; 0 or None lets it choose.
    options: of TensorRT, those of :meth:`TensorRtSession.of_bundle`. QvditError says what is missing or does not fit.
    """
    from qvdit.contract import QvditError

    path, device = Path(bundle), str(device)
    check_device(device)
    known = ENGINES[device.partition(":")[0]]
    chosen = engine or known[0]
    if chosen not in known:
        raise QvditError(f"engine {engine!r} on device {device!r}", " or ".join(known), "choose one of them")
    if options and chosen != "tensorrt":
        raise QvditError(f"option {sorted(options)[0]!r} of {chosen}", "none: it is TensorRT's", "leave it out")
    if chosen == "onnxruntime" and dtype is not None:
        where = "on the CPU" if device == "cpu" else "of ONNX Runtime"
        raise QvditError(f"dtype {dtype!r} {where}", "no dtype: ONNX Runtime computes in float32", "leave it out")
    if chosen == "tensorrt" and dtype is not None:
        raise QvditError(f"dtype {dtype!r} of a TensorRT engine", "no dtype: the engine has its own", "leave it out")
    if chosen != "onnxruntime" and threads:
        raise QvditError(f"{threads} threads on a GPU", "no threads: they are ONNX Runtime's", "leave them out")
    if chosen == "tensorrt":
        return _on_tensorrt(path, device, options)
    return _on_onnxruntime(path, device, threads) if chosen == "onnxruntime" else _on_gpu(path, device, dtype)


def check_device(device: str) -> None:
    """Refuse a device that is neither ``cpu`` nor ``cuda`` nor ``cuda:N``; the engine says if it is there."""
    from qvdit.contract import QvditError

    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise QvditError(f"device {device!r}", "cpu, cuda or cuda:N", "choose one of them")


def _on_onnxruntime(bundle: Path, device: str, threads: int | None) -> Any:
    from qvdit.contract.bundle import ORT_MODEL, verify
    from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
    from qvdit.runtimes.transformer import RuntimeTransformer

    manifest = verify(bundle)
    return RuntimeTransformer(OnnxRuntimeSession(bundle / ORT_MODEL, threads, device), manifest, device)


def _on_tensorrt(bundle: Path, device: str, options: dict[str, Any]) -> Any:
    from qvdit.contract.bundle import verify
    from qvdit.runtimes.tensorrt.session import TensorRtSession
    from qvdit.runtimes.transformer import RuntimeTransformer

    manifest = verify(bundle)
    return RuntimeTransformer(TensorRtSession.of_bundle(bundle, device, **options), manifest, device)


def _on_gpu(bundle: Path, device: str, dtype: Any) -> Any:
    from qvdit.contract import QvditError
    from qvdit.contract.bundle import verify

    try:
        from qvdit.runtimes import torch_transformer
    except ImportError as error:
        raise QvditError(
            f"a package that is missing ({error})", "PyTorch, diffusers and accelerate, for a GPU", "pip install qvdit"
        ) from None
    wanted = torch_transformer.parse_dtype("bfloat16" if dtype is None else dtype)
    found = torch_transformer.check_device(device)
    return torch_transformer.load_transformer(bundle, verify(bundle), found, wanted)
