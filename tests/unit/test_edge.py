"""The folder for a machine without PyTorch: its sampling plan, its devices and tools, its files and their check."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_runner import COMPUTE, CORE, RUNNER, RefusedError, runner
from test_tensorrt_plugin import PLUGIN, VERSIONS, cuda_include, includes

from qvdit.contract import QvditError
from qvdit.contract.bundle import DEVICE, PARITY_HALF, SAMPLING_PLAN, Manifest, verify, write_manifest
from qvdit.contract.bundle import PLUGIN as LIBRARY
from qvdit.contract.files import read_json, sha256
from qvdit.contract.plan import FORMAT, SamplingPlan, save_plan
from qvdit.export import cross, devices, edge, plan
from qvdit.method.calibration import sample

__all__ = ["runner"]  # a fixture
SOURCES = RUNNER.parent
PROMPT = "a red circle moving right in front of a blue square circling clockwise on a grey background"

# The plan ------------------------------------------------------------------------------------------------------------


def sampled(pipeline: Any, steps: int, guidance: float) -> torch.Tensor:
    return sample(pipeline, [PROMPT], steps, guidance, [7])


def planned(pipeline: Any, steps: int, guidance: float) -> SamplingPlan:
    return plan.plan_sampling(pipeline, lambda pipe: sampled(pipe, steps, guidance), guidance, clamp=True)


@pytest.mark.parametrize("guidance", [2.5, 1.0])
def test_the_runner_samples_as_the_pipeline_does(runner, tiny_pipeline, tmp_path, guidance):
    """To the last bit, given the same velocities."""
    made = planned(tiny_pipeline, 4, guidance)
    save_plan(made, tmp_path / "plan")
    batch = 2 if guidance > 1 else 1
    noise = made.latents
    example = {
        "hidden_states": np.repeat(noise, batch, 0),
        "timestep": np.zeros(batch, np.float32),
        "encoder_hidden_states": made.condition,
    }
    exchange = tmp_path / "exchange"
    exchange.mkdir()

    def compute() -> int:
        given = {name: torch.from_numpy(v) for name, v in load_file(exchange / "inputs.safetensors").items()}
        with torch.no_grad():
            velocity = tiny_pipeline.transformer(**given, return_dict=False)[0].numpy()
        save_file({"sample": velocity}, exchange / "outputs.safetensors")
        return 1

    save_file(example, exchange / "inputs.safetensors")
    save_file({"sample": example["hidden_states"]}, exchange / "outputs.safetensors")
    assert runner.call("sample", tmp_path / "plan", exchange, COMPUTE(compute), tmp_path / "video") == "4"
    expected = sampled(tiny_pipeline, 4, guidance).numpy()
    found = load_file(tmp_path / "video")["video"]
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_a_plan_is_plain_numbers(tiny_pipeline):
    transformer = tiny_pipeline.transformer
    made = planned(tiny_pipeline, 5, 2.5)
    assert tiny_pipeline.transformer is transformer
    scheduler = tiny_pipeline.scheduler
    scheduler.set_timesteps(5)
    np.testing.assert_array_equal(made.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(made.keep, np.ones(5, np.float32))
    np.testing.assert_array_equal(made.gain, np.diff(scheduler.sigmas.numpy()))
    assert made.condition.shape[0] == 2
    assert made.latents.shape[0] == 1


def test_single_step_schedulers_are_planned_and_others_refused():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    keep, gain = plan.step_factors(DDIMScheduler(clip_sample=False), 6)
    assert (keep > 1).all()
    assert (gain < 0).all()
    for scheduler in (DDIMScheduler(clip_sample=True), DPMSolverMultistepScheduler(), UniPCMultistepScheduler()):
        with pytest.raises(QvditError, match=f"a {type(scheduler).__name__}, which looks back"):
            plan.step_factors(scheduler, 6)


def test_pipelines_that_call_their_transformer_otherwise_are_refused(tiny_pipeline):
    transformer = tiny_pipeline.transformer
    noise = torch.zeros(1, 3, 2, 8, 8)
    for run in (lambda pipe: None, lambda pipe: pipe.transformer(noise, timestep=torch.zeros(1))):
        with pytest.raises(QvditError, match="a transformer that is not called with tensors encoder_hidden_states"):
            plan.plan_sampling(tiny_pipeline, run, 1.0, clamp=True)
        assert tiny_pipeline.transformer is transformer


def test_damaged_plans(runner, tiny_pipeline, tmp_path):
    made = planned(tiny_pipeline, 3, 2.5)
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    for name in ("inputs", "outputs"):
        save_file({"hidden_states": made.latents}, exchange / f"{name}.safetensors")

    def refused(why: str) -> None:
        with pytest.raises(RefusedError, match=why):
            runner.call("sample", tmp_path / "plan", exchange, COMPUTE(lambda: 1), tmp_path / "video")

    save_plan(made, tmp_path / "plan")
    refused("a model with other inputs")
    others = {"timestep": np.zeros(2, np.float32), "encoder_hidden_states": made.condition}
    save_file({"hidden_states": np.array(0, np.float32), **others}, exchange / "inputs.safetensors")
    refused("as many extents as the model's hidden_states, 0")
    save_file({"hidden_states": made.latents}, exchange / "inputs.safetensors")
    for change, why in (
        ({"gain": made.gain[:2]}, "steps do not have one length"),
        ({"latents": np.repeat(made.latents, 2, 0)}, "latents are no single video"),
        ({"condition": made.condition[0]}, "whose prompt is none"),
        ({"reference": made.condition}, "whose reference is another video"),
    ):
        save_plan(dataclasses.replace(made, **change), tmp_path / "plan")
        refused(why)
    save_file({"latents": made.latents}, tmp_path / "plan")
    refused("no format in its metadata")
    save_file({"latents": made.latents}, tmp_path / "plan", metadata={"format": "qvdit-plan-2"})
    refused("a plan of the format qvdit-plan-2")
    save_file({"latents": made.latents}, tmp_path / "plan", metadata={"format": FORMAT})
    refused("without timesteps")


# Devices and tools ---------------------------------------------------------------------------------------------------


def test_devices():
    orin, thor = devices.find_device("orin"), devices.find_device("thor")
    assert (orin.jetpack, orin.tensorrt, orin.architecture, orin.machine) == ("6.2", "10.3", "87", "aarch64")
    assert (thor.jetpack, thor.tensorrt, thor.architecture, thor.machine) == ("7.0", "10.13", "110", "aarch64")
    assert devices.find_device("orin", "6.0").tensorrt == "8.6"
    assert devices.find_device("local").architecture is None


@pytest.mark.parametrize(
    ("name", "jetpack", "words"),
    [
        ("cuda", None, ("'cuda'", "orin, thor, local", "--compute")),
        ("orin", "5.1", ("'5.1'", "6.0, 6.1, 6.2")),
        ("local", "6.0", ("--device local", "no Jetson")),
    ],
)
def test_devices_that_are_none(name, jetpack, words):
    with pytest.raises(QvditError) as caught:
        devices.find_device(name, jetpack)
    assert all(word in str(caught.value) for word in words)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An nvcc and a cross compiler that only say who they are, headers of 10.3 and 10.13, and a runtime library."""
    bin_folder = tmp_path / "cuda" / "bin"
    bin_folder.mkdir(parents=True)

    def nvcc(version: str, codes: str = "sm_87 sm_110") -> None:
        script = (
            f'#!/bin/sh\ncase "$*" in\n*version*) echo "release {version}, V{version}.1" ;;\n'
            f'*list*) printf "%s\\n" {codes} ;;\n*) echo "#$ _HERE_={bin_folder}" >&2 ;;\nesac\n'
        )
        (bin_folder / "nvcc").write_text(script)
        (bin_folder / "nvcc").chmod(0o755)

    nvcc("12.6")
    monkeypatch.setenv("CUDACXX", str(bin_folder / "nvcc"))
    headers = []
    for major, minor in ((10, 3), (10, 13)):
        folder = tmp_path / f"{major}.{minor}"
        folder.mkdir()
        text = f"#define NV_TENSORRT_MAJOR {major} //!<\n#define NV_TENSORRT_MINOR {minor}\n"
        (folder / "NvInferVersion.h").write_text(text)
        headers.append(str(folder))
    monkeypatch.setenv("QVDIT_TENSORRT_INCLUDES", ":".join(headers))
    for name in (cross.COMPILER, "cmake"):
        (bin_folder / name).write_text("#!/bin/sh\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    library = tmp_path / "libcudart_static.a"
    library.touch()
    monkeypatch.setenv("QVDIT_CUDART_AARCH64", str(library))
    return nvcc


def find(name: str, jetpack: str | None = None, own: str | None = None) -> cross.Toolchain:
    return cross.find_toolchain(devices.find_device(name, jetpack), own, "x86_64")


def test_tools_are_found(tools, tmp_path):
    found = find("orin")
    assert found.describe() == "nvcc 12.6, sm_87, TensorRT 10.3"
    assert (found.compiler, found.cudart) == (cross.COMPILER, tmp_path / "libcudart_static.a")
    local = cross.find_toolchain(dataclasses.replace(devices.find_device("local"), machine="x86_64"), "87", "x86_64")
    assert (local.compiler, local.cudart, local.tensorrt_version) == (None, None, "10.3")


def test_missing_tools_are_named(tools, monkeypatch, tmp_path):
    def missing(*device: Any) -> str:
        with pytest.raises(cross.MissingToolError) as caught:
            find(*device)
        return str(caught.value)

    assert "not of 8.6" in missing("orin", "6.0")
    tools("13.0")
    assert "nvcc 13.0 makes code for a newer driver than that of JetPack 6.2" in missing("orin")
    assert find("thor").describe() == "nvcc 13.0, sm_110, TensorRT 10.13"
    tools("12.6", "sm_87")
    assert "nvcc 12.6, which does not know sm_110" in missing("thor")
    assert "no GPU here" in missing("local")
    monkeypatch.setenv("QVDIT_CUDART_AARCH64", str(tmp_path / "none"))
    assert f"no {tmp_path / 'none'}" in missing("orin")
    monkeypatch.delenv("QVDIT_CUDART_AARCH64")
    assert "libcudart_static.a for aarch64" in missing("orin")
    (tmp_path / "cuda" / "bin" / cross.COMPILER).unlink()
    monkeypatch.setattr(cross, "COMPILER", "no-such-compiler")
    assert "no no-such-compiler" in missing("orin")
    monkeypatch.setenv("PATH", str(tmp_path / "cuda" / "bin"))
    (tmp_path / "cuda" / "bin" / "cmake").unlink()
    assert missing("orin") == "no cmake"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("QVDIT_TENSORRT_INCLUDES", str(tmp_path))
    assert missing("local", None, "87").endswith("with headers of TensorRT none")
    monkeypatch.delenv("QVDIT_TENSORRT_INCLUDES")
    assert "no headers of TensorRT 10.3: name their folder by QVDIT_TENSORRT_INCLUDES" in missing("orin")
    monkeypatch.setenv("CUDACXX", "/no/nvcc")
    assert missing("orin") == "no /no/nvcc"


@pytest.mark.parametrize("version", VERSIONS)
def test_plugin_and_runner_compile_for_aarch64(version, tmp_path):
    """Their C++, syntax and types; kernels need nvcc, and the whole plugin is test_the_plugin_is_cross_compiled."""
    compiler, include, toolkit = shutil.which(cross.COMPILER), includes().get(version), cuda_include()
    if compiler is None or include is None or toolkit is None:
        pytest.skip(f"NO {cross.COMPILER} OR NO HEADERS OF TENSORRT {version} OR CUDA: NOTHING IS COMPILED FOR AARCH64")
    sources = [source for source in RUNNER.glob("*.cc") if source.stem not in CORE]
    for name, files in (("plugin", sorted(PLUGIN.glob("*.cc"))), ("runner", sorted(sources))):
        if name == "runner" and not (include / "NvOnnxParser.h").is_file():
            continue
        whole = [str(file) for file in files]
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        command = [compiler, *flags, "-isystem", str(include), "-isystem", str(toolkit), *whole]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "jetpack"), [("orin", "6.0"), ("orin", "6.2"), ("thor", "7.0")])
def test_the_plugin_is_cross_compiled(name, jetpack, tmp_path):
    """With real tools, named as export/cross.py says: a minute each."""
    try:
        found = find(name, jetpack)
    except cross.MissingToolError as reason:
        pytest.skip(f"NO PLUGIN IS CROSS-COMPILED FOR {name}, JETPACK {jetpack}: {reason}")
    library = tmp_path / LIBRARY
    cross.compile_plugin(found, SOURCES, library)
    content = library.read_bytes()
    assert content[:4] == b"\x7fELF"
    assert int.from_bytes(content[18:20], "little") == 183  # aarch64
    assert f"qvdit LowBitLinear 4 for TensorRT {found.tensorrt_version}.".encode() in content
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listed.splitlines() if " U " in line and "@" not in line}
    assert names == {"getPluginRegistry", "getLogger"}  # TensorRT's, nothing of CUDA


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bundle(tmp_path):
    """A bundle with a little in every file that goes into the folder."""
    folder = tmp_path / "bundle"
    names = [
        "quantized/config.json",
        "quantized/model.safetensors",
        "onnx/model.ort.onnx",
        "tensorrt/model.onnx",
        "tensorrt/model.onnx.data",
        "tensorrt/layers.onnx",
        "parity/inputs.safetensors",
        "parity/reference.safetensors",
        "work/large",
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    strings = ("model", "source", "family", "class_name", "recipe", "bits", "target")
    held: dict[str, Any] = {name: name for name in strings} | {"frames": 1}
    write_manifest(folder, Manifest(**held, source_config={}, inputs={}, versions={}, files={}))
    return folder


def contents(**changes: Any) -> edge.EdgeContents:
    missing = cross.MissingToolError("no nvcc")
    return dataclasses.replace(edge.EdgeContents(devices.find_device("orin"), SOURCES, missing, None), **changes)


def test_the_folder_is_complete(small_bundle, tmp_path):
    made = tmp_path / "edge"
    edge.export_edge(small_bundle, contents(), made)
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    files = verify(made).files
    assert set(files) == found - {"manifest.json"}
    assert all(sha256(made / name) == digest for name, digest in files.items())
    assert "work/large" not in found
    kernels = {f"csrc/{path.relative_to(SOURCES)}" for path in SOURCES.rglob("*") if path.suffix in {".cu", ".cuh"}}
    needed = {"build.sh", DEVICE, "tensorrt/model.onnx.data", "csrc/CMakeLists.txt", "csrc/tensorrt/exports.map"}
    needed |= {"csrc/tensorrt/plugin.cmake", "csrc/runner/runner.cmake", "csrc/runner/main.cc"} | kernels
    assert needed <= found
    about = read_json(made / DEVICE, "")
    assert (about["device"], about["jetpack"], about["plugin"], about["missing"]) == ("orin", "6.2", None, "no nvcc")
    assert (made / "build.sh").stat().st_mode & 0o111
    # Whatever CMake names is there.
    for line in (made / "csrc" / "runner" / "runner.cmake").read_text().splitlines():
        if "${here}/" in line:
            assert f"csrc/runner/{line.split('/')[-1].rstrip(')')}" in found


def test_the_same_export_gives_the_same_bytes(small_bundle, tmp_path, tiny_pipeline):
    made = planned(tiny_pipeline, 3, 2.5)
    for name in ("a", "b"):
        edge.export_edge(small_bundle, contents(plan=made), tmp_path / name)
    assert SAMPLING_PLAN in verify(tmp_path / "a").files
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_an_export_that_fails_leaves_the_old_folder(small_bundle, tmp_path, monkeypatch):
    made = tmp_path / "edge"
    edge.export_edge(small_bundle, contents(), made)
    before = (made / "manifest.json").read_bytes()
    (small_bundle / "tensorrt" / "model.onnx").write_text("another")

    def fail(*_: Any) -> None:
        raise QvditError("a plugin that does not compile", "…", "…")

    monkeypatch.setattr(edge, "compile_plugin", fail)
    tools_found = cross.Toolchain(Path("nvcc"), "12.6", Path("include"), "10.3", "87", None, None)
    with pytest.raises(QvditError, match="does not compile"):
        edge.export_edge(small_bundle, contents(tools=tools_found), made)
    assert (made / "manifest.json").read_bytes() == before
    assert verify(made)
    monkeypatch.setattr(edge, "compile_plugin", lambda tools, sources, library: library.write_text("plugin"))
    edge.export_edge(small_bundle, contents(tools=tools_found), made)
    assert (made / LIBRARY).read_text() == "plugin"
    assert read_json(made / DEVICE, "")["plugin"] == "nvcc 12.6, sm_87, TensorRT 10.3"
    assert (made / "tensorrt" / "model.onnx").read_text() == "another"
    assert not list(tmp_path.glob(".edge*"))


def script(folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    variables = {"PATH": "/usr/bin:/bin", **environment}
    command = ["bash", str(folder / "build.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd="/")
    return done.returncode, done.stdout, done.stderr


def test_the_script_verifies_the_folder(small_bundle, tmp_path):
    made = tmp_path / "edge"
    edge.export_edge(small_bundle, contents(), made)
    assert script(made, "verify") == (0, f"verified {len(verify(made).files)} files\n", "")
    (made / "tensorrt" / "model.onnx").write_text("tensorrt/model.onnX")
    for words in (("verify",), ()):
        code, _, stderr = script(made, *words)
        assert code == 2
        assert stderr.splitlines() == [
            "error: got tensorrt/model.onnx that is missing or not what manifest.json says; "
            "expected every file as it was exported; copy the whole folder again"
        ]
    with pytest.raises(QvditError, match="sha256"):
        verify(made)
    (made / "tensorrt" / "model.onnx").unlink()
    assert script(made, "verify")[0] == 2
    (made / "manifest.json").unlink()
    code, _, stderr = script(made, "verify")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "got no manifest.json" in stderr


def test_the_script_says_what_is_missing(small_bundle, tmp_path):
    made = tmp_path / "edge"
    edge.export_edge(small_bundle, contents(), made)
    code, _, stderr = script(made, "fast")
    assert (code, stderr) == (
        2,
        "error: got the argument fast; expected verify, or none; see the first lines of build.sh\n",
    )
    if Path("/usr/include/NvInfer.h").exists() or list(Path("/usr/include").glob("*-linux-gnu/NvInfer.h")):
        return
    code, _, stderr = script(made)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "got no NvInfer.h; expected TensorRT's headers; apt install libnvinfer-dev" in stderr


def test_a_later_fp16_run_goes_along(make_job, tmp_path, monkeypatch):
    job = make_job(tmp_path / "out", target="tensorrt", device="orin")
    made = []

    def note(bundle: Path, contents: Any, folder: Path) -> None:
        made.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").touch()

    monkeypatch.setattr(edge, "export_edge", note)
    monkeypatch.setattr(type(job), "_sampling_plan", lambda self: None)
    monkeypatch.setattr(job.stages, "result", lambda name: name)
    for count in (1, 1):
        job.edge(None)
        assert len(made) == count
    (job.out / PARITY_HALF).parent.mkdir()
    (job.out / PARITY_HALF).touch()
    job.edge(None)
    assert len(made) == 2
