"""Sessions and drop-in transformers; who may import what."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import qvdit.runtimes
from qvdit.contract import QvditError
from qvdit.contract.bundle import ORT_MODEL, PARITY_INPUTS, PARITY_REFERENCE, verify
from qvdit.contract.parity import relative_error
from qvdit.runtimes import parity
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
from qvdit.runtimes.transformer import RuntimeTransformer

ROOT = Path(__file__).parents[2]
SHAPES = {"hidden_states": (2, 3, 16, 32, 32), "timestep": (2,), "encoder_hidden_states": (2, 4, 64)}


@pytest.fixture(scope="module")
def session(bundle: Path) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle / ORT_MODEL, threads=1)


@pytest.fixture(scope="module")
def saved(bundle: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The bundle's own example: inputs, and the output of PyTorch's quantized model."""
    inputs = load_file(bundle / PARITY_INPUTS)
    return {name: inputs[f"model:{name}"].astype(np.float32) for name in SHAPES}, load_file(bundle / PARITY_REFERENCE)[
        "model:quantized"
    ]


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in {**SHAPES, **shapes}.items()}


# The session ----------------------------------------------------------------------------------------------------------


def test_session_computes_the_quantized_model(session: OnnxRuntimeSession, saved: Any) -> None:
    inputs, expected = saved
    found = session.infer(inputs)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    assert relative_error(found, expected) < 5e-3


def test_session_tells_its_inputs(session: OnnxRuntimeSession) -> None:
    assert {name: shape for name, (_, shape) in session.inputs.items()} == {
        "hidden_states": ["batch", 3, 16, "height", "width"],
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", "text_tokens", 64],
    }


def test_session_takes_other_dtypes_and_layouts(session: OnnxRuntimeSession, saved: Any) -> None:
    inputs, _ = saved
    expected = session.infer(inputs)
    wide = {name: np.asfortranarray(value.astype(np.float64)) for name, value in inputs.items()}
    np.testing.assert_array_equal(session.infer(wide), expected)


@pytest.mark.parametrize(
    "names",
    [("hidden_states", "timestep"), (*SHAPES, "guidance"), ("sample", "timestep", "encoder_hidden_states"), ()],
    ids=str,
)
def test_session_refuses_wrong_names(names: tuple[str, ...], session: OnnxRuntimeSession) -> None:
    with pytest.raises(QvditError) as caught:
        session.infer({name: np.zeros(SHAPES.get(name, (1,)), np.float32) for name in names})
    assert str(sorted(names)) in caught.value.got
    assert caught.value.expected == str(sorted(SHAPES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden_states", (2, 3, 15, 32, 32)),
        ("hidden_states", (2, 4, 16, 32, 32)),
        ("hidden_states", (3, 16, 32, 32)),
        ("timestep", (2, 1)),
        ("timestep", ()),
        ("encoder_hidden_states", (2, 4, 63)),
    ],
)
def test_session_refuses_wrong_shapes(name: str, shape: tuple[int, ...], session: OnnxRuntimeSession) -> None:
    with pytest.raises(QvditError) as caught:
        session.infer(zeros(**{name: shape}))
    assert name in caught.value.got
    assert str(shape) in caught.value.got
    assert "\n" not in str(caught.value)


def test_session_refuses_sizes_that_do_not_fit_each_other(session: OnnxRuntimeSession) -> None:
    """``batch`` is one number: two videos with three texts are refused, in one line."""
    with pytest.raises(QvditError) as caught:
        session.infer(zeros(encoder_hidden_states=(3, 4, 64)))
    assert "encoder_hidden_states" in caught.value.got
    assert "\n" not in str(caught.value)


def test_session_is_a_context_manager(bundle: Path, saved: Any) -> None:
    with OnnxRuntimeSession(bundle / ORT_MODEL, threads=1) as session:
        assert session.infer(saved[0]).shape == SHAPES["hidden_states"]


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a"])
def test_session_refuses_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(QvditError, match=r"model\.onnx") as caught:
        OnnxRuntimeSession(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def test_session_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QvditError, match=r"nowhere\.onnx"):
        OnnxRuntimeSession(tmp_path / "nowhere.onnx")


