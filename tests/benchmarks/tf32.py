"""Where TF32 hurts: a full-precision model whose matrix products read 10 bits of mantissa, group by group of nodes.

    python tests/benchmarks/tf32.py --families wan,latte,cogvideox --out tf32.json       # random models
    python tests/benchmarks/tf32.py --models wan-shapes,latte-shapes --out tf32.json     # trained ones
    python tests/benchmarks/tf32.py --families wan,latte --write DIR                     # for gpu/engines/float32.py

TensorRT uses TF32 for float32 products unless told not to. ONNX Runtime on a CPU has no TF32; here both operands of a
product are rounded before it (the sums stay float32, as in a tensor core). Errors are relative to PyTorch in float32.

What it found: TF32 in the products costs every family about 4e-4, Wan no more than the others. The product of time
step and frequencies, whose sine and cosine are the time embedding, would cost ten times that: an angle of 700 whose
factors have 11 significant bits is off by up to a third of a radian. And a mean over all axes where Wan's normalisation
of queries and keys means the last ("means"), as TensorRT 8.6 reads ReduceMean of opset 18, costs random Wans 8e-3 and
the trained one 0.2; the other families have no such mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference
import torch

from qvdit.contract.parity import relative_error
from qvdit.export import graph
from qvdit.export import trace as tracing
from qvdit.export.opset import lowered
from qvdit.models import ADAPTERS, ModelAdapter
from qvdit.runtimes.onnxruntime import session

sys.path.insert(0, str(Path(__file__).parents[2]))
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
ANGLES = "time step x frequencies"  # elementwise in the graph, an outer product: no tensor core needs to touch it
_SPLIT = 8193.0  # 2^13 + 1: Veltkamp's splitting leaves 24 - 13 bits of the significand, one of them implied
Inputs = dict[str, torch.Tensor]


def group_of(scope: str) -> str:
    """What part of a model a node is of, by the names of the modules that it was traced in."""
    if "attn" not in scope:
        return (
            "feed-forward" if ".ff" in scope else scope.partition(".")[0] if "block" not in scope else "blocks, other"
        )
    last = scope.rpartition(".")[2]
    kind = next((k for k in ("attn1", "attn2") if k in scope), "attn")
    return f"{kind} projections" if last.startswith("to_") or last == "0" else f"{kind} products"


def traced_with_scopes(model: Any, adapter: ModelAdapter, inputs: Inputs) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The full-precision graph, and the group of every product by its output."""
    sites = {site.name: model.get_submodule(site.name) for site in adapter.sites(model)}
    scopes: dict[str, str] = {}

    def note(proto: onnx.ModelProto, adapter: ModelAdapter, tidy: Callable[..., None] = tracing._tidy) -> None:
        for node in proto.graph.node:
            noted = {p.key: p.value for p in node.metadata_props}
            names = noted.get("pkg.torch.onnx.name_scopes", "[]").strip("[]").replace("'", "").split(", ")
            modules = [name for name in names if name]
            scopes[node.output[0]] = (modules[-2] if len(modules) > 1 else "") if modules else ""
        tidy(proto, adapter)

    with mock.patch.object(tracing, "_tidy", note):
        proto = tracing.trace(model, adapter, {name: m.out_features for name, m in sites.items()}, inputs)
    placed = {n.output[0]: graph.placeholder_name(n) for n in proto.graph.node if n.domain == "qvdit"}
    weights = {name: (m.weight.numpy(), None if m.bias is None else m.bias.numpy()) for name, m in sites.items()}
    baseline = graph.baseline_model(proto, weights)
    groups = {}
    for node in baseline.graph.node:
        if node.op_type in _PRODUCTS:
            value = node.output[0]
            scope = placed.get(value.removesuffix(":product")) or scopes.get(value, "")
            groups[value] = group_of(scope)
    return baseline, groups | {angles(baseline): ANGLES}


