"""Whole transformers as ONNX graphs against PyTorch's quantized model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from onnx import TensorProto

from qvdit.contract import WEIGHT_BITS, FrameRows, LowBitLayer, StaticInt8Layer
from qvdit.contract.parity import relative_error
from qvdit.export import graph
from qvdit.export.files import save_model
from qvdit.export.opset import lowered
from qvdit.export.precision import strongly_typed
from qvdit.export.tensorrt import static_model
from qvdit.method.reference import quantized_transformer
from qvdit.models import ADAPTERS
from qvdit.runtimes.onnxruntime import session

BODIES = ("qdq", "integer")
WAN, LATTE, COGVIDEOX = ADAPTERS


def as_numpy(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def run_onnx(model: onnx.ModelProto | Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    source = model if isinstance(model, Path) else model.SerializeToString()
    return session(source, 1).run(None, as_numpy(inputs))[0]


@torch.no_grad()
def run_torch(model: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return model(**inputs, return_dict=False)[0].numpy()


def assert_parity(found: np.ndarray, transformer: Any, layers: Any, inputs: dict[str, torch.Tensor]) -> None:
    """``found`` is the quantized model's output: nearer to it by far than it is to full precision."""
    quantized = run_torch(quantized_transformer(transformer, layers), inputs)
    assert found.shape == quantized.shape
    distance = relative_error(quantized, run_torch(transformer, inputs))
    assert relative_error(found, quantized) < min(0.15 * distance, 5e-3)


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


# Wan ------------------------------------------------------------------------------------------------------------------


def test_wan_trace_has_every_site_and_diffusers_names(traced_wan: onnx.ModelProto, wan_model: Any) -> None:
    placed = [node for node in traced_wan.graph.node if node.domain == "qvdit"]
    names = [onnx.helper.get_node_attr_value(node, "layer").decode() for node in placed]
    assert sorted(names) == sorted(site.name for site in WAN.sites(wan_model))
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in traced_wan.graph.input
    }
    assert shapes == {
        "hidden_states": ["batch", 3, 16, "height", "width"],
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", "text_tokens", 64],
    }
    assert [value.name for value in traced_wan.graph.output] == ["sample"]
    assert {opset.domain: opset.version for opset in traced_wan.opset_import} == {"": 21, "qvdit": 1}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("batch", "text", "height", "width"), [(2, 4, 32, 32), (1, 1, 32, 32), (3, 9, 16, 40), (1, 4, 8, 64)]
)
def test_wan_at_other_sizes(
    batch: int,
    text: int,
    height: int,
    width: int,
    body: Any,
    traced_wan: onnx.ModelProto,
    wan_model: Any,
    rtn_layers: Any,
    example_inputs: Any,
) -> None:
    layers = rtn_layers(wan_model, 16, rank=1)
    inputs = example_inputs((3, 16, height, width), 64, batch, text, seed=3)
    found = run_onnx(graph.quantized_model(traced_wan, layers, body), inputs)
    assert_parity(found, wan_model, layers, inputs)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("bits", "act_bits", "symmetric", "rank"), [(2, 6, False, 0), (3, 8, True, 3), (6, 6, True, 0), (8, 8, False, 1)]
)
def test_wan_at_other_bits(
    bits: int,
    act_bits: int,
    symmetric: bool,
    rank: int,
    body: Any,
    traced_wan: onnx.ModelProto,
    wan_model: Any,
    rtn_layers: Any,
    example_inputs: Any,
) -> None:
    layers = rtn_layers(wan_model, 16, bits, act_bits, symmetric, rank)
    inputs = example_inputs((3, 16, 32, 32), 64, seed=4)
    found = run_onnx(graph.quantized_model(traced_wan, layers, body), inputs)
    assert_parity(found, wan_model, layers, inputs)


def test_frame_gains_matter(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any, example_inputs: Any) -> None:
    """The comparison would see gains in the wrong order."""
    layers = rtn_layers(wan_model, 16, rank=1)
    turned = tuple(
        layer if layer.frame_gain is None else replace(layer, frame_gain=layer.frame_gain[::-1].copy())
        for layer in layers
    )
    inputs = example_inputs((3, 16, 32, 32), 64)
    found = run_onnx(graph.quantized_model(traced_wan, turned, "integer"), inputs)
    assert relative_error(found, run_torch(quantized_transformer(wan_model, layers), inputs)) > 0.02


