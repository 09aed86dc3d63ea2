"""Engines are built, proven, kept and refused as promised: with a stand-in for TensorRT, on the CPU."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import DataType, Fake, FakeDriver, Layer, LayerType, Network, Tensor

import qvdit.runtimes
from qvdit.contract import QvditError
from qvdit.contract.bundle import ENGINE, ENGINE_FACTS, ENGINE_PARITY, read_manifest, write_manifest
from qvdit.contract.parity import load_reference, save_half
from qvdit.contract.plan import SamplingPlan, save_plan
from qvdit.runtimes.tensorrt import __main__ as command
from qvdit.runtimes.tensorrt import device, plugin, versions
from qvdit.runtimes.tensorrt import sample as sampling
from qvdit.runtimes.tensorrt.build import BuildOptions, build_engine, make_profile
from qvdit.runtimes.tensorrt.log import logger
from qvdit.runtimes.tensorrt.parity import failures
from qvdit.runtimes.tensorrt.session import TensorRtSession
from qvdit.system import tensorrt_parts

BUILT_FOR = b"\x7fELF\0qvdit LowBitLinear 4 for TensorRT %s\0"
OF_ANOTHER_VERSION = BUILT_FOR.replace(b"Linear 4", b"Linear 1") % b"8.6.0"


@pytest.fixture(scope="session")
def tensorrt_bundle(shared: Any, make_job: Any) -> Path:
    """A tiny w4a8 bundle for TensorRT, up to its parity files."""
    return shared("tensorrt-bundle", lambda out: make_job(out, target="tensorrt").run("parity"))


@pytest.fixture
def exported(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it, with a plugin beside where its engine goes."""
    ignored = shutil.ignore_patterns("work")
    folder = Path(shutil.copytree(tensorrt_bundle, tmp_path / "bundle", ignore=ignored))
    (folder / "tensorrt" / plugin.LIBRARY).write_bytes(BUILT_FOR % b"8.6.0")
    return folder


def build(bundle: Path, **options: Any) -> Any:
    return build_engine(bundle, BuildOptions(**options), say=lambda text: None)


def kept_files(bundle: Path) -> dict[str, bytes]:
    return {name: (bundle / name).read_bytes() for name in (ENGINE, ENGINE_FACTS, ENGINE_PARITY)}


def test_engine_is_built_and_proven(trt: Fake, exported: Path) -> None:
    built = build(exported, workspace=1 << 20, optimization_level=2)
    result = json.loads((exported / ENGINE_PARITY).read_text())
    assert result["layers_compared"] == len(load_reference(exported).layers)
    assert result["xq_compared"] > 0
    assert result["acc_compared"] > 0
    assert result["xq_mismatches"] == result["acc_mismatches"] == 0
    assert built.facts.gpu == "Fake GPU"
    assert [path.stem for path in trt.builds] == ["model", "layers"]
    assert list(trt.configs[0].pools.values()) == [1 << 20]
    assert [config.builder_optimization_level for config in trt.configs] == [2, 0]
    assert (exported / "tensorrt" / "timing.cache").is_file()
    assert not list(exported.rglob("*.new"))


