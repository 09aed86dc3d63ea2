"""The TensorRT target, as far as it goes without an engine: a strongly typed FP16 model for static INT8 layers.

NVIDIA ModelOpt's AutoCast chooses what runs in FP16 by running the model once and keeping in FP32 what would overflow.
LowBitLinear nodes need a plugin, so models that have them get no file here.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np

from qvdit.contract.bundle import TENSORRT_MODEL
from qvdit.contract.layer import Layer, StaticInt8Layer
from qvdit.export.files import save_model
from qvdit.export.graph import check


def export_tensorrt(qdq: Path, layers: tuple[Layer, ...], inputs: dict[str, np.ndarray], bundle: Path) -> list[Path]:
    """Write ``tensorrt/model.onnx`` where every layer is static INT8; returns its files, none otherwise.

    qdq: the interchange model. inputs: float32 by name, an example that AutoCast measures ranges on.
    """
    if not all(isinstance(layer, StaticInt8Layer) for layer in layers):
        return []
    from modelopt.onnx.autocast import convert_to_mixed_precision

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("modelopt.onnx", "modelopt.onnx.autocast"):
            logging.getLogger(name).setLevel(logging.ERROR)  # it tells of every node it leaves in FP32
        example = Path(folder) / "inputs.npz"
        np.savez(example, **inputs)  # type: ignore[arg-type]
        model = convert_to_mixed_precision(
            str(qdq), low_precision_type="fp16", keep_io_types=True, providers=["cpu"], calibration_data=str(example)
        )
    files = save_model(model, bundle / TENSORRT_MODEL)
    check(str(bundle / TENSORRT_MODEL))
    return files
