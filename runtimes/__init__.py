"""Execution: sessions and drop-in transformers. Needs numpy and the one engine that is used; never torch.

transformer = qvdit.runtimes.load("out/wan-shapes-w4a8")     # a drop-in for a diffusers pipeline
pipe.transformer = transformer
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvdit.runtimes.transformer import RuntimeTransformer


def load(bundle: str | Path, threads: int | None = None) -> RuntimeTransformer:
    """The quantized transformer of a bundle, checked against its manifest, on ONNX Runtime's CPU provider.

    It takes the place of ``pipe.transformer`` in a diffusers pipeline. ``threads``: 0 or None lets the engine choose.
    """
    from qvdit.contract.bundle import ORT_MODEL, verify
    from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
    from qvdit.runtimes.transformer import RuntimeTransformer

    path = Path(bundle)
    manifest = verify(path)
    return RuntimeTransformer(OnnxRuntimeSession(path / ORT_MODEL, threads=threads), manifest)