def test_session_runs_the_engine(trt: Fake, gpu: FakeDriver, exported: Path) -> None:
    build(exported)
    saved = load_reference(exported)
    with TensorRtSession.of_bundle(exported) as session:
        first, second = (session.infer(saved.inputs) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - saved.quantized).max() < 0.05
    assert not gpu.blocks, "memory that was not given back"


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_pytorchs_tensors_are_read_where_they_are(
    cuda_graph: bool, built: Path, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's tensors in the part of the GPU's. Of a CUDA graph, whose addresses stay, they are copied."""
    waits: list[int] = []
    monkeypatch.setattr(gpu, "cuStreamWaitEvent", lambda stream, *_: waits.append(stream.value) or 0, raising=False)
    monkeypatch.setattr(torch, "device", lambda kind, index: "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: SimpleNamespace(cuda_stream=99))
    inputs = load_reference(built).inputs
    with TensorRtSession.of_bundle(built, cuda_graph=cuda_graph) as session:
        expected = session.infer(inputs)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        waits.clear()
        (found,) = session._infer_torch(tensors).values()
        read = {name: session._context.addresses[name] for name in inputs}
        own = session._stream.handle
    np.testing.assert_array_equal(found.numpy(), expected)
    in_place = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert (read == in_place) == (not cuda_graph)
    assert waits == [own, 99]  # ours waits for theirs, and theirs for ours


def test_the_engine_takes_the_transformers_place(built: Path) -> None:
    saved = load_reference(built)
    transformer = qvdit.runtimes.load(built, device="cuda", engine="tensorrt")
    (output,) = transformer(**saved.inputs, return_dict=False)
    assert np.abs(np.asarray(output) - saved.quantized).max() < 0.05


@pytest.mark.parametrize("failure", ["parse", "build", "context", "execute"])
def test_a_failed_build_leaves_the_good_engine(failure: str, trt: Fake, exported: Path) -> None:
    build(exported)
    before = kept_files(exported)
    trt.fail.add(failure)
    with pytest.raises(QvditError) as error:
        build(exported)
    assert "\n" not in str(error.value)
    assert kept_files(exported) == before


@pytest.mark.parametrize(("field", "value"), [("noise", 1.0), ("noise", np.nan), ("wrong_integers", 1)])
def test_an_engine_that_fails_parity_takes_no_place(field: str, value: float, trt: Fake, exported: Path) -> None:
    build(exported)
    before = kept_files(exported)
    setattr(trt, field, value)
    with pytest.raises(QvditError, match="fails parity"):
        build(exported)
    assert kept_files(exported) == before


@pytest.mark.parametrize(("away", "passes"), [(1.0, True), (1.5, True), (0.8, False)])
def test_pytorchs_fp16_run_is_the_measure_where_it_is_there(
    away: float, passes: bool, trt: Fake, exported: Path
) -> None:
    """away: that run's error against full precision, in that of the float32 run."""
    saved = load_reference(exported)
    output = saved.full + np.float32(away) * (saved.quantized - saved.full)
    save_half(exported, output)
    said: list[str] = []
    if passes:
        build_engine(exported, BuildOptions(), say=said.append)
        result = json.loads((exported / ENGINE_PARITY).read_text())
        assert result["half_error_ratio"] * away == pytest.approx(result["error_ratio"], rel=1e-3)
        assert result["error_half"] == pytest.approx(away * result["error_reference"], rel=1e-3)
        assert (result["half_rel_err"] < 1e-3) == (away == 1)
        assert any("PyTorch's FP16 run" in text for text in said)
    else:
        with pytest.raises(QvditError, match="PyTorch's FP16 run"):
            build(exported)


def test_a_graph_in_bf16(trt: Fake, exported: Path) -> None:
    """TensorRT 8.6 has no such type; from 10 on PyTorch's run of the same is the measure."""
    write_manifest(exported, dataclasses.replace(read_manifest(exported), precision="bf16"))
    with pytest.raises(QvditError, match=r"BF16 for TensorRT 8\.6\.0; expected TensorRT 10.*--precision bf16"):
        build(exported)
    saved = load_reference(exported)
    save_half(exported, saved.quantized)
    trt.__version__ = "10.3.0"
    (exported / "tensorrt" / plugin.LIBRARY).write_bytes(BUILT_FOR % b"10.3.0")
    said: list[str] = []
    build_engine(exported, BuildOptions(), say=said.append)
    assert any("PyTorch's BF16 run" in text for text in said)


def test_an_engine_without_the_quantized_models_error_is_another_model() -> None:
    """Whatever PyTorch's FP16 run is: such an engine would pass as a very good one."""
    result = {"layers": [], "error_ratio": 0.01, "half_error_ratio": 0.01}
    assert any("0.01" in found and "float32" in found for found in failures(result))
    assert not failures(result | {"error_ratio": 0.95})
    assert failures(result | {"error_ratio": 0.95, "half_error_ratio": 1.2})


def layer(kind: LayerType, inputs: list[Tensor], name: str, dtype: DataType = DataType.FLOAT, **own: Any) -> Layer:
    """A layer with one output; own: what its class knows of it."""
    made = Layer(kind, inputs, [Tensor(name, dtype)], name)
    vars(made).update(own)
    return made


def typed_network() -> Network:
    """8.6 calls every floating-point tensor FLOAT, whatever is cast to it."""
    network = Network(1)
    network.inputs = [Tensor("x", DataType.FLOAT)]
    make = network.layers.append
    make(layer(LayerType.CAST, network.inputs, "half", to_type=DataType.HALF))
    make(layer(LayerType.CONSTANT, [], "weight", weights=np.zeros(2, np.float16)))
    made = {done.name: done.outputs[0] for done in network.layers}
    make(layer(LayerType.MATRIX_MULTIPLY, [made["half"], made["weight"]], "product"))
    make(layer(LayerType.ELEMENTWISE, [network.layers[-1].outputs[0], made["half"]], "less", DataType.BOOL))
    make(layer(LayerType.ELEMENTWISE, [Tensor("x", DataType.FLOAT)] * 2, "sum"))
    make(layer(LayerType.SHUFFLE, [made["half"]], "moved half"))
    make(layer(LayerType.SHUFFLE, network.inputs, "moved float"))
    plugin_outputs = [Tensor("y", DataType.FLOAT), Tensor("scale", DataType.FLOAT), Tensor("acc", DataType.INT32)]
    make(Layer(LayerType.PLUGIN_V2, [made["half"]], plugin_outputs, "plugin"))
    modulated = [*network.inputs, Tensor("modulation", DataType.FLOAT), Tensor("words", DataType.INT32)]
    make(Layer(LayerType.PLUGIN_V2, modulated, [Tensor("y normed", DataType.HALF)], "plugin with a LayerNorm"))
    exact = [*network.inputs, Tensor("words", DataType.INT32)]
    make(Layer(LayerType.PLUGIN_V2, exact, [Tensor("y exact", DataType.FLOAT)], "plugin of a float32 x"))
    attended = [*plugin_outputs[:1], made["half"], made["half"]]
    make(Layer(LayerType.PLUGIN_V2, attended, [Tensor("y attended", DataType.HALF)], "attention"))
    make(Layer(LayerType.PLUGIN_V2, attended[:1], [Tensor("y packed", DataType.HALF)], "attention of one product"))
    summed = [*network.inputs, *plugin_outputs[:1], Tensor("gate", DataType.FLOAT)]
    make(Layer(LayerType.PLUGIN_V2, summed, [Tensor("y summed", DataType.FLOAT)], "residual sum"))
    make(layer(LayerType.CAST, plugin_outputs[:1], "back", to_type=DataType.FLOAT))
    make(layer(LayerType.QUANTIZE, [made["half"]], "q", DataType.INT8))
    make(layer(LayerType.DEQUANTIZE, [network.layers[-1].outputs[0]], "dq"))
    make(layer(LayerType.MATRIX_MULTIPLY, [network.layers[-1].outputs[0]] * 2, "int8"))
    make(layer(LayerType.ELEMENTWISE, [network.layers[-1].outputs[0]] * 2, "after"))
    return network


def test_types_of_a_weakly_typed_network_are_the_graphs() -> None:
    half, single = DataType.HALF, DataType.FLOAT
    expected = {"x": single, "half": half, "weight": half, "product": half, "less": DataType.BOOL, "sum": single}
    expected |= {"y": half, "scale": single, "acc": DataType.INT32, "back": single, "q": DataType.INT8, "dq": single}
    expected |= {"int8": single, "after": single, "moved half": half, "moved float": single}
    expected |= {"y normed": half, "y exact": single, "y attended": half, "y packed": half, "y summed": single}
    assert versions.tensor_types(Fake(), typed_network()) == expected


def test_weakly_typed_layers_get_their_tensors_types() -> None:
    network = typed_network()
    assert versions.type_layers(Fake(), network) == 5
    told = {made.name: (made.precision, made.output_types) for made in network.layers if made.precision}
    assert told == {
        "product": (DataType.HALF, {0: DataType.HALF}),
        "less": (DataType.HALF, {}),
        "sum": (DataType.FLOAT, {0: DataType.FLOAT}),
        "after": (DataType.FLOAT, {0: DataType.FLOAT}),
        "moved float": (DataType.FLOAT, {0: DataType.FLOAT}),
    }


def test_types_that_cannot_be_obeyed_are_wishes(trt: Fake, exported: Path) -> None:
    trt.fail.add("strict")
    said: list[str] = []
    build_engine(exported, BuildOptions(), say=said.append)
    assert any("no implementation obeys" in text for text in said)
    flags = [config.flags for config in trt.configs]
    assert all(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS in found for found in flags)
    assert not any(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS in found for found in flags)


@pytest.mark.parametrize("fixed", [False, True])
def test_extents_that_do_not_vary_are_constant(fixed: bool, trt: Fake, exported: Path) -> None:
    build(exported, fixed=fixed)
    example = {name: value.shape for name, value in load_reference(exported).inputs.items()}
    if not fixed:
        example = {name: (-1, *shape[1:]) for name, shape in example.items()}
        example["encoder_hidden_states"] = (-1, -1, example["encoder_hidden_states"][2])
    assert trt.shapes[0] == example
    with TensorRtSession.of_bundle(exported) as session:
        assert (session.profile["timestep"][0] == session.profile["timestep"][2]) == fixed


def test_profile_spans_the_sizes_asked_for_and_the_example() -> None:
    inputs = {"hidden_states": ["batch", 4, 8, "height", "width"], "encoder_hidden_states": ["batch", "text_tokens", 3]}
    example = {"hidden_states": (2, 4, 8, 16, 16), "encoder_hidden_states": (2, 7, 3)}
    profile = make_profile(inputs, example, BuildOptions(video_sizes=((32, 24), (8, 64))))
    assert profile["hidden_states"] == [[1, 4, 8, 8, 16], [2, 4, 8, 32, 24], [2, 4, 8, 32, 64]]
    assert profile["encoder_hidden_states"] == [[1, 1, 3], [2, 7, 3], [2, 512, 3]]


# What a session refuses -----------------------------------------------------------------------------------------------


def edit_facts(bundle: Path, **changes: Any) -> None:
    path = bundle / ENGINE_FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def built(trt: Fake, exported: Path) -> Path:
    build(exported)
    return exported


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensorrt": "10.3.0"}, ("an engine of TensorRT 10.3.0", "8.6.0")),
        ({"gpu": "Orin", "compute": "8.7"}, ("an engine for Orin (sm 8.7)", "Fake GPU (sm 9.0)")),
        ({"onnx_sha256": {}}, ("another model",)),
        ({"plugin_version": "0"}, ("version 4 of the plugin", "version 0")),
        ({"engine_sha256": "0"}, ("damaged",)),
        ({"format": 0}, ("another version",)),
    ],
)
def test_an_engine_that_does_not_belong_here(changes: Any, words: tuple[str, ...], built: Path) -> None:
    edit_facts(built, **changes)
    with pytest.raises(QvditError) as error:
        TensorRtSession.of_bundle(built)
    assert all(word in str(error.value) for word in words), error.value
    assert "build" in error.value.fix


