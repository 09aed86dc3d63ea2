"""ONNX Runtime on a GPU, as far as a CPU shows it: signed bodies, what is refused, what a session is asked for.

That signed bodies give the operator's integers is tested beside the unsigned ones, in test_export_functions.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
import torch

import qvdit.runtimes
from qvdit.contract import QvditError
from qvdit.contract.bundle import ORT_MODEL
from qvdit.contract.parity import load_reference, relative_error
from qvdit.export.files import save_model
from qvdit.export.functions import OPSET, Variant, function
from qvdit.runtimes import onnxruntime_cuda
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession, session
from qvdit.runtimes.parity import check_bundle
from qvdit.runtimes.signed import sign, signed_model
from qvdit.runtimes.tensorrt.device import OutOfMemoryError

# What the CUDA provider of 1.31 has kernels for (onnxruntime's docs/OperatorKernels.md): kind of node → types of what
# it reads first. CastLike becomes a Cast. INT4 weights are cast on the CPU, once.
FLOAT, INT8, INT32, INT64 = "float32", "int8", "int32", "int64"
KERNELS = {
    name: types
    for names, types in (
        ("Add Sub Mul Div Min Max ReduceMax ReduceSum", {FLOAT, INT32, INT64}),
        ("Abs Neg Round MatMul Gemm QuantizeLinear ReduceMin", {FLOAT}),
        ("Cast CastLike", {FLOAT, INT8, INT32, INT64, "int4"}),
        ("Identity Reshape Transpose Flatten Squeeze Unsqueeze", {FLOAT, INT8, INT32, INT64}),
        ("Concat Split Shape", {FLOAT, INT8, INT32, INT64}),
        ("Clip", {FLOAT, INT8}),
        ("MatMulInteger DequantizeLinear", {INT8}),
    )
    for name in names.split()
}
VARIANTS = [
    Variant(bits, symmetric, zero, True, True, True, True, group, rotation)
    for bits in (6, 8)
    for symmetric in (True, False)
    for zero in (True, False)
    for group, rotation in ((0, 0), (16, 0), (0, 32))
]


def types_of(signed: onnx.FunctionProto) -> dict[str, str]:
    """The type of every value of a body, by its name: that of the function's inlined graph."""
    kinds = {"weight_q": onnx.TensorProto.INT4, "weight_zero": onnx.TensorProto.INT4}
    kinds["tokens_per_frame"] = onnx.TensorProto.INT64
    inputs = [
        onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), None) for name in signed.input
    ]
    body = onnx.helper.make_graph(
        signed.node, "body", inputs, [onnx.helper.make_empty_tensor_value_info(name) for name in signed.output]
    )
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*found.input, *found.value_info, *found.output]
    return {v.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)).name for v in values}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.overload)
def test_the_provider_has_a_kernel_for_every_node(variant: Variant) -> None:
    model = onnx.ModelProto()
    model.functions.append(function(variant, "integer"))
    sign(model)
    (signed,) = model.functions
    types = types_of(signed)
    for node in signed.node:
        if node.op_type != "Constant":
            assert types[node.input[0]] in KERNELS[node.op_type], node
        if node.op_type == "MatMulInteger":
            assert [types[name] for name in node.input] == [INT8, INT8]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            assert types[node.input[2]] == INT8
    assert types["x_from_zero" if "x_from_zero" in types else "x_q"] == INT8
    assert types["acc"] == INT32
    assert "uint8" not in types.values()
    tied_to_rows = {"Range", "Mod", "Gather"}  # which would be computed on the CPU
    assert not tied_to_rows & {node.op_type for node in signed.node}


def test_a_model_is_signed_in_memory(bundle: Path) -> None:
    before = (bundle / ORT_MODEL).read_bytes()
    signed, exported = signed_model(bundle / ORT_MODEL), onnx.load(bundle / ORT_MODEL)
    assert (bundle / ORT_MODEL).read_bytes() == before
    assert signed.graph == exported.graph
    assert [f.overload for f in signed.functions] == [f.overload for f in exported.functions]
    assert all(a != b for a, b in zip(signed.functions, exported.functions, strict=True))
    twice = onnx.ModelProto()
    twice.CopyFrom(signed)
    sign(twice)
    assert twice == signed


