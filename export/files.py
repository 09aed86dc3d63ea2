"""Writing ONNX files: whole or not at all, large weights beside the graph."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx.external_data_helper

from qvdit.contract.files import share

EXTERNAL_FROM = 1 << 30  # bytes of initializers from which they go to a file of their own; protobuf ends at 2 GiB
_SMALLEST_EXTERNAL = 1024  # bytes: smaller initializers stay in the graph, where shape inference reads them


def save_model(model: onnx.ModelProto, path: Path, external_from: int = EXTERNAL_FROM) -> list[Path]:
    """Write a model and, when it is large, ``NAME.data`` beside it; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    partial = path.with_name(f".{path.name}.partial")
    if size < external_from:
        _write(partial, model.SerializeToString(deterministic=True))
        partial.replace(path)
        data.unlink(missing_ok=True)
        return [path]
    written = onnx.ModelProto()
    written.CopyFrom(model)
    # The data comes first and under its final name, which the graph refers to: a graph that is there has its data.
    onnx.external_data_helper.convert_model_to_external_data(
        written, all_tensors_to_one_file=True, location=data.name, size_threshold=_SMALLEST_EXTERNAL
    )
    path.unlink(missing_ok=True)
    data.unlink(missing_ok=True)
    onnx.external_data_helper.write_external_data_tensors(written, str(path.parent))
    share(data)
    with data.open("rb+") as file:
        os.fsync(file.fileno())
    _write(partial, written.SerializeToString(deterministic=True))
    partial.replace(path)
    return [path, data]


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