def test_a_truncated_engine(built: Path) -> None:
    engine = built / ENGINE
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(QvditError, match="damaged"):
        TensorRtSession.of_bundle(built)


def test_an_engine_that_tensorrt_refuses(gpu: FakeDriver, trt: Fake) -> None:
    with pytest.raises(QvditError, match=r"refuses .magic tag does not match"):
        TensorRtSession(b"nonsense", device.Device())


def test_no_engine(trt: Fake, exported: Path) -> None:
    with pytest.raises(QvditError, match=r"no file .*model\.plan.*qvdit engine"):
        TensorRtSession.of_bundle(exported)


def test_wrong_inputs(built: Path) -> None:
    saved = load_reference(built).inputs
    with TensorRtSession.of_bundle(built) as session:
        with pytest.raises(QvditError, match="pass exactly these"):
            session.infer({"x": saved["timestep"]})
        with pytest.raises(QvditError, match=r"timestep of shape \[3\]; expected \[1…2\]"):
            session.infer(saved | {"timestep": np.zeros(3, np.float32)})


def test_more_memory_than_the_gpu_has(built: Path, gpu: FakeDriver) -> None:
    gpu.memory = 16
    with (
        TensorRtSession.of_bundle(built) as session,
        pytest.raises(QvditError, match=r"out of memory.*free GPU memory"),
    ):
        session.infer(load_reference(built).inputs)


