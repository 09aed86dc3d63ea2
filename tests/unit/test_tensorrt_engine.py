"""Engines are built, proven, kept and refused as promised: with a stand-in for TensorRT, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import DataType, Fake, FakeDriver, Layer, LayerType, Network, Tensor

from qvdit.contract import QvditError
from qvdit.contract.bundle import ENGINE, ENGINE_FACTS, ENGINE_PARITY
from qvdit.contract.parity import load_reference
from qvdit.runtimes.tensorrt import device, plugin, versions
from qvdit.runtimes.tensorrt.build import BuildOptions, build_engine, make_profile
from qvdit.runtimes.tensorrt.session import TensorRtSession

BUILT_FOR = b"\x7fELF\0qvdit LowBitLinear 1 for TensorRT %s\0"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    library = FakeDriver()
    monkeypatch.setattr(device, "driver", lambda: device.Driver(library))
    return library


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, gpu: FakeDriver) -> Fake:
    fake = Fake()
    monkeypatch.setattr(versions, "tensorrt", lambda: fake)
    monkeypatch.setattr(plugin, "_load", lambda path: fake.creators.add("LowBitLinear"))
    return fake


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


def test_weakly_typed_layers_get_their_tensors_types() -> None:
    half, single, whole = (Tensor("t", kind) for kind in (DataType.HALF, DataType.FLOAT, DataType.INT32))
    network = Network(1)
    network.layers = [
        Layer(LayerType.MATRIX_MULTIPLY, [half, half], [half]),
        Layer(LayerType.ELEMENTWISE, [single, single], [Tensor("b", DataType.BOOL)]),
        Layer(LayerType.ELEMENTWISE, [whole, whole], [whole]),
        Layer(LayerType.CAST, [half], [single]),
    ]
    assert versions.type_layers(Fake(), network) == 2
    assert [layer.precision for layer in network.layers] == [DataType.HALF, DataType.FLOAT, None, None]
    assert [layer.output_types for layer in network.layers] == [{0: DataType.HALF}, {}, {}, {}]


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
        ({"plugin_version": "0"}, ("version 1 of the plugin", "version 0")),
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


def test_no_room_for_a_context(built: Path, trt: Fake) -> None:
    trt.fail.add("context")
    with pytest.raises(QvditError, match="no room"):
        TensorRtSession.of_bundle(built)


# Plugin and machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BUILT_FOR % b"10.3.0", "built for TensorRT 10.3.0"),
        (b"\x7fELF", "a build of the LowBitLinear plugin"),
        (b"", "a build of the LowBitLinear plugin"),
        (BUILT_FOR.replace(b"Linear 1", b"Linear 2") % b"8.6.0", "version 2 of the plugin"),
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


def test_a_bundle_for_another_target(trt: Fake, bundle: Path) -> None:
    with pytest.raises(QvditError, match="--target tensorrt"):
        build(bundle)


def test_a_timing_cache_of_another_gpu_is_replaced(trt: Fake, exported: Path) -> None:
    cache = exported / "timing"
    cache.write_bytes(b"other")
    build(exported, timing_cache=cache)
    assert cache.read_bytes() == b"++"  # the second build went on from the first one's
    build(exported, timing_cache=cache)
    assert cache.read_bytes() == b"++++"


def test_no_gpu_and_no_tensorrt(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    versions.tensorrt.cache_clear()
    with pytest.raises(QvditError, match="TensorRT"):
        build(exported)