def test_wan_baseline_is_full_precision(traced_wan: onnx.ModelProto, wan_model: Any, example_inputs: Any) -> None:
    weights = {site.name: full_weights(wan_model, site.name) for site in WAN.sites(wan_model)}
    model = graph.baseline_model(traced_wan, weights)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""]
    onnx.checker.check_model(model, full_check=True)
    inputs = example_inputs((3, 16, 24, 32), 64, 1, 6, seed=5)
    assert relative_error(run_onnx(model, inputs), run_torch(wan_model, inputs)) < 1e-5


def full_weights(model: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    linear = model.get_submodule(name)
    return linear.weight.numpy(), None if linear.bias is None else linear.bias.numpy()


# Latte ----------------------------------------------------------------------------------------------------------------


def test_latte_trace_has_every_site(traced_latte: onnx.ModelProto, latte_model: Any) -> None:
    placed = [node for node in traced_latte.graph.node if node.domain == "qvdit"]
    names = [onnx.helper.get_node_attr_value(node, "layer").decode() for node in placed]
    assert sorted(names) == sorted(site.name for site in LATTE.sites(latte_model))
    assert [value.name for value in traced_latte.graph.input] == list(LATTE.inputs)
    assert [d.dim_param or d.dim_value for d in traced_latte.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        4,
        4,
        8,
        8,
    ]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("batch", "text"), [(2, 4), (1, 1), (3, 11)])
def test_latte_at_other_sizes(
    batch: int,
    text: int,
    body: Any,
    traced_latte: onnx.ModelProto,
    latte_model: Any,
    rtn_layers: Any,
    example_inputs: Any,
) -> None:
    layers = rtn_layers(latte_model, 4, rank=1)
    assert {layer.rows for layer in layers} == {FrameRows.SPATIAL, FrameRows.TEMPORAL, FrameRows.NONE}
    inputs = example_inputs((4, 4, 8, 8), 24, batch, text, seed=6)
    found = run_onnx(graph.quantized_model(traced_latte, layers, body), inputs)
    assert_parity(found, latte_model, layers, inputs)


# What stays in full precision, and static layers ----------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES)
def test_kept_layer(
    body: Any, traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any, example_inputs: Any
) -> None:
    kept = "blocks.1.ffn.net.2"
    layers = tuple(layer for layer in rtn_layers(wan_model, 16, bits=2) if layer.name != kept)
    model = graph.quantized_model(traced_wan, layers, body, {kept: full_weights(wan_model, kept)})
    assert sum(node.domain == "qvdit" for node in model.graph.node) == len(layers) == 19
    held = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert any(np.array_equal(value, wan_model.blocks[1].ffn.net[2].weight.numpy().T) for value in held)
    onnx.checker.check_model(model, full_check=True)
    inputs = example_inputs((3, 16, 32, 32), 64, seed=7)
    assert_parity(run_onnx(model, inputs), wan_model, layers, inputs)


def static_layers(model: Any, smooth: bool) -> tuple[StaticInt8Layer, ...]:
    layers = []
    rng = np.random.default_rng(0)
    for site in WAN.sites(model):
        weight, bias = full_weights(model, site.name)
        inv_smooth = (rng.random(weight.shape[1], dtype=np.float32) + 0.5) if smooth else None
        smoothed = weight if inv_smooth is None else weight / inv_smooth
        scale = np.abs(smoothed).max(1) / np.float32(127)
        weight_q = np.round(smoothed / scale[:, None]).astype(np.int8)
        layers.append(StaticInt8Layer(site.name, weight_q, scale, np.array(0.02, np.float32), bias, inv_smooth))
    return tuple(layers)


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "plain"])
@pytest.mark.parametrize(("body", "zero_point"), [("qdq", np.int8(0)), ("integer", np.uint8(128))])
def test_static_layers_are_plain_qdq(
    body: Any, zero_point: Any, smooth: bool, traced_wan: onnx.ModelProto, wan_model: Any, example_inputs: Any
) -> None:
    layers = static_layers(wan_model, smooth)
    model = graph.quantized_model(traced_wan, layers, body)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""]
    assert len(model.functions) == 0
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 20
    assert kinds.count("DequantizeLinear") == 40
    found = onnx.numpy_helper.to_array(constants(model)["blocks.0.attn1.to_q:act_zero"])
    assert (found.shape, found.dtype, found) == ((), zero_point.dtype, zero_point)
    weight = onnx.numpy_helper.to_array(constants(model)["blocks.0.attn1.to_q:weight_q"])
    np.testing.assert_array_equal(weight, layers[0].weight_q.T)
    onnx.checker.check_model(model, full_check=True)
    inputs = example_inputs((3, 16, 16, 32), 64, 1, 5, seed=8)
    assert_parity(run_onnx(model, inputs), wan_model, layers, inputs)