def test_no_room_for_the_engine(built: Path, trt: Fake) -> None:
    trt.fail.add("deserialize")
    with pytest.raises(device.OutOfMemoryError, match=r"no room for the engine .*bytes of free GPU memory"):
        TensorRtSession.of_bundle(built)


def test_no_room_for_a_context(built: Path, trt: Fake) -> None:
    trt.fail.add("context")
    with pytest.raises(QvditError, match="no room"):
        TensorRtSession.of_bundle(built)


@pytest.mark.parametrize("node", plugin.NODES)
def test_what_the_plugin_refused_comes_first(node: str, trt: Fake) -> None:
    log = logger()
    for text in ("TensorRT's", "many", "lines", f'{node} "blocks.0": got\nfive heads'):
        log.log(trt.ILogger.Severity.ERROR, text)
    assert log.why() == f'{node} "blocks.0": got five heads'
    assert log.why() == "TensorRT gave no reason"


# Plugin and machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BUILT_FOR % b"10.3.0", "built for TensorRT 10.3.0"),
        (b"\x7fELF", "a build of the LowBitLinear plugin"),
        (b"", "a build of the LowBitLinear plugin"),
        (OF_ANOTHER_VERSION, "version 1 of the plugin"),
    ],
)
def test_a_plugin_that_does_not_fit(content: bytes, words: str, trt: Fake, exported: Path) -> None:
    (exported / "tensorrt" / plugin.LIBRARY).write_bytes(content)
    with pytest.raises(QvditError, match=words):
        build(exported)


