"""Bundles and single layers on ONNX Runtime's CUDA provider: integers, placement, tensors, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from placement import placement

import qvdit.runtimes
from qvdit.contract import FrameRows, QvditError
from qvdit.contract.bundle import ORT_MODEL
from qvdit.contract.layer import rotation_block
from qvdit.contract.parity import load_reference, relative_error
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
from qvdit.runtimes.parity import check_bundle
from qvdit.runtimes.tensorrt.device import OutOfMemoryError

WIDTHS = [(2, 6), (3, 6), (4, 8), (6, 6), (8, 8)]
SIZES = [(7, 13, 5), (128, 64, 33), (384, 1536, 256), (1152, 4608, 100)]  # K, N, rows


def one_layer(layer: Any, path: Path) -> Path:
    """A layer as an exported model."""
    from qvdit.export import graph
    from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE, OPSET

    n, k = layer.shape
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(NODE, ["x"], ["y"], domain=DOMAIN, layer=layer.name)
    kind = onnx.TensorProto.FLOAT
    one = onnx.helper.make_graph([node], "one", [value("x", kind, [1, "rows", k])], [value("y", kind, [1, "rows", n])])
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    traced = onnx.helper.make_model(one, opset_imports=opsets, ir_version=10)
    path.write_bytes(graph.quantized_model(traced, (layer,), "integer").SerializeToString())
    return path


def assert_layer(layer: Any, rows: int, folder: Path) -> None:
    import torch

    from qvdit.method.lowbit import LowBitLinear
    from qvdit.method.reference import layer_reference
    from qvdit.runtimes.layers import LayerModels

    rng = np.random.default_rng(rows)
    x = rng.standard_normal((1, rows, layer.shape[1])) * np.exp(rng.normal(0, 3, (1, rows, 1)))
    x = x.astype(np.float32)
    reference = layer_reference(LowBitLinear(layer), torch.from_numpy(x))
    models = LayerModels(one_layer(layer, folder / "layer.onnx"), device="cuda")
    found = models.run(layer.name, x, layer.rows.tokens_per_frame(rows, 4))
    np.testing.assert_array_equal(found.x_q, reference.outputs.x_q)
    np.testing.assert_array_equal(found.acc, reference.outputs.acc)
    assert relative_error(found.y, reference.outputs.y) < 1e-5


@pytest.mark.parametrize(("k", "n", "rows"), SIZES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
def test_integers(
    bits: int, act_bits: int, symmetric: bool, k: int, n: int, rows: int, low_bit_layer: Any, tmp_path: Path
) -> None:
    for parts in ((), ("zero", "bias", "smooth")):
        layer = low_bit_layer(n, k, bits, parts, rank=1, act_bits=act_bits, act_symmetric=symmetric)
        assert_layer(layer, rows, tmp_path)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shaped", ["grouped", "rotated", "gained"])
def test_integers_of_other_layers(shaped: str, symmetric: bool, low_bit_layer: Any, tmp_path: Path) -> None:
    n, k = 40, 192
    for zero in ((), ("zero",)):
        fields: dict[str, Any] = {"act_symmetric": symmetric}
        if shaped == "rotated":
            fields["rotation"] = rotation_block(k)
        if shaped == "grouped":
            rng = np.random.default_rng(1)
            fields["weight_scale"] = (rng.random((n, k // 64)) * 0.1 + 0.01).astype(np.float32)
            if zero:
                fields["weight_zero"] = rng.integers(-8, 8, (n, k // 64)).astype(np.int8)
        parts = (*zero, "gain") if shaped == "gained" else zero
        layer = low_bit_layer(n, k, 4, parts, rank=2, **fields)
        assert layer.rows is (FrameRows.SEQUENCE if shaped == "gained" else FrameRows.NONE)
        assert_layer(layer, 64, tmp_path)


def test_a_row_that_is_no_number_stays_alone(low_bit_layer: Any, tmp_path: Path) -> None:
    path = one_layer(low_bit_layer(24, 32, rank=1), tmp_path / "layer.onnx")
    x = np.random.default_rng(0).standard_normal((1, 8, 32)).astype(np.float32)
    with OnnxRuntimeSession(path, device="cuda") as session:
        expected = session.infer({"x": x})
        for row, value in itertools.product((0, 5), (np.nan, np.inf, -np.inf)):
            broken = x.copy()
            broken[0, row, 3] = value
            found = session.infer({"x": broken})
            assert np.isnan(found[0, row]).all()
            others = np.arange(8) != row
            np.testing.assert_array_equal(found[0, others], expected[0, others])


def test_every_bundle_is_proven(bundles: list[Path]) -> None:
    for bundle in bundles:
        layers, model = check_bundle(bundle, device="cuda")
        assert {(layer.xq_mismatches, layer.acc_mismatches) for layer in layers} == {(0, 0)}
        assert 0.9 <= model.error_ratio <= 1.1


def test_everything_large_is_on_the_gpu(bundles: list[Path], tmp_path: Path) -> None:
    """The CPU works out shapes, as ONNX Runtime always lets it; every product and every activation is on the GPU."""
    for bundle in bundles:
        found = placement(bundle / ORT_MODEL, load_reference(bundle).inputs, tmp_path)
        print(bundle.name, found)
        assert not found.large_on_cpu
        assert found.on_gpu.total() > 100
        assert not set(found.on_cpu) & {"MatMulInteger", "QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm"}


def test_tensors_stay_on_the_gpu(bundles: list[Path]) -> None:
    import torch

    saved = load_reference(bundles[0])
    with OnnxRuntimeSession(bundles[0] / ORT_MODEL, device="cuda") as session:
        expected = session.infer(saved.inputs)
        tensors = {name: torch.from_numpy(value).cuda() for name, value in saved.inputs.items()}
        found = session.infer(tensors)
        assert (found.device.type, found.dtype) == ("cuda", torch.float32)
        del tensors
        again = session.infer({name: torch.from_numpy(value).cuda() for name, value in saved.inputs.items()})
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
    np.testing.assert_array_equal(again.cpu().numpy(), expected)


def test_it_takes_the_transformer_s_place(bundles: list[Path]) -> None:
    import torch

    saved = load_reference(bundles[0])
    model = qvdit.runtimes.load(bundles[0], device="cuda", engine="onnxruntime")
    inputs = {name: torch.from_numpy(value).to("cuda", torch.bfloat16) for name, value in saved.inputs.items()}
    (sample,) = model(**inputs, return_dict=False)
    assert (sample.device.type, sample.dtype) == ("cuda", torch.bfloat16)
    (host,) = model(**saved.inputs, return_dict=False)
    assert isinstance(host, np.ndarray)
    assert 0.9 < relative_error(host, saved.full) / relative_error(saved.quantized, saved.full) < 1.1


def test_a_gpu_that_is_not_there(bundles: list[Path]) -> None:
    with pytest.raises(QvditError, match="cuda:99"):
        qvdit.runtimes.load(bundles[0], device="cuda:99", engine="onnxruntime")


def test_more_than_the_gpu_holds(bundles: list[Path]) -> None:
    import torch

    saved = load_reference(bundles[0])
    with OnnxRuntimeSession(bundles[0] / ORT_MODEL, device="cuda") as session:
        session.infer(saved.inputs)
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(free - (1 << 29), dtype=torch.uint8, device="cuda")
        many = {name: np.repeat(value, 64, 0) for name, value in saved.inputs.items()}
        with pytest.raises(OutOfMemoryError) as caught:
            session.infer(many)
        assert "\n" not in str(caught.value)
        del taken
        torch.cuda.empty_cache()
        assert relative_error(session.infer(saved.inputs), saved.quantized) < 0.3