def test_weights_beside_the_model_stay_there(bundle: Path, tmp_path: Path) -> None:
    saved = load_reference(bundle)
    files = save_model(onnx.load(bundle / ORT_MODEL), tmp_path / "model.onnx", external_from=0)
    assert len(files) == 2
    content = signed_model(files[0]).SerializeToString()
    assert len(content) < (bundle / ORT_MODEL).stat().st_size / 2
    (found,) = session(content, 1, folder=tmp_path).run(None, saved.inputs)
    (expected,) = session(signed_model(bundle / ORT_MODEL).SerializeToString(), 1).run(None, saved.inputs)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("content", [b"no model at all", b"\x08\x0a\xff"])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path, provider: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(QvditError, match=r"model\.onnx") as caught:
        OnnxRuntimeSession(tmp_path / "model.onnx", device="cuda")
    assert "\n" not in str(caught.value)


# With a stand-in for the provider ------------------------------------------------------------------------------------


class FakeGpu:
    """What Device answers on a machine with two GPUs."""

    def __init__(self, index: int = 0):
        if index > 1:
            raise QvditError(f"device cuda:{index}", "one of the 2 GPUs here", "choose another one")

    def free_memory(self) -> int:
        return 12345


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """onnxruntime as if it had a CUDA provider, which computes on the CPU; holds what it was asked for."""
    asked: dict[str, Any] = {"loads": True}
    real = onnxruntime.InferenceSession

    class Fake(real):
        def __init__(self, model: Any, options: Any, providers: Any, **others: Any):
            asked.update(providers=providers, others=others)
            if "error" in asked:
                raise RuntimeError(asked["error"])
            super().__init__(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [*([onnxruntime_cuda.PROVIDER] if asked["loads"] else []), "CPUExecutionProvider"]

        def run(self, *arguments: Any) -> Any:
            if "run_error" in asked:
                raise RuntimeError(asked["run_error"])
            return super().run(*arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Fake)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnxruntime_cuda.PROVIDER])
    monkeypatch.setattr(onnxruntime_cuda, "Device", FakeGpu)
    return asked


def test_a_bundle_on_the_provider(bundle: Path, provider: dict[str, Any]) -> None:
    saved = load_reference(bundle)
    transformer = qvdit.runtimes.load(bundle, device="cuda:1", engine="onnxruntime")
    (name, options), fallback = provider["providers"]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (options["device_id"], options["use_tf32"]) == ("1", "0")
    assert provider["others"] == {"enable_fallback": 0}
    assert transformer.device == torch.device("cuda:1")
    (output,) = transformer(**saved.inputs, return_dict=False)
    assert relative_error(output, saved.quantized) < 5e-3


def test_parity_on_the_provider(bundle: Path, provider: dict[str, Any]) -> None:
    layers, model = check_bundle(bundle, 1, "cuda")
    assert provider["providers"][0][0] == "CUDAExecutionProvider"
    assert len(layers) == 20
    assert {(layer.xq_mismatches, layer.acc_mismatches) for layer in layers} == {(0, 0)}
    assert all(layer.acc_compared for layer in layers)
    assert 0.99 < model.error_ratio < 1.01


def test_parity_command(bundle: Path, provider: dict[str, Any], cli: Any) -> None:
    code, out, err = cli("qvdit", "parity", bundle, "--device", "cuda", "--threads", "1")
    assert (code, err) == (0, "")
    assert "layers: 20 compared, 0 with integers that differ" in out
    assert provider["providers"][0][0] == "CUDAExecutionProvider"