# The transformer ------------------------------------------------------------------------------------------------------


class Recorder:
    """A session that keeps what it was given and answers with twice the video."""

    def __init__(self) -> None:
        self.given: dict[str, np.ndarray] = {}

    def infer(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.given = inputs
        return 2 * inputs["hidden_states"]


@pytest.fixture
def recorder(bundle: Path) -> tuple[RuntimeTransformer, Recorder]:
    recorder = Recorder()
    return RuntimeTransformer(recorder, verify(bundle)), recorder


def test_numpy_in_numpy_out(recorder: Any) -> None:
    transformer, seen = recorder
    inputs = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in SHAPES.items()}
    (output,) = transformer(**inputs, return_dict=False)
    assert isinstance(output, np.ndarray)
    np.testing.assert_array_equal(output, 2 * inputs["hidden_states"])
    for name, value in inputs.items():
        np.testing.assert_array_equal(seen.given[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_in_torch_out(dtype: torch.dtype, recorder: Any) -> None:
    transformer, seen = recorder
    inputs = {name: torch.rand(shape, requires_grad=True).to(dtype) for name, shape in SHAPES.items()}
    (output,) = transformer(**inputs, return_dict=False)
    assert (output.dtype, output.device.type) == (dtype, "cpu")
    torch.testing.assert_close(output, 2 * inputs["hidden_states"].detach(), rtol=0, atol=0)
    for name, value in inputs.items():
        np.testing.assert_array_equal(seen.given[name], value.detach().float().numpy())


def test_output_as_diffusers_wants_it(recorder: Any) -> None:
    transformer, _ = recorder
    output = transformer(**zeros())
    assert output.sample.shape == SHAPES["hidden_states"]
    plain = transformer(**zeros(), return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (torch.tensor(7), [7, 7]),
        (torch.tensor([7.5]), [7.5, 7.5]),
        (torch.tensor([7, 8]), [7, 8]),
        (np.float32(7), [7, 7]),
        (7, [7, 7]),
    ],
    ids=str,
)
def test_time_step_is_repeated_for_the_batch(timestep: Any, expected: list[float], recorder: Any) -> None:
    transformer, seen = recorder
    transformer(**{**zeros(), "timestep": timestep})
    np.testing.assert_array_equal(seen.given["timestep"], expected)


def test_configuration_is_read_as_diffusers_is(recorder: Any) -> None:
    config = recorder[0].config
    assert config.patch_size == config["patch_size"] == config.get("patch_size") == [1, 8, 8]
    assert config.get("image_dim") is None
    assert config.get("no_such_key", 5) == 5
    with pytest.raises(AttributeError):
        _ = config.no_such_key


def test_what_pipelines_ask_of_a_transformer(recorder: Any) -> None:
    transformer, _ = recorder
    assert transformer.dtype is torch.float32
    assert transformer.device == torch.device("cpu")
    assert transformer.to("cuda", dtype=torch.float16) is transformer
    assert transformer.eval() is transformer
    with transformer.cache_context("cond"):
        pass
    with transformer.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=2):
        pass


def test_absent_arguments_are_harmless(recorder: Any) -> None:
    others = {"attention_kwargs": None, "encoder_attention_mask": None, "enable_temporal_attentions": True}
    assert recorder[0](**zeros(), **others).sample.shape == SHAPES["hidden_states"]


@pytest.mark.parametrize(
    "other",
    [{"encoder_hidden_states_image": 1}, {"enable_temporal_attentions": False}, {"encoder_attention_mask": 1}],
    ids=str,
)
def test_arguments_it_was_not_exported_with_are_refused(other: dict[str, Any], recorder: Any) -> None:
    with pytest.raises(QvditError, match=next(iter(other))):
        recorder[0](**zeros(), **other)