def angles(model: onnx.ModelProto) -> str:
    """The value that sine and cosine of the time embedding are taken of, as a product of what varies and a constant."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    value = next(node.input[0] for node in model.graph.node if node.op_type == "Sin")
    while not (producers[value].op_type == "Mul" and constants.intersection(producers[value].input)):
        value = next(name for name in producers[value].input if name in producers)
    return value


def with_tf32(model: onnx.ModelProto, outputs: set[str]) -> onnx.ModelProto:
    """A copy in which the products that write ``outputs`` read operands of 10 mantissa bits."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constant = onnx.helper.make_tensor("tf32:split", onnx.TensorProto.FLOAT, [], [_SPLIT])
    result.graph.initializer.append(constant)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if node.output[0] in outputs:
            for index, name in enumerate(node.input[:2]):
                short = f"{node.output[0]}:tf32:{index}"
                nodes += [
                    onnx.helper.make_node("Mul", [name, "tf32:split"], [f"{short}:scaled"]),
                    onnx.helper.make_node("Sub", [f"{short}:scaled", name], [f"{short}:rest"]),
                    onnx.helper.make_node("Sub", [f"{short}:scaled", f"{short}:rest"], [short]),
                ]
                node.input[index] = short
        nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def measure(name: str, model: Any, inputs: Inputs) -> dict[str, Any]:
    """Errors of a model with TF32 everywhere, in each group alone, and everywhere but in each group."""
    adapter = next(a for a in ADAPTERS if a.class_name == type(model).__name__)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0].numpy()
    baseline, groups = traced_with_scopes(model, adapter, inputs)
    members: dict[str, set[str]] = defaultdict(set)
    for value, group in groups.items():
        members[group].add(value)
    arrays = {key: value.numpy() for key, value in inputs.items()}

    def error(outputs: set[str]) -> float:
        model_bytes = with_tf32(baseline, outputs).SerializeToString()
        return relative_error(session(model_bytes, 2).run(None, arrays)[0], expected)

    means = onnx.ModelProto()
    means.CopyFrom(baseline)
    for node in means.graph.node:
        if node.op_type == "ReduceMean":
            del node.input[1:]
    everything = {value for value, group in groups.items() if group != ANGLES}
    return {
        "model": name,
        "float32": error(set()),
        "tf32": error(everything),
        "tf32_and_angles": error(set(groups)),
        "means": relative_error(session(means.SerializeToString(), 2).run(None, arrays)[0], expected),
        "alone": {group: error(found) for group, found in members.items()},
        "all_but": {group: error(everything - found) for group, found in members.items()},
        "timestep": inputs["timestep"].tolist(),
        "largest": {key: float(np.abs(value).max()) for key, value in arrays.items()},
    }


def random_models(families: list[str]) -> list[tuple[str, Any, Inputs]]:
    from tests.gpu.families import FAMILIES, TEXT

    found = []
    for family in families:
        torch.manual_seed(0)
        model = FAMILIES[family]().eval().requires_grad_(False)
        adapter = next(a for a in ADAPTERS if a.family == family)
        adapter.complete(model)
        video = (2, 3, 16, 32, 32)
        text, times = torch.randn(2, TEXT, 64), torch.tensor([700.0, 700.0])
        found.append((family, model, _ordered(adapter, torch.randn(video), times, text)))
    return found


def _ordered(adapter: ModelAdapter, video: torch.Tensor, times: torch.Tensor, text: torch.Tensor) -> Inputs:
    named = {"hidden_states": video, "timestep": times, "encoder_hidden_states": text}
    return {name: named[name] for name in adapter.inputs}


def trained_models(names: list[str]) -> list[tuple[str, Any, Inputs]]:
    from qvdit.models.loading import find_model
    from qvdit.reference import world

    found = []
    for name in names:
        pipeline = find_model(name).load()
        torch.manual_seed(0)
        text = torch.cat([pipeline.prompt_table([""]), pipeline.prompt_table([world.EXAMPLE])])
        video = torch.randn(1, 3, 16, 32, 32).expand(2, -1, -1, -1, -1).contiguous()
        inputs = {"hidden_states": video, "timestep": torch.tensor([700.0, 700.0]), "encoder_hidden_states": text}
        found.append((name, pipeline.transformer, inputs))
    return found


def write(name: str, model: Any, inputs: Inputs, folder: Path) -> None:
    """NAME.onnx and NAME-raw.onnx (as diffusers' module exports by itself), each with all its float values as .npz."""
    adapter = next(a for a in ADAPTERS if a.class_name == type(model).__name__)
    program: Any = torch.onnx.export(
        model, (), kwargs={**inputs, "return_dict": False}, dynamo=True, opset_version=18, verbose=False
    )
    ours = lowered(traced_with_scopes(model, adapter, inputs)[0])
    for suffix, proto in (("", ours), ("-raw", program.model_proto)):
        onnx.save(proto, folder / f"{name}{suffix}.onnx")
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        typed = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
        names = [n for node in proto.graph.node for n in node.output if typed.get(n) == onnx.TensorProto.FLOAT]
        seen = {value.name for value in proto.graph.output}
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names if n not in seen
        )
        arrays = {key: value.numpy() for key, value in inputs.items()}
        values = session(proto.SerializeToString(), 2).run(names, arrays)
        held: dict[str, Any] = {f"input:{key}": value for key, value in arrays.items()}
        held |= {f"value:{n}": v for n, v in zip(names, values, strict=True)}
        np.savez(folder / f"{name}{suffix}.npz", order=np.array(names), **held)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="")
    parser.add_argument("--models", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    cases = random_models([f for f in arguments.families.split(",") if f])
    cases += trained_models([m for m in arguments.models.split(",") if m])
    rows = []
    for name, model, inputs in cases if arguments.write else []:
        arguments.write.mkdir(parents=True, exist_ok=True)
        write(name, model, inputs, arguments.write)
    for name, model, inputs in cases if arguments.out else []:
        row = measure(name, model, inputs)
        rows.append(row)
        print(f"{name}: float32 {row['float32']:.1e}, TF32 {row['tf32']:.1e}, angles too {row['tf32_and_angles']:.1e}")
        print(f"    means over all axes, float32: {row['means']:.1e}")
        for group, value in sorted(row["alone"].items(), key=lambda item: -item[1]):
            print(f"    {group}: alone {value:.1e}, all but it {row['all_but'][group]:.1e}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
