"""A bundle's forward pass on ONNX Runtime's CUDA provider, timed and proven: the rows ``ort_cuda`` of a benchmark.

    PYTHONPATH=/folder/of/onnxruntime-gpu:. python tests/gpu/provider/benchmark.py --out FILE.json BUNDLE …

--baseline: the full-precision ONNX file of the first bundle (a job leaves it in work/baseline.onnx), timed in turns
with it, as is the drop-in on the CUDA kernels where they are built. Inputs and output stay on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

import onnx  # noqa: E402
import torch  # noqa: E402
from placement import placement  # noqa: E402

import qvdit.runtimes  # noqa: E402
from qvdit.bench.turns import in_turns, milliseconds, summary  # noqa: E402
from qvdit.contract import QvditError  # noqa: E402
from qvdit.contract.bundle import ORT_MODEL, read_manifest  # noqa: E402
from qvdit.contract.parity import load_reference  # noqa: E402
from qvdit.export.functions import DOMAIN  # noqa: E402
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession  # noqa: E402
from qvdit.runtimes.parity import check_bundle  # noqa: E402
from qvdit.runtimes.tensorrt.device import Device  # noqa: E402

REPEATS, WARM = 50, 10


def drop_in(bundle: Path, inputs: dict[str, torch.Tensor]) -> Callable[[], object] | str:
    """A forward pass on the CUDA kernels in bfloat16, or why there is none."""
    try:
        model = qvdit.runtimes.load(bundle, device="cuda")
    except QvditError as error:
        return str(error)
    given = {name: v if name == "timestep" else v.to(model.dtype) for name, v in inputs.items()}

    @torch.no_grad()
    def call() -> None:
        model(**given, return_dict=False)
        torch.cuda.synchronize()

    return call


def weight_bytes(bundle: Path) -> int:
    """What the file stores for the weights of the quantized linears, biases aside."""
    graph = onnx.load(bundle / ORT_MODEL).graph
    read = {name for node in graph.node if node.domain == DOMAIN for name in node.input}
    stored = (tensor for tensor in graph.initializer if tensor.name in read and not tensor.name.endswith(":bias"))
    return sum(len(tensor.raw_data) for tensor in stored)


def measure(bundle: Path, baseline: Path | None) -> dict[str, Any]:
    """One bundle's row, and what it was timed beside."""
    manifest = read_manifest(bundle)
    layers, whole = check_bundle(bundle, device="cuda")
    inputs = {name: torch.from_numpy(value).cuda() for name, value in load_reference(bundle).inputs.items()}
    device = Device()
    free = device.free_memory()
    session = OnnxRuntimeSession(bundle / ORT_MODEL, device="cuda")
    session.infer(inputs)
    held = free - device.free_memory()
    calls: dict[str, Callable[[], object]] = {"ort_cuda": partial(session.infer, inputs)}
    if baseline is not None:
        calls["ort_cuda_fp32"] = partial(OnnxRuntimeSession(baseline, device="cuda").infer, inputs)
    kernels = drop_in(bundle, inputs)
    if isinstance(kernels, str):
        print(f"{bundle.name}: no drop-in beside it: {kernels}")
    else:
        calls["pytorch_kernels_bf16"] = kernels
    taken = in_turns({name: milliseconds(call) for name, call in calls.items()}, REPEATS, WARM)
    times = {name: summary(each) for name, each in taken.items()}
    with tempfile.TemporaryDirectory() as folder:
        places = placement(bundle / ORT_MODEL, load_reference(bundle).inputs, Path(folder))
    return {
        "model": manifest.model,
        "engine": "ort_cuda",
        "recipe": f"{manifest.recipe} {manifest.bits}",
        "ms": times["ort_cuda"][0],
        "spread": times["ort_cuda"][1],
        "engine_bytes": (bundle / ORT_MODEL).stat().st_size,
        "weight_bytes": weight_bytes(bundle),
        "device_bytes": held,
        "rel_err": whole.rel_err,
        "error_ratio": whole.error_ratio,
        "layers_compared": len(layers),
        "xq_mismatches": sum(layer.xq_mismatches for layer in layers),
        "acc_mismatches": sum(layer.acc_mismatches for layer in layers),
        "beside": {name: {"ms": ms, "spread": spread} for name, (ms, spread) in times.items() if name != "ort_cuda"},
        "nodes_on_gpu": places.on_gpu.total(),
        "nodes_on_cpu": dict(places.on_cpu),
        "large_on_cpu": places.large_on_cpu,
        "copies": dict(places.copies),
        "host_us_by_node": dict(places.microseconds.most_common(20)),
    }


def main() -> None:
    """Measure every bundle; the file holds the rows measured so far."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", type=Path)
    arguments = parser.parse_args()
    gpu = Device().facts()
    about = {
        "command": " ".join(sys.argv),
        "gpu": gpu.name,
        "driver": gpu.driver,
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
    }
    rows: list[dict[str, Any]] = []
    for index, bundle in enumerate(arguments.bundles):
        rows.append(measure(bundle, arguments.baseline if index == 0 else None))
        print(json.dumps(rows[-1], indent=1), flush=True)
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