def test_load_runs_the_bundle(bundle: Path, saved: Any) -> None:
    inputs, expected = saved
    (output,) = qvdit.runtimes.load(bundle, threads=1)(**inputs, return_dict=False)
    assert relative_error(output, expected) < 5e-3
    (from_path,) = qvdit.runtimes.load(str(bundle))(**inputs, return_dict=False)
    assert relative_error(from_path, expected) < 5e-3


@pytest.mark.parametrize("name", ["onnx/model.ort.onnx", "onnx/model.onnx", "quantized/model.safetensors"])
def test_load_refuses_an_altered_bundle(name: str, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    with (copied / name).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(QvditError, match="sha256"):
        qvdit.runtimes.load(copied)


def test_load_refuses_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(QvditError, match=r"manifest\.json"):
        qvdit.runtimes.load(tmp_path)


def test_loaded_transformer_keeps_its_manifest(bundle: Path) -> None:
    transformer = qvdit.runtimes.load(bundle, threads=1)
    assert dataclasses.asdict(transformer.manifest) == dataclasses.asdict(verify(bundle))


# Who imports what -----------------------------------------------------------------------------------------------------

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Blocker())
"""
METHOD_ONLY = ("torch", "diffusers", "transformers", "modelopt", "onnxscript", "accelerate")


def without(blocked: tuple[str, ...], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that lacks some packages."""
    command = [sys.executable, "-c", BLOCKER.format(blocked=set(blocked)) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_runtime_works_without_torch(bundle: Path) -> None:
    code = """
import numpy as np
from pathlib import Path
from safetensors.numpy import load_file
import qvdit.runtimes
bundle = Path(sys.argv[1])
transformer = qvdit.runtimes.load(bundle, threads=1)
inputs = load_file(bundle / "parity/inputs.safetensors")
inputs = {name[6:]: value.astype(np.float32) for name, value in inputs.items() if name.startswith("model:")}
output = transformer(**inputs, return_dict=False)[0]
expected = load_file(bundle / "parity/reference.safetensors")["model:quantized"]
print(type(output).__name__, transformer.dtype, transformer.device)
print(np.linalg.norm(output - expected) / np.linalg.norm(expected) < 5e-3)
print([name for name in ("torch", "diffusers", "onnx") if name in sys.modules])
"""
    done = without((*METHOD_ONLY, "onnx"), code, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["ndarray float32 cpu", "True", "[]"]


def test_parity_command_works_without_torch(bundle: Path) -> None:
    code = "from qvdit.cli import main\nsys.argv[0] = 'qvdit'\nmain()"
    done = without(METHOD_ONLY, code, "parity", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers: 20 compared, 0 with integers that differ" in done.stdout


def test_runtime_without_its_engine_says_so(bundle: Path) -> None:
    code = """
from qvdit.contract import QvditError
import qvdit.runtimes
try:
    qvdit.runtimes.load(sys.argv[1])
except QvditError as error:
    print(error)
"""
    done = without(("onnxruntime",), code, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "got no onnxruntime; expected the package onnxruntime; pip install onnxruntime\n"


def test_a_gpu_without_torch_says_so(bundle: Path) -> None:
    code = """
from qvdit.contract import QvditError
import qvdit.runtimes
try:
    qvdit.runtimes.load(sys.argv[1], device="cuda")
except QvditError as error:
    print(error)
"""
    done = without(("torch",), code, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    expected = "expected PyTorch, diffusers and accelerate, for a GPU; pip install qvdit\n"
    assert done.stdout == f"got a package that is missing (torch is not here); {expected}"


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("qvdit", ("numpy", "torch", "onnx", "onnxruntime")),
        ("qvdit.contract", ("torch", "onnx", "onnxruntime")),
        ("qvdit.contract.bundle", ("torch", "onnx", "onnxruntime")),
        ("qvdit.contract.checkpoint", ("torch", "onnx", "onnxruntime")),
        ("qvdit.contract.parity", ("torch", "onnx", "onnxruntime")),
        ("qvdit.runtimes", ("torch", "onnx", "onnxruntime")),
        ("qvdit.runtimes.cuda", ("torch", "onnx", "onnxruntime")),
        ("qvdit.runtimes.transformer", ("torch", "onnx", "onnxruntime")),
        ("qvdit.cli", ("torch", "diffusers", "onnx", "onnxruntime")),
    ],
)
def test_import_is_light(module: str, light: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {light!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources(*folders: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def reaches(path: Path, *packages: str) -> set[str]:
    """The imports of a file that lie in some packages."""
    return {name for name in imports(path) if any(name == p or name.startswith(f"{p}.") for p in packages)}


@pytest.mark.parametrize("path", sources("qvdit/contract"))
def test_contract_imports_little(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "safetensors"}
    others = {name for name in imports(path) if name.split(".")[0] not in allowed}
    assert others == reaches(path, "qvdit.contract")


@pytest.mark.parametrize("path", sources("runtimes"))
def test_runtimes_import_neither_method_nor_exporter(path: Path) -> None:
    # Those whose engine is PyTorch. The last one builds the source model's own class, from the toolchain's parts.
    engines = {
        "torch_ops.py": ("torch",),
        "torch_linear.py": ("torch",),
        "torch_transformer.py": ("torch", "diffusers", "qvdit.models", "qvdit.method.lowbit"),
    }
    guarded = ("qvdit", "torch", "diffusers", "transformers")
    allowed = ("qvdit.contract", "qvdit.runtimes", *engines.get(path.name, ()))
    assert reaches(path, *guarded) == reaches(path, *allowed)


@pytest.mark.parametrize("path", sources("qvdit/method", "qvdit/models"))
def test_method_imports_neither_exporter_nor_runtimes(path: Path) -> None:
    assert not reaches(path, "qvdit.export", "qvdit.runtimes", "onnx", "onnxruntime")


@pytest.mark.parametrize("path", sources("export"))
def test_exporter_does_not_import_runtimes(path: Path) -> None:
    assert not reaches(path, "qvdit.runtimes", "onnxruntime")


@pytest.mark.parametrize("path", sources("qvdit", "export", "runtimes", "calib_data", "tests"))
def test_folders_are_imported_by_their_package(path: Path) -> None:
    assert not reaches(path, "export", "runtimes", "calib_data")


def test_import_check_sees_imports(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import export.graph as g\ndef f():\n    from runtimes import layers\n    import torch.nn\n")
    assert imports(path) == {"export.graph", "runtimes", "runtimes.layers", "torch.nn"}
    assert reaches(path, "export", "runtimes") == {"export.graph", "runtimes", "runtimes.layers"}
    assert SimpleNamespace(found=reaches(path, "torch")).found == {"torch.nn"}


def test_source_tree_is_importable_without_installation(tmp_path: Path) -> None:
    """Python started in a clone imports its packages, whatever is installed."""
    root = Path(__file__).parents[2]
    code = "import qvdit.runtimes, qvdit.export, qvdit.calib_data, sys; print(qvdit.runtimes.__file__)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root)}
    python = [sys.executable, "-S", "-c", code]  # -S: nothing that is installed
    done = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(root / "runtimes" / "__init__.py"), done.stderr


def test_a_tensor_comes_back_to_the_gpu_it_came_from(bundle: Path) -> None:
    """The engine may be on another one. Stand-ins: the device without data is one, the CPU is the other."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Session:
        def infer(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.zeros(inputs["hidden_states"].shape)

    video = torch.zeros(2, 3, 4, 4, 4, dtype=torch.float16, device="meta").as_subclass(OnGpu)
    transformer = RuntimeTransformer(Session(), verify(bundle), "cuda:1")
    (found,) = transformer(video, torch.tensor(3.0), torch.zeros(2, 1, 8), return_dict=False)
    assert (found.device, found.dtype) == (video.device, video.dtype)


def test_parity_as_a_program(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a machine without the command line's packages."""
    assert parity.main([str(bundle), "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "layers: 20 compared, 0 with integers that differ" in told
    assert "of the reference's" in told
    assert parity.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got ")
    assert error.count("\n") == 1