def test_static_layers_for_tensorrt(traced_wan: onnx.ModelProto, wan_model: Any, example_inputs: Any) -> None:
    layers = static_layers(wan_model, smooth=True)
    widths = {layer.name: layer.shape for layer in layers}
    layers, kept = layers[:-1], layers[-1].name
    typed = lowered(strongly_typed(traced_wan, widths, static=[layer.name for layer in layers]))
    model = static_model(typed, layers, {kept: full_weights(wan_model, kept)})
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    held = constants(model)
    quantizers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) == 4 * len(layers)
    for node in quantizers:
        assert held[node.input[1]].data_type == TensorProto.FLOAT
        assert node.input[0] not in held or held[node.input[0]].data_type == TensorProto.FLOAT  # 8.6 has no INT8 ones
    for layer in layers:
        values, scale = (
            onnx.numpy_helper.to_array(held[f"{layer.name}:{name}"]) for name in ("weight", "weight_scale")
        )
        np.testing.assert_array_equal(np.rint(values / scale), layer.weight_q.T)
    inputs = example_inputs((3, 16, 32, 32), 64, seed=8)
    found, full = run_onnx(model, inputs), run_torch(wan_model, inputs)
    quantized = run_torch(quantized_transformer(wan_model, layers), inputs)
    distance = relative_error(quantized, full)
    assert relative_error(found, quantized) < 0.3 * distance  # FP16 between the layers
    assert relative_error(found, full) == pytest.approx(distance, rel=0.1)


# What is in the file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weights_have_the_narrowest_type(
    bits: int, body: Any, traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any
) -> None:
    layers = rtn_layers(wan_model, 16, bits, symmetric=False)
    held = constants(graph.quantized_model(traced_wan, layers, body))
    for layer in layers:
        for field in ("weight_q", "weight_zero"):
            tensor, value = held[f"{layer.name}:{field}"], getattr(layer, field)
            assert tensor.data_type == (TensorProto.INT4 if bits <= 4 else TensorProto.INT8)
            assert len(tensor.raw_data) == (-(-value.size // 2) if bits <= 4 else value.size)
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), value)


def test_odd_number_of_int4_values() -> None:
    editor = graph.GraphEditor(onnx.GraphProto())
    value = np.array([[-8, 7, 3], [1, -1, 0], [5, 2, -4]], np.int8)
    assert editor.constant("w", value, TensorProto.INT4) == "w"
    (tensor,) = editor.graph.initializer
    assert (tensor.data_type, list(tensor.dims), len(tensor.raw_data)) == (TensorProto.INT4, [3, 3], 5)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), value)


def test_functions_are_those_in_use(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any) -> None:
    layers = rtn_layers(wan_model, 16, rank=1)
    model = graph.quantized_model(traced_wan, layers, "qdq")
    declared = [(f.domain, f.name, f.overload) for f in model.functions]
    called = {(n.domain, n.op_type, n.overload) for n in model.graph.node if n.domain == "qvdit"}
    assert len(declared) == len(set(declared)) == 2  # with frame gain, and text without
    assert set(declared) == called