def test_no_plugin(trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (exported / "tensorrt" / plugin.LIBRARY).unlink()
    monkeypatch.setattr(plugin, "_PLACES", ())
    with pytest.raises(QvditError, match="LowBitLinear plugin; build it"):
        build(exported)
    monkeypatch.setenv(plugin.VARIABLE, "/no/such.so")
    with pytest.raises(QvditError, match=r"no file /no/such\.so"):
        build(exported)


def test_a_plugin_that_registers_nothing(trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_load", lambda path: None)
    with pytest.raises(QvditError, match="registers no LowBitLinear"):
        build(exported)


def test_the_doctor_names_version_and_plugin(trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, str(exported / "tensorrt" / plugin.LIBRARY))
    first, second = tensorrt_parts()
    assert first == "tensorrt 8.6.0"
    assert str(exported / "tensorrt" / plugin.LIBRARY) in second
    assert "for TensorRT 8.6.0" in second
    monkeypatch.setenv(plugin.VARIABLE, "/no/such.so")
    assert tensorrt_parts() == [first]


def test_a_bundle_for_another_target(trt: Fake, bundle: Path) -> None:
    with pytest.raises(QvditError, match="--target tensorrt"):
        build(bundle)


@pytest.mark.parametrize("content", [b"other", b"damaged"])
def test_a_timing_cache_that_is_of_no_use_is_replaced(content: bytes, trt: Fake, exported: Path) -> None:
    cache = exported / "timing"
    cache.write_bytes(content)
    build(exported, timing_cache=cache)
    assert set(cache.read_bytes().split()) - {content} == {b"model", b"layers"}


def test_a_timing_cache_keeps_what_others_measured_meanwhile(
    trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = exported / "timing"
    read = versions.timing_cache

    def and_another_build_ends(config: Any, content: bytes) -> bool:
        used = read(config, content)
        cache.write_bytes(content + b" elsewhere")
        return used

    monkeypatch.setattr(versions, "timing_cache", and_another_build_ends)
    build(exported, timing_cache=cache)
    assert set(cache.read_bytes().split()) == {b"model", b"layers", b"elsewhere"}


# Killed between two renames -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_an_installation_that_was_cut_short(
    done: int, trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is killed: the old engine whole, or the new one once somebody looks."""
    build(exported)
    before = kept_files(exported)
    trt.noise = 1e-5  # another engine
    left = iter(range(done))
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".new" and next(left, None) is None:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    if done < 3:
        with pytest.raises(KeyboardInterrupt):
            build(exported, optimization_level=1)
    else:
        build(exported, optimization_level=1)
    monkeypatch.setattr(Path, "replace", rename)
    with TensorRtSession.of_bundle(exported):
        pass
    facts = json.loads((exported / ENGINE_FACTS).read_text())
    if done == 0:
        assert kept_files(exported) == before
    else:
        assert facts["optimization_level"] == 1
        assert (exported / ENGINE_PARITY).read_bytes() != before[ENGINE_PARITY]
        assert not list(exported.rglob("*.new"))


def test_an_installation_that_cannot_be_finished_says_what_to_do(
    trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(exported)
    facts = exported / ENGINE_FACTS
    shutil.copy(facts, f"{facts}.new")
    monkeypatch.setattr(Path, "replace", lambda path, target: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(QvditError, match=r"cut short.*rename .*engine\.json\.new to"):
        TensorRtSession.of_bundle(exported)


@pytest.mark.parametrize("content", ["{}", "cut sho"])
def test_an_installation_of_another_version_does_not_stop_a_build(content: str, trt: Fake, exported: Path) -> None:
    build(exported)
    left = exported / f"{ENGINE_FACTS}.new"
    left.write_text(content)
    with TensorRtSession.of_bundle(exported):
        pass
    build(exported, optimization_level=1)
    assert not left.exists()


def test_a_batch_of_none_is_refused() -> None:
    for fixed in (False, True):
        with pytest.raises(QvditError, match="--batch 0"):
            make_profile({"x": ["batch"]}, {"x": [2]}, BuildOptions(batch=0, fixed=fixed))


def test_a_place_that_cannot_be_written_is_refused_before_the_build(trt: Fake, exported: Path) -> None:
    with pytest.raises(QvditError, match="which cannot be written"):
        build(exported, timing_cache=exported)
    assert not trt.builds


def test_the_systems_errors_are_one_line(
    trt: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.plan")

    monkeypatch.setattr("qvdit.runtimes.tensorrt.build.install", full)
    assert command.main([str(exported)]) == 2
    assert capsys.readouterr().err.startswith("error: got No space left on device model.plan; expected files")


def test_no_gpu_and_no_tensorrt(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    versions.tensorrt.cache_clear()
    with pytest.raises(QvditError, match="TensorRT"):
        build(exported)


# Programs: a line, status 2, and the engine that was there as it was --------------------------------------------------


def refused(main: Any, arguments: list[Any], capsys: pytest.CaptureFixture[str], words: str) -> None:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: got ")
    assert line.count("\n") == 1
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no TensorRT", "no TensorRT"),
        ("no GPU", "cuda:0; expected one of the 0 GPUs"),
        ("another plugin", "version 1 of the plugin"),
        ("memory for the build", "out of memory.*enough GPU memory"),
        ("memory for the engine", "no room for the engine"),
        ("memory to run", "no room to run"),
    ],
)
def test_a_build_that_is_refused(
    case: str, words: str, trt: Fake, gpu: FakeDriver, built: Path, monkeypatch: Any, capsys: Any
) -> None:
    before = kept_files(built)
    if case == "no TensorRT":
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        versions.tensorrt.cache_clear()
    elif case == "no GPU":
        gpu.devices = 0
    elif case == "another plugin":
        (built / "tensorrt" / plugin.LIBRARY).write_bytes(OF_ANOTHER_VERSION)
    else:
        trt.fail.add({"build": "memory", "engine": "deserialize", "run": "context"}[case.split()[-1]])
    refused(command.main, [built], capsys, words)
    assert kept_files(built) == before


def test_the_command_builds_and_refuses(trt: Fake, exported: Path, cli: Any) -> None:
    code, out, err = cli("qvdit", "engine", exported, "--fixed", "--optimization-level", "0")
    assert code == 0, err
    assert "parity" in out + err
    before = kept_files(exported)
    trt.fail.add("memory")
    code, _, err = cli("qvdit", "engine", exported)
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error: got ")][-1].count("out of memory") == 1
    assert kept_files(exported) == before


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no GPU", "cuda:0; expected one of the 0 GPUs"),
        ("another plugin", "version 1 of the plugin"),
        ("truncated engine", "damaged"),
        ("another GPU", r"an engine for Orin \(sm 8.7\)"),
        (
            "another size",
            r"hidden_states of shape \[2, \d+, \d+, \d+, \d+\]; expected \[.*for which the engine was built",
        ),
        ("memory for the engine", "no room for the engine"),
        ("memory to run", "out of memory"),
    ],
)
def test_sampling_that_is_refused(
    case: str, words: str, trt: Fake, gpu: FakeDriver, built: Path, tmp_path: Path, capsys: Any
) -> None:
    inputs = load_reference(built).inputs
    latents, step = inputs["hidden_states"][:1], np.ones(1, np.float32)
    if case == "no GPU":
        gpu.devices = 0
    elif case == "another plugin":
        (built / "tensorrt" / plugin.LIBRARY).write_bytes(OF_ANOTHER_VERSION)
    elif case == "truncated engine":
        (built / ENGINE).write_bytes((built / ENGINE).read_bytes()[:-1])
    elif case == "another GPU":
        edit_facts(built, gpu="Orin", compute="8.7")
    elif case == "another size":
        latents = np.repeat(latents, 4, axis=-1)
    elif case == "memory to run":
        gpu.memory = 16
    else:
        trt.fail.add("deserialize")
    before = kept_files(built)
    plan = SamplingPlan(latents, step, step, step, inputs["encoder_hidden_states"], 1.0, False)
    save_plan(plan, tmp_path / "plan")
    arguments = [built, tmp_path / "plan", "--out", tmp_path / "videos"]
    refused(sampling.main, arguments, capsys, words)
    assert kept_files(built) == before
    assert not (tmp_path / "videos").exists()
