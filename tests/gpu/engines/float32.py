"""Where TensorRT's float32 leaves PyTorch's: engines of full-precision models, with TF32 and without, value by value.

    python tests/benchmarks/tf32.py --families wan,latte,cogvideox --write DIR     # PyTorch's Python
    trtpython tests/gpu/engines/float32.py DIR --out float32.json                  # TensorRT's

An engine that is off is built again with every value as an output, and the first values that are off are told, in the
order in which they are computed. Then nothing is fused, so both the model's error and theirs are given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from qvdit.contract.parity import relative_error
from qvdit.runtimes.tensorrt import versions
from qvdit.runtimes.tensorrt.device import Device
from qvdit.runtimes.tensorrt.log import logger
from qvdit.runtimes.tensorrt.session import TensorRtSession, open_device

OFF = 1e-4  # a relative error that float32 does not make
_TOLD = 12


def build(model: Path, tf32: bool, marked: set[str], log: Any) -> bytes:
    """A float32 engine of an ONNX file of fixed sizes; marked: values that become outputs."""
    trt = versions.tensorrt()
    builder = trt.Builder(log)
    network = versions.create_network(trt, builder)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise SystemExit(f"{model}: {parser.get_error(0).desc()}")
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        for tensor in (layer.get_output(i) for i in range(layer.num_outputs)):
            if tensor.name in marked - outputs and tensor.dtype == trt.DataType.FLOAT:
                network.mark_output(tensor)
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if not versions.strongly_typed(trt):
        config.set_tactic_sources(0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit(f"{model}: {log.why()}")
    return bytes(plan)


def errors(plan: bytes, device: Device, saved: Any, log: Any) -> dict[str, float]:
    """The relative error of every output, by name."""
    inputs = {name.removeprefix("input:"): saved[name] for name in saved.files if name.startswith("input:")}
    with TensorRtSession(plan, device, log) as session:
        found = session.infer_all(inputs)
    return {name: relative_error(value, saved[f"value:{name}"]) for name, value in found.items()}


def main() -> None:
    """Every model of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device, log, rows = open_device("cuda"), logger(), []
    for model in sorted(arguments.folder.glob("*.onnx")):
        saved = np.load(model.with_suffix(".npz"))
        order = [str(name) for name in saved["order"]]
        for tf32 in (True, False):
            (error,) = errors(build(model, tf32, set(), log), device, saved, log).values()
            row: dict[str, Any] = {"model": model.stem, "tf32": tf32, "error": error}
            print(f"{model.stem}, TF32 {'on' if tf32 else 'off'}: {error:.1e}", flush=True)
            if error > (10 * OFF if tf32 else OFF):
                found = errors(build(model, tf32, set(order), log), device, saved, log)
                off = {name: found[name] for name in order if found.get(name, 0.0) > OFF}
                row |= {"error_unfused": found[order[-1]], "first_off": dict(list(off.items())[:_TOLD])}
                print(
                    f"    all values as outputs: {row['error_unfused']:.1e}; first off: {row['first_off']}", flush=True
                )
            rows.append(row)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