def test_no_trace_of_this_machine(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any, tmp_path: Path) -> None:
    model = graph.quantized_model(traced_wan, rtn_layers(wan_model, 16, rank=1), "integer")
    save_model(model, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    here = Path(__file__).parents[2]
    for text in (str(here), str(Path.home()), str(Path(torch.__file__).parent), ".py", "stack_trace", "pkg.torch"):
        assert text.encode() not in content, text
    assert not model.metadata_props
    assert not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("body", BODIES)
def test_same_input_same_bytes(
    body: Any, traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any, tmp_path: Path
) -> None:
    before = traced_wan.SerializeToString(deterministic=True)
    layers = rtn_layers(wan_model, 16, rank=1)
    for name in ("a.onnx", "b.onnx"):
        save_model(graph.quantized_model(traced_wan, layers, body), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert traced_wan.SerializeToString(deterministic=True) == before


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(traced_wan: onnx.ModelProto, wan_model: Any, rtn_layers: Any) -> onnx.ModelProto:
    return graph.quantized_model(traced_wan, rtn_layers(wan_model, 16, rank=1), "integer")


def test_large_weights_go_beside_the_graph(model: onnx.ModelProto, tmp_path: Path, example_inputs: Any) -> None:
    path = tmp_path / "onnx" / "model.onnx"
    before = model.SerializeToString(deterministic=True)
    assert save_model(model, path, external_from=1) == [path, tmp_path / "onnx" / "model.onnx.data"]
    assert model.SerializeToString(deterministic=True) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    written = onnx.load(path, load_external_data=False)
    outside = {t.name for t in written.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert outside == {t.name for t in model.graph.initializer if len(t.raw_data) >= 1024}
    assert {e.value for t in written.graph.initializer for e in t.external_data if e.key == "location"} == {
        "model.onnx.data"
    }
    graph.check(str(path))
    inputs = example_inputs((3, 16, 32, 32), 64)
    np.testing.assert_array_equal(run_onnx(path, inputs), run_onnx(model, inputs))
    loaded = {t.name: t.raw_data for t in onnx.load(path).graph.initializer}
    assert loaded == {t.name: t.raw_data for t in model.graph.initializer}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_both_files_are_for_whom_the_umask_lets(model: onnx.ModelProto, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        written = save_model(model, tmp_path / "model.onnx", external_from=1)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in written] == [mode, mode]


def test_small_model_is_one_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert save_model(model, path) == [path]
    graph.check(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert onnx.load(path) == model


def test_another_save_leaves_no_old_data(model: onnx.ModelProto, tmp_path: Path, example_inputs: Any) -> None:
    path = tmp_path / "model.onnx"
    inputs = example_inputs((3, 16, 32, 32), 64)
    expected = run_onnx(model, inputs)
    sizes = []
    for limit in (1, 1, 1 << 30, 1):
        save_model(model, path, external_from=limit)
        sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
        np.testing.assert_array_equal(run_onnx(path, inputs), expected)
        assert path.with_name("model.onnx.data").exists() == (limit == 1)
    assert sizes[0] == sizes[1] == sizes[3]


def test_same_model_same_external_bytes(model: onnx.ModelProto, tmp_path: Path) -> None:
    contents = []
    for folder in ("a", "b"):
        contents.append([path.read_bytes() for path in save_model(model, tmp_path / folder / "m.onnx", 1)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("external_from", [1, 1 << 30])
def test_failed_write_leaves_the_old_model(
    external_from: int,
    model: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example_inputs: Any,
) -> None:
    """A run that ends while it writes the graph leaves no graph that reads as whole but is not."""
    path = tmp_path / "model.onnx"
    save_model(model, path, external_from)

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("qvdit.export.files.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_model(model, path, external_from)
    if path.exists():
        graph.check(str(path))
        inputs = example_inputs((3, 16, 32, 32), 64)
        np.testing.assert_array_equal(run_onnx(path, inputs), run_onnx(model, inputs))


def test_checker_refuses_a_broken_model(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.node[5].input[0] = "nowhere"
    save_model(model, tmp_path / "model.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        graph.check(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("body", BODIES)
def test_full_check_of_both_bodies(
    body: Any, traced_latte: onnx.ModelProto, latte_model: Any, rtn_layers: Any, tmp_path: Path
) -> None:
    layers: tuple[LowBitLayer, ...] = rtn_layers(latte_model, 4, symmetric=False, rank=2)
    save_model(graph.quantized_model(traced_latte, layers, body), tmp_path / "model.onnx")
    graph.check(str(tmp_path / "model.onnx"))
