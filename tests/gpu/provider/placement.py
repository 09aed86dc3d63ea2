"""Which provider ran each node of a session's forward pass, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from qvdit.runtimes.onnxruntime_cuda import cuda_session
from qvdit.runtimes.signed import signed_model

LARGEST = 64  # elements


@dataclass(frozen=True)
class Placement:
    """Nodes of one forward pass, and the microseconds that each kind of them took."""

    on_gpu: Counter[str]  # by kind of node
    on_cpu: Counter[str]
    large_on_cpu: list[str]  # nodes there with outputs larger than a shape's arithmetic has
    copies: Counter[str]  # between the two
    microseconds: Counter[str]  # by kind of node, as the host sees it


def placement(model: Path, inputs: dict[str, np.ndarray], folder: Path, warm: int = 3) -> Placement:
    """Run a bundle's model ``warm`` times, then once more, and tell where its nodes ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    session = cuda_session(signed_model(model).SerializeToString(), options, "cuda")
    for _ in range(warm + 1):
        session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    starts = [e["ts"] for e in events if e.get("name") == "model_run"]
    last = [e for e in events if e.get("cat") == "Node" and e["ts"] >= max(starts) and "provider" in e["args"]]
    found = Placement(Counter(), Counter(), [], Counter(), Counter())
    for event in last:
        kind, provider = event["args"]["op_name"], event["args"]["provider"]
        found.microseconds[kind] += event["dur"]
        if kind.startswith("Memcpy"):
            found.copies[kind] += 1
        elif provider == "CUDAExecutionProvider":
            found.on_gpu[kind] += 1
        else:
            found.on_cpu[kind] += 1
            shapes = [shape for typed in event["args"].get("output_type_shape", []) for shape in typed.values()]
            if any(math.prod(shape) > LARGEST for shape in shapes):
                found.large_on_cpu.append(event["name"])
    return found