def test_torch_tensors_stay_on_the_gpu(bundle: Path, provider: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors in the part of the GPU's: bound where they are, and the output's memory handed over."""
    saved = load_reference(bundle)
    bound = []

    class Binding:
        def bind_input(self, name: str, device: str, index: int, kind: Any, shape: Any, address: int) -> None:
            bound.append((name, device, index, kind, shape, address))

        def bind_output(self, name: str, device: str, index: int) -> None:
            bound.append((name, device, index))

        def get_outputs(self) -> list[Any]:
            return [torch.ones(2, 3)]

    fake = SimpleNamespace(
        io_binding=Binding,
        run_with_iobinding=lambda binding: None,
        get_outputs=lambda: [SimpleNamespace(name="sample")],
    )
    monkeypatch.setattr(torch, "device", lambda kind, index: "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: SimpleNamespace(synchronize=lambda: None))
    tensors = {name: torch.from_numpy(value) for name, value in saved.inputs.items()}
    found = onnxruntime_cuda.infer_torch(fake, tensors, dict.fromkeys(tensors, np.float32), "cuda:1")
    torch.testing.assert_close(found, torch.ones(2, 3))
    assert bound == [
        *((name, "cuda", 1, np.float32, tuple(t.shape), t.data_ptr()) for name, t in tensors.items()),
        ("sample", "cuda", 1),
    ]


# Refusals -------------------------------------------------------------------------------------------------------------


def refusal(bundle: Path, device: str = "cuda", **options: Any) -> str:
    with pytest.raises(QvditError) as caught:
        qvdit.runtimes.load(bundle, device=device, engine="onnxruntime", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_package_for_cpus(bundle: Path) -> None:
    text = refusal(bundle)
    assert text.startswith(f"got onnxruntime {onnxruntime.__version__}, which has no CUDA provider")
    assert "pip install onnxruntime-gpu" in text


def test_a_machine_without_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnxruntime_cuda.PROVIDER])
    if not torch.cuda.is_available():
        assert "no GPU" in refusal(bundle)


def test_a_gpu_that_is_not_there(bundle: Path, provider: dict[str, Any]) -> None:
    assert "one of the 2 GPUs here" in refusal(bundle, "cuda:7")


def test_a_provider_that_does_not_load(bundle: Path, provider: dict[str, Any]) -> None:
    """ONNX Runtime would go on without it, on the CPU."""
    provider["loads"] = False
    text = refusal(bundle)
    assert text.startswith("got a CUDA provider that does not load (")
    assert "libonnxruntime_providers" in text  # which this package does not have
    assert "onnxruntime-gpu[cuda,cudnn]" in text


@pytest.mark.parametrize(
    "said",
    [
        "CUDA failure 2: out of memory ; GPU=0",
        "BFCArena::AllocateRawInternal Failed to allocate memory\n for requested buffer of size 1",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_more_than_the_gpu_holds(said: str, bundle: Path, provider: dict[str, Any]) -> None:
    saved = load_reference(bundle)
    held = qvdit.runtimes.load(bundle, device="cuda", engine="onnxruntime")
    provider["run_error"] = said
    with pytest.raises(OutOfMemoryError, match="12,345 bytes are free") as caught:
        held(**saved.inputs)
    assert "\n" not in str(caught.value)
    provider["error"] = said
    assert "no room on cuda for the model" in refusal(bundle)


def test_what_the_provider_says_otherwise(bundle: Path, provider: dict[str, Any]) -> None:
    provider["error"] = "CUDA failure 35:\n driver too old"
    assert "CUDA failure 35: driver too old" in refusal(bundle)


def test_an_option_of_another_engine(bundle: Path, provider: dict[str, Any]) -> None:
    assert "dtype 'float16' of ONNX Runtime" in refusal(bundle, dtype="float16")
    assert "'cuda_graph' of onnxruntime" in refusal(bundle, cuda_graph=True)


def test_without_onnx(bundle: Path, provider: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qvdit.runtimes.signed", None)
    assert "pip install onnx" in refusal(bundle)


def test_an_altered_bundle(bundle: Path, tmp_path: Path, provider: dict[str, Any]) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    with (copied / ORT_MODEL).open("r+b") as file:
        file.seek(100)
        file.write(b"\1")
    assert "sha256" in refusal(copied)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CUDA"])
def test_devices_that_nobody_knows(device: str, bundle: Path, cli: Any) -> None:
    assert "expected cpu, cuda or cuda:N" in refusal(bundle, device)
    code, out, err = cli("qvdit", "parity", bundle, "--device", device)
    assert (code, out) == (2, "")
    assert "expected cpu, cuda or cuda:N" in err
