"""`qvdit bench tensorrt`: cases prepared by PyTorch, measured with a stand-in for TensorRT, judged and drawn."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from fake_tensorrt import Fake, FakeDriver

from qvdit.bench import blocks
from qvdit.bench.tensorrt import __main__ as alone
from qvdit.bench.tensorrt import cases, floors, prepare, results
from qvdit.bench.tensorrt.results import Results, Row
from qvdit.contract import FrameRows, QvditError
from qvdit.contract.bundle import TENSORRT_LAYERS, TENSORRT_MODEL
from qvdit.contract.layer import padded_size
from qvdit.contract.parity import load_reference, relative_error
from qvdit.export import plugin as nodes
from qvdit.runtimes.tensorrt import plugin
from tests.conftest import latte

SLICE = "latte-xl-slice"
QUANTIZED = cases.ENGINES[1:]


def small_latte(layers: int, frames: int = 4) -> Any:
    """In place of the XL model: its form, 128 features wide."""
    return latte(1, num_layers=1, attention_head_dim=64, cross_attention_dim=128, caption_channels=24, out_channels=4)


@pytest.fixture(scope="module")
def prepared(shared: Any) -> Path:
    """Cases of the small model, all engines; read only."""

    def make(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "latte_xl", small_latte)
            patch.setattr(blocks, "TEXT_FEATURES", 24)
            patch.setattr(prepare, "_TEXT_TOKENS", 5)
            prepare.prepare(prepare.Settings((SLICE,), compute="cpu"), root, lambda text: None)

    return shared("bench-tensorrt", make)


# Preparing ------------------------------------------------------------------------------------------------------------


def test_processes_that_share_a_trace_write_it_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process an engine: a file half written by one must not be renamed by another."""
    writing: list[int] = []
    most: list[int] = []

    def save(model: object, path: Path) -> None:
        writing.append(1)
        most.append(len(writing))
        time.sleep(0.05)
        writing.pop()

    monkeypatch.setattr(prepare, "trace", lambda *given, **how: None)
    monkeypatch.setattr(prepare, "save_model", save)
    adapter = SimpleNamespace(sites=lambda transformer: [])
    tracers = [prepare._tracer(None, adapter, {}, tmp_path / "work") for _ in range(4)]  # a process each
    threads = [threading.Thread(target=traced, args=(True,)) for traced in tracers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


@pytest.mark.parametrize(("engine", "scaled"), [("fp16", {"Mul", "Transpose"}), ("int8_qdq", {"Mul"})])
def test_attention_beside_static_layers_is_not_what_tensorrt_fuses(prepared: Path, engine: str, scaled: set) -> None:
    """Queries alone are scaled where it may be fused, else queries and keys."""
    graph = onnx.load(cases.folder(prepared, SLICE, engine) / TENSORRT_MODEL, load_external_data=False).graph
    made = {name: node for node in graph.node for name in node.output}

    def before(name: str, *skipped: str) -> onnx.NodeProto:
        node = made[name]
        return before(node.input[0], *skipped) if node.op_type in skipped else node

    products = [before(node.input[0], "Cast") for node in graph.node if node.op_type == "Softmax"]
    assert products
    for product in products:
        assert product.op_type == "MatMul"
        assert {before(name, "Cast").op_type for name in product.input} == scaled


def test_every_engine_is_a_case(prepared: Path) -> None:
    found = {engine: cases.load(cases.folder(prepared, SLICE, engine)) for engine in cases.ENGINES}
    assert {case.layers for case, _ in found.values()} == {0, 16}
    sizes = {engine: case.weight_bytes for engine, (case, _) in found.items()}
    weights = 2 * 128 * 128 * 4 + 128 * 128 * 4 + 2 * 2 * 4 * 128 * 128  # self, cross, MLPs
    assert sizes["fp16"] == 2 * weights
    assert sizes["w4a8_no_tqe"] == weights // 2 + 4 * (14 * 128 + 2 * 512)
    assert sizes["w3a6"] < sizes["w4a8_no_tqe"] < sizes["w4a8"] < sizes["int8_qdq"] < sizes["w8a8"] < sizes["fp16"]
    half = found["fp16"][1]
    saved = load_reference(cases.folder(prepared, SLICE, "fp16"))
    assert 0 < relative_error(half, saved.full) < 5e-3
    assert saved.layers == ()


def test_layers_are_those_of_the_bits(prepared: Path) -> None:
    def layers(engine: str) -> tuple[Any, ...]:
        model = onnx.load(cases.folder(prepared, SLICE, engine) / TENSORRT_MODEL)
        return nodes.with_placeholders(model)[1]

    w4a8, bare, w3a6 = layers("w4a8"), layers("w4a8_no_tqe"), layers("w3a6")
    assert {layer.rank for layer in w4a8} == {layer.rank for layer in w3a6} == {1}
    assert {layer.rank for layer in bare} == {0}
    assert {layer.rows for layer in w4a8} == {FrameRows.SPATIAL, FrameRows.TEMPORAL, FrameRows.NONE}
    assert {(layer.weight_bits, layer.act_bits, layer.act_symmetric) for layer in w3a6} == {(3, 6, False)}
    assert all(layer.rotation and layer.inv_smooth is not None for layer in w3a6)
    assert not any(layer.rotation for layer in w4a8)


def test_the_fp16_engine_is_plain(prepared: Path) -> None:
    model = onnx.load(cases.folder(prepared, SLICE, "fp16") / TENSORRT_MODEL)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    static = onnx.load(cases.folder(prepared, SLICE, "int8_qdq") / TENSORRT_MODEL)
    assert sum(node.op_type == "QuantizeLinear" for node in static.graph.node) == 2 * 16  # of inputs and of weights


def test_what_is_there_is_not_prepared_again(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "latte_xl", lambda layers: pytest.fail("built again"))
    assert prepare.prepare(prepare.Settings((SLICE,), compute="cpu"), prepared, print) == []


def test_a_shipped_model_goes_through_the_job(wan_folder: Path, tmp_path: Path) -> None:
    source = prepare._shipped(str(wan_folder), tmp_path, "cpu")
    assert source.largest(True)["sample"] > 0
    full = prepare._output(source.transformer, source.inputs)
    for engine in ("w4a8", "w4a8_no_tqe"):
        layers = engine == "w4a8"
        prepare.write(source, engine, full, tmp_path / engine, prepare.Settings(layers=layers))
        case, half = cases.load(tmp_path / engine)
        saved = load_reference(tmp_path / engine)
        assert (case.layers, len(saved.layers)) == (20, 20 if layers else 0)
        assert (tmp_path / engine / TENSORRT_LAYERS).exists() == layers
        assert relative_error(half, saved.quantized) < relative_error(saved.quantized, full)
    sizes = [cases.load(tmp_path / engine)[0].weight_bytes for engine in ("w4a8_no_tqe", "w4a8")]
    assert sizes[0] < sizes[1]


def test_names_that_nobody_knows() -> None:
    assert cases.parse("w4a8, fp16", cases.ENGINES, "--engines") == ("fp16", "w4a8")
    with pytest.raises(QvditError, match="--engines 'w1a1'"):
        cases.parse("fp16,w1a1", cases.ENGINES, "--engines")
    assert cases.engines_of("latte-xl") == ("fp16", "w4a8")


# Measuring ------------------------------------------------------------------------------------------------------------


class Context(fake_tensorrt.Context):
    """Answers with the case's own reference."""

    def model(self, bundle: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        saved = load_reference(bundle)
        noise = self.engine.fake.noise * (saved.quantized - saved.full)
        return {"sample": saved.quantized + noise}

    def layers(self, bundle: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        references = {layer.name: layer for layer in load_reference(bundle).layers}
        found: dict[str, np.ndarray] = {}
        for node in self.engine.graph.node:
            if f"{node.name}:x" not in given:
                continue
            group = [references[name].outputs for name in node.name.split(",")]
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            k = values["in_features"]
            stored = np.zeros((len(group[0].x_q), padded_size((1, k))), np.int8)
            stored[:, :k] = group[0].x_q - (0 if values["act_symmetric"] else 128)
            stored[0, : self.engine.fake.wrong_integers] ^= 1
            leading = given[f"{node.name}:x"].shape[:2]
            shown = next(name for name in node.output if ":x_q" in name)
            found[shown] = stored.view(np.int32).reshape(*leading, -1)
            found[f"{node.name}:acc"] = np.concatenate([o.acc for o in group], -1).reshape(*leading, -1)
            found[f"{node.name}:y"] = np.concatenate([o.y for o in group], -1).reshape(*leading, -1)
        for name in self.engine.tensors:  # of static layers: y alone
            if name.endswith(":y") and name not in found:
                y = references[name.removesuffix(":y")].outputs.y
                found[name] = y.reshape(*given[f"{name.removesuffix(':y')}:x"].shape[:2], -1)
        return found


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, trt: Fake) -> Fake:
    monkeypatch.setattr(fake_tensorrt, "Context", Context)
    return trt


@pytest.fixture
def copied(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cases, to be built in, and a plugin."""
    library = tmp_path / plugin.LIBRARY
    library.write_bytes(b"\x7fELF\0qvdit LowBitLinear 4 for TensorRT 8.6.0\0")
    monkeypatch.setenv(plugin.VARIABLE, str(library))
    return Path(shutil.copytree(prepared, tmp_path / "cases", ignore=shutil.ignore_patterns("work")))


def measured(root: Path, *more: str) -> int:
    out = root.parent / "bench.json"
    return alone.main([str(root), "--out", str(out), "--models", SLICE, "--repeats", "4", *more])


def test_rows_have_everything(trt: Fake, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(copied) == 0
    found = results.load(copied.parent / "bench.json")
    assert [row.engine for row in found.rows] == list(cases.ENGINES)
    assert {row.ms for row in found.rows} == {1.5}
    assert found.gpu == "Fake GPU"
    assert found.versions["tensorrt"] == "8.6.0"
    for row in found.rows:
        counted = row.engine not in ("fp16", "int8_qdq")
        assert row.layers_compared == (16 if counted else 0)
        assert (row.xq_mismatches, row.acc_mismatches) == (0, 0)
        assert row.engine_bytes > 0
        if row.engine != "fp16":
            assert row.error_ratio_float32 == pytest.approx(1.0)
            assert row.error_ratio is not None
            assert 0.3 < row.error_ratio < 1.1
            assert row.rel_err is not None
            assert row.rel_err > 0
    assert "building" in capsys.readouterr().out
    assert [path.stem for path in trt.builds] == ["model", *["model", "layers"] * 5]


def test_engines_that_are_there_are_timed_again_without_a_build(trt: Fake, copied: Path) -> None:
    assert measured(copied, "--build-only") == 0
    assert not (copied.parent / "bench.json").exists()
    builds = len(trt.builds)
    assert measured(copied) == 0
    assert len(trt.builds) == builds
    plan = cases.folder(copied, SLICE, "w4a8") / "tensorrt" / "model.plan"
    plan.write_bytes(plan.read_bytes() + b" ")  # damaged: built again
    assert measured(copied, "--engines", "w4a8") == 0
    assert len(trt.builds) == builds + 2
    assert measured(copied, "--engines", "w4a8", "--optimization-level", "2") == 0
    assert len(trt.builds) == builds + 4


def test_profile_is_left_beside_the_engine(trt: Fake, copied: Path) -> None:
    assert measured(copied, "--engines", "w4a8", "--profile") == 0
    folder = cases.folder(copied, SLICE, "w4a8")
    assert json.loads((folder / "profile.json").read_text()) == [
        {"layer": "mlp", "ms": 3.0},
        {"layer": "attention", "ms": 2.0},
    ]


def test_mismatches_and_errors_are_told(trt: Fake, copied: Path) -> None:
    trt.wrong_integers, trt.noise = 3, 0.5
    assert measured(copied, "--engines", "w4a8,int8_qdq") == 0
    rows = {row.engine: row for row in results.load(copied.parent / "bench.json").rows}
    assert rows["w4a8"].xq_mismatches == 3 * 16
    assert rows["w4a8"].error_ratio_float32 == pytest.approx(1.5)
    met = {verdict.floor[:9]: verdict.met for verdict in floors.verdicts(results.load(copied.parent / "bench.json"))}
    assert met["integers:"] is False
    assert met["error aga"] is False


def test_an_engine_that_cannot_be_built_is_left_out(
    trt: Fake, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(cases.folder(copied, SLICE, "w8a8") / "parity")
    assert measured(copied, "--engines", "fp16,w8a8") == 0
    assert [row.engine for row in results.load(copied.parent / "bench.json").rows] == ["fp16"]
    assert "left out:" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["nothing", "no gpu", "case"])
def test_refusals_are_one_line(
    wrong: str, trt: Fake, gpu: FakeDriver, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if wrong == "nothing":
        shutil.rmtree(copied)
    elif wrong == "no gpu":
        gpu.devices = 0
    else:
        path = cases.folder(copied, SLICE, "fp16") / "case.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    assert measured(copied) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got ")
    assert error.count("\n") == 1


def test_measuring_needs_neither_torch_nor_the_command_lines_packages() -> None:
    blocked = "import sys\nfor name in ('torch', 'typer', 'rich', 'matplotlib', 'onnx'): sys.modules[name] = None\n"
    code = f"{blocked}import qvdit.bench.tensorrt.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


# Judging and drawing --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of() -> Callable[..., Results]:
    def make(**ms: float) -> Results:
        rows = tuple(
            Row(
                SLICE,
                engine,
                time,
                0.01,
                10,
                {"fp16": 200}.get(engine, 55),
                10,
                1e-3,
                1.0,
                1.0,
                9,
                0,
                0,
                1e-3,
                2.0,
                True,
            )
            for engine, time in ms.items()
        )
        return Results("qvdit bench tensorrt", "NVIDIA H200", "580", {"tensorrt": "8.6.0"}, "2026-01-01", rows)

    return make


@pytest.mark.parametrize(
    ("ms", "met"),
    [
        ({"fp16": 10.0, "int8_qdq": 8.0, "w4a8": 7.0, "w4a8_no_tqe": 6.8}, [True, True, True, True]),
        ({"fp16": 10.0, "int8_qdq": 6.9, "w4a8": 8.0, "w4a8_no_tqe": 7.0}, [False, False, False, True]),
        ({"w4a8": 7.0}, [None, None, None, None]),
    ],
)
def test_floors(ms: dict[str, float], met: list[bool | None], run_of: Callable[..., Results]) -> None:
    verdicts = floors.verdicts(run_of(**ms))
    assert [verdict.met for verdict in verdicts[:4]] == met
    assert [verdict.met for verdict in verdicts[4:]] == [True, True, True]


def test_a_share_above_the_bound_and_a_nan_are_missed(run_of: Callable[..., Results]) -> None:
    found = run_of(fp16=10.0, w4a8=7.0)
    rows = (
        found.rows[0],
        dataclasses.replace(found.rows[1], weight_bytes=61, error_ratio=None, error_ratio_float32=None),
    )
    verdicts = floors.verdicts(dataclasses.replace(found, rows=rows))
    assert [verdict.met for verdict in verdicts] == [True, None, None, False, True, False, False]


def test_render(run_of: Callable[..., Results], tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "run.json"
    found = run_of(fp16=10.0, int8_qdq=8.0, w4a8=7.0)
    results.save(found, path)
    assert results.load(path) == found
    code, out, _ = cli("qvdit", "bench", "tensorrt", "--render", path)
    assert code == 0
    assert "1.43x" in out
    assert "met, 1 of 1: XL, w4a8: 1.3x as fast as the FP16 engine" in out
    assert (tmp_path / f"run-{SLICE}.png").stat().st_size > 1000


@pytest.mark.parametrize("change", [{"ms": "fast"}, {"engine": None}, {"extra": 1}])
def test_a_file_of_something_else(change: dict[str, Any], run_of: Callable[..., Results], tmp_path: Path) -> None:
    results.save(run_of(fp16=1.0), tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    content["rows"][0] |= change
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(QvditError, match="lacks or adds something"):
        results.load(tmp_path / "run.json")


def test_the_cli_without_a_gpu(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path] = []
    monkeypatch.setattr(prepare, "prepare", lambda settings, root, say: prepared.append(root))
    code, _, err = cli("qvdit", "bench", "tensorrt", "--cases", tmp_path, "--out", tmp_path / "x.json")
    assert code == 2
    assert err.startswith("error: ")
    assert not prepared
    assert not (tmp_path / "x.json").exists()
    code, _, err = cli("qvdit", "bench", "tensorrt", "--models", "wan-2.2")
    assert code == 2
    assert "--models 'wan-2.2'" in err
