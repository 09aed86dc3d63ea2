"""The whole job on a tiny random pipeline: its report, what it reuses, and what a killed run leaves."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qvdit.contract import QvditError, checkpoint
from qvdit.contract.bundle import PARITY_INPUTS, PARITY_REFERENCE, verify
from qvdit.contract.layer import WeightSize, arrays
from qvdit.export.plugin import with_placeholders
from qvdit.job import STAGES
from qvdit.method import recipe as recipes
from qvdit.runtimes.parity import check_bundle

SCRIPTS = Path(sys.executable).parent
SMALL = ("--prompt-count", "2", "--steps", "2", "--records", "2", "--videos", "1", "--compute", "cpu", "--threads", "1")
LAYERS = 20
METRICS = {
    "scene_consistency",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "imaging_quality",
    "overall_consistency",
}


@pytest.fixture
def quick(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished bundle's traced graph instead of tracing the same model again, and a small linear to time."""
    monkeypatch.setattr("qvdit.speed.LINEAR", (96, 64))
    monkeypatch.setattr("qvdit.export.trace.trace", lambda *_, **__: onnx.load(bundle / "work" / "traced.onnx"))


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """The finished bundle, to be changed."""
    return shutil.copytree(bundle, tmp_path / "copied")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def files_of(bundle: Path) -> dict[str, bytes]:
    """Every file that the manifest names, and the manifest."""
    names = ["manifest.json", *verify(bundle).files]
    assert len(names) == 6
    return {name: (bundle / name).read_bytes() for name in names}


def reused(job: Any) -> set[str]:
    return {name for name, cost in {**job.calibration_stages.costs, **job.stages.costs}.items() if cost.reused}


def names_of(layers: tuple[Any, ...]) -> list[str]:
    return [layer.name for layer in layers]


def assert_parity(report: dict[str, Any]) -> None:
    parity = report["parity"]
    assert parity["layers_total"] == parity["layers_compared"] == LAYERS == len(parity["layers"])
    assert parity["xq_mismatches"] == parity["acc_mismatches"] == 0
    assert 0.9 <= parity["error_ratio"] <= 1.1
    assert parity["error_ratio"] == pytest.approx(parity["error_runtime"] / parity["error_reference"])
    assert all(layer["runtime_rel_err"] < 1e-5 for layer in parity["layers"])


# The report -----------------------------------------------------------------------------------------------------------


def test_report_names_the_job(bundle: Path) -> None:
    report = read(bundle / "report.json")
    assert {name: report[name] for name in ("model", "recipe", "bits", "target")} == {
        "model": "tiny-wan",
        "recipe": "qvdit",
        "bits": "w4a8",
        "target": "onnxruntime",
    }
    assert report["versions"]["onnx"] == onnx.__version__
    assert (bundle / "report.html").stat().st_size > 10_000


def test_report_of_parity(bundle: Path) -> None:
    report = read(bundle / "report.json")
    assert_parity(report)
    parity = report["parity"]
    layers = checkpoint.load(bundle / "quantized").layers
    assert [layer["name"] for layer in parity["layers"]] == names_of(layers)
    tokens = {name: 2 * (7 if ".attn2.to_k" in name or ".attn2.to_v" in name else 256) for name in names_of(layers)}
    assert parity["xq_compared"] == sum(tokens[layer.name] * layer.shape[1] for layer in layers)
    assert parity["acc_compared"] == sum(tokens[layer.name] * layer.shape[0] for layer in layers)
    assert parity["model_cosine"] > 0.9999
    assert 0 < parity["model_rel_err"] < parity["error_reference"]
    assert all(0 < layer["quantization_error"] < 0.5 and layer["weight_bits"] == 4 for layer in parity["layers"])


def test_report_of_size(bundle: Path) -> None:
    size = read(bundle / "report.json")["size"]
    layers = checkpoint.load(bundle / "quantized").layers
    weights = 2 * (8 * 32 * 32 + 2 * 32 * 48)
    expected = WeightSize.of(layers)
    assert expected.weights == weights
    assert size["weights_fp16_bytes"] == 2 * weights
    assert size["weights_quantized_bytes"] == expected.quantized_bytes
    assert size["ratio"] == expected.quantized_bytes / (2 * weights)
    assert size["nominal_weight_bits"] == 4
    assert size["effective_weight_bits"] == expected.effective_bits > 4
    assert set(size["files"]) == set(verify(bundle).files)
    assert size["files"] == {name: (bundle / name).stat().st_size for name in size["files"]}


def test_report_of_speed(bundle: Path) -> None:
    speed = read(bundle / "report.json")["speed"]
    assert speed["threads"] == 1
    assert speed["speedup"] == pytest.approx(speed["fp32_ms"] / speed["quantized_ms"])
    assert speed["linear_speedup"] == pytest.approx(speed["linear_fp32_ms"] / speed["linear_quantized_ms"])
    assert all(speed[name] > 0 for name in ("fp32_ms", "quantized_ms", "linear_fp32_ms", "linear_quantized_ms"))
    assert speed["spread"] >= 0


def test_report_of_quality(bundle: Path) -> None:
    quality = read(bundle / "report.json")["quality"]
    assert quality["videos"] == len(quality["prompts"]) == 1
    assert set(quality["fp"]) == set(quality["quantized"]) >= METRICS
    full, quantized = (load_file(bundle / "work" / "videos.safetensors")[name] for name in ("full", "quantized"))
    assert full.shape == quantized.shape == (1, 3, 16, 32, 32)
    error = np.linalg.norm((quantized - full).astype(np.float64)) / np.linalg.norm(full.astype(np.float64))
    assert quality["rel_err"] == pytest.approx(error)
    assert 0 < error < 0.2
    mse = np.square((quantized.astype(np.float64) - full) / 2).mean()
    assert quality["psnr_db"] == pytest.approx(-10 * np.log10(mse), abs=1e-3)


def test_report_of_stages(bundle: Path) -> None:
    stages = read(bundle / "report.json")["stages"]
    assert set(stages) == set(STAGES)
    assert all(cost["seconds"] >= 0 and cost["peak_memory_bytes"] > 100 << 20 for cost in stages.values())
    assert not any(cost["reused"] for cost in stages.values())
    assert stages["trace"]["seconds"] > 0.5


def test_manifest_describes_the_model(bundle: Path) -> None:
    manifest = verify(bundle)
    assert manifest.inputs == {
        "hidden_states": ["batch", 3, 16, "height", "width"],
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", "text_tokens", 64],
    }
    assert (manifest.family, manifest.class_name, manifest.frames) == ("wan", "WanTransformer3DModel", 16)
    assert set(manifest.files) == {
        "quantized/config.json",
        "quantized/model.safetensors",
        "quantized/kept.safetensors",
        "onnx/model.onnx",
        "onnx/model.ort.onnx",
    }
    assert "/" not in manifest.model
    assert str(bundle.parent) not in (bundle / "manifest.json").read_text()


# Recipes and bits, in the folder of another --------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("recipe", "bits"),
    [("qvdit", "w3a6"), ("q-vdit-paper", "w4a8"), ("q-vdit-paper", "w3a6"), ("smoothquant", "w3a6")],
)
def test_another_recipe_in_the_same_folder(recipe: str, bits: str, copied: Path, make_job: Any) -> None:
    steps = None if recipe == "smoothquant" else 2  # TQE that starts from zeros must learn first
    job = make_job(copied, recipe=recipe, bits=bits, distillation_steps=steps)
    job.run()
    report = read(copied / "report.json")
    assert (report["recipe"], report["bits"]) == (recipe, bits)
    assert_parity(report)
    assert reused(job) == {"calibrate", "statistics", "trace"}
    manifest = verify(copied)
    assert (manifest.recipe, manifest.bits) == (recipe, bits)
    layers = checkpoint.load(copied / "quantized").layers
    assert {f"w{layer.weight_bits}a{layer.act_bits}" for layer in layers} == {bits}
    gained = {layer.name for layer in layers if layer.frame_gain is not None}
    text = {layer.name for layer in layers if ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name}
    temporal = {layer.name for layer in layers if ".attn1." in layer.name}
    assert gained == {"qvdit": set(names_of(layers)) - text, "q-vdit-paper": temporal, "smoothquant": set()}[recipe]
    # A rotation's random signs are kept where a smoothing scale is.
    smoothed = recipe == "smoothquant" or (recipe, bits) in (("q-vdit-paper", "w4a8"), ("qvdit", "w3a6"))
    assert {layer.inv_smooth is not None for layer in layers} == {smoothed}
    asymmetric = recipe == "q-vdit-paper" or (recipe, bits) == ("qvdit", "w3a6")
    assert {layer.act_symmetric for layer in layers} == {not asymmetric}


@pytest.mark.usefixtures("quick")
def test_groups_and_rotation(copied: Path, make_job: Any, tmp_path: Path) -> None:
    """The whole job with what the operator has beside the default recipe's parts, and the bundle's own check."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nsource: test\nrotation: hadamard\nweights: {group: 16}\ntqe: {rank: 2, start: svd}\n"
    )
    make_job(copied, recipe=str(recipe), bits="w3a6").run()
    assert_parity(read(copied / "report.json"))
    layers = checkpoint.load(copied / "quantized").layers
    assert {(layer.group, layer.rotation, layer.rank) for layer in layers} == {(16, block, 2) for block in (16, 32)}
    rows, model = check_bundle(copied, 1)
    assert sum(row.xq_mismatches + row.acc_mismatches for row in rows) == 0
    assert model.error_ratio == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("quick")
def test_statistics_of_another_format_are_collected_again(
    copied: Path, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvdit.method.statistics.FORMAT", 99)
    job = make_job(copied)
    job.run("quantize")
    assert reused(job) == {"calibrate"}


@pytest.mark.usefixtures("quick")
def test_static_int8(copied: Path, make_job: Any) -> None:
    pytest.importorskip("modelopt")
    make_job(copied, recipe="int8-static", bits="w8a8").run()
    report = read(copied / "report.json")
    assert_parity(report)
    assert report["parity"]["acc_compared"] == 0  # fused kernels do not show their sums
    assert report["size"]["nominal_weight_bits"] == 8
    layers = checkpoint.load(copied / "quantized").layers
    assert {layer.kind for layer in layers} == {"static_int8"}
    assert all(layer.act_scale.shape == () and layer.act_scale > 0 for layer in layers)
    model = onnx.load(copied / "onnx" / "model.onnx")
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.usefixtures("quick")
def test_rank_and_layer_bits(copied: Path, make_job: Any) -> None:
    bits = {"blocks.0.ffn.*": 8, "blocks.1.attn2.to_q": 16}
    job = make_job(copied, rank=3, layer_bits=bits)
    job.run("parity")
    layers = {layer.name: layer for layer in checkpoint.load(copied / "quantized").layers}
    assert "blocks.1.attn2.to_q" not in layers
    assert len(layers) == LAYERS - 1
    assert {name for name, layer in layers.items() if layer.weight_bits == 8} == {
        "blocks.0.ffn.net.0.proj",
        "blocks.0.ffn.net.2",
    }
    assert {layer.rank for layer in layers.values()} == {3}
    parity = read(copied / "work" / "parity.json")
    assert parity["layers_compared"] == LAYERS - 1
    assert parity["xq_mismatches"] == parity["acc_mismatches"] == 0


# Reuse ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_other_bits_take_the_place_of_a_bundle_openly(copied: Path, make_job: Any) -> None:
    """A stage command that stops early leaves nothing of the earlier bundle that could be taken for its own."""
    job = make_job(copied, bits="w3a6")
    job.run("quantize")
    assert job.replaced == "qvdit w4a8"
    assert not (copied / "manifest.json").exists()
    assert not [*copied.glob("onnx/*"), *copied.glob("parity/*"), *copied.glob("report.*")]
    with pytest.raises(QvditError, match="finish it: qvdit-export"):
        verify(copied)


def test_second_run_reuses_every_stage(copied: Path, make_job: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    first = read(copied / "report.json")
    job = make_job(copied)
    job.run()
    assert reused(job) == set(STAGES)
    written = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert written == {"report.json", "report.html"}
    second = read(copied / "report.json")
    for name, cost in second.pop("stages").items():
        assert cost == {**first["stages"][name], "reused": True}
    assert second == {name: value for name, value in first.items() if name != "stages"}


UP_TO_TRACE = {"calibrate", "statistics", "quantize", "trace"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "last", "kept"),
    [
        ({"prompt_count": 1}, "export", set()),
        ({"steps": 3}, "export", set()),
        ({"seed": 5}, "export", set()),
        ({"guidance": 1.5}, "export", set()),
        ({"bits": "w8a6"}, "export", {"calibrate", "statistics", "trace"}),
        ({"rank": 2}, "export", {"calibrate", "statistics", "trace"}),
        ({"target": "tensorrt"}, "export", UP_TO_TRACE),
        ({"videos": 2}, "quality", set(STAGES) - {"quality"}),
        ({"threads": 2}, "quality", set(STAGES) - {"speed"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_only_what_a_setting_touches_runs_again(
    change: dict[str, Any], last: str, kept: set[str], copied: Path, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = read(copied / "work" / "speed.json")
    monkeypatch.setattr("qvdit.speed.measure_speed", lambda *_: speed)
    job = make_job(copied, **change)
    job.run(last)
    assert reused(job) == kept
    assert verify(copied).target == change.get("target", "onnxruntime")


@pytest.mark.usefixtures("quick")
def test_more_prompts_add_to_those_recorded(copied: Path, make_job: Any) -> None:
    folder = make_job(copied).data.shards[0].parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert set(before) == {"shard-00000.safetensors", "shard-00001.safetensors"}
    make_job(copied, prompt_count=3).run("calibrate")
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert set(after) - set(before) == {"shard-00002.safetensors"}
    assert {name: after[name] for name in before} == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", [{"seed": 7}, {"steps": 3}, {"guidance": 1.5}, {"records": 1}], ids=str)
def test_calibration_data_are_those_of_the_plan(
    change: dict[str, Any], copied: Path, tmp_path: Path, make_job: Any
) -> None:
    """Whatever a folder held before, the same plan gives the same data."""
    jobs = [make_job(copied, **change), make_job(tmp_path / "fresh", **change)]
    for job in jobs:
        job.run("calibrate")
    found, expected = (load_file(job.data.shards[0]) for job in jobs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_shared_calibration_data_are_those_of_the_model(
    wan_folder: Path, wan_model: Any, save_pipeline: Any, tmp_path: Path, make_job: Any
) -> None:
    """Another model's --calibration folder is refused, and what is in it stays."""
    other = copy.deepcopy(wan_model)
    other.proj_out.bias.data += 0.25
    folder = save_pipeline(tmp_path / "other", other)
    common = tmp_path / "calibration"
    first = make_job(tmp_path / "a", calibration=common)
    first.run("calibrate")
    before = {path: path.read_bytes() for path in common.rglob("*") if path.is_file()}
    with pytest.raises(QvditError, match="recorded from another model or with other settings"):
        make_job(tmp_path / "b", model=str(folder), calibration=common).run("calibrate")
    assert {path: path.read_bytes() for path in common.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("quick")
def test_shared_calibration(bundle: Path, tmp_path: Path, make_job: Any) -> None:
    common = tmp_path / "calibration"
    first = make_job(tmp_path / "a", calibration=common)
    first.run("export")
    assert reused(first) == set()
    second = make_job(tmp_path / "b", calibration=common, bits="w2a6")
    second.run("export")
    assert reused(second) == {"calibrate", "statistics"}
    assert first.data == second.data
    assert all(path.is_file() and path.is_relative_to(common) for path in first.data.shards)
    assert not list((tmp_path / "a").rglob("shard-*"))
    assert files_of(tmp_path / "a") == files_of(bundle)
    assert verify(tmp_path / "b").bits == "w2a6"


# Killed and started again ---------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def killed_at(stage: str, step: int) -> Any:
    """An observer that ends the job when ``stage`` has done ``step`` of its steps."""

    @contextmanager
    def observe(name: str) -> Iterator[Any]:
        def progress(done: int, _: int) -> None:
            if (name, done) == (stage, step):
                raise KilledError

        yield progress

    return observe


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("stage", "step"),
    [("calibrate", 0), ("calibrate", 1), ("statistics", 1), ("quantize", 7), ("export", 0), ("export", 1)],
)
def test_killed_job_goes_on_to_the_same_bundle(
    stage: str, step: int, bundle: Path, tmp_path: Path, make_job: Any
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        make_job(out, killed_at(stage, step)).run("export")
    assert not (out / "manifest.json").exists()
    job = make_job(out)
    job.run("export")
    assert reused(job) == set(STAGES[: STAGES.index(stage)])
    assert files_of(out) == files_of(bundle)
    assert not list(out.rglob("*partial*"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("stage", "step"), [("parity", 3), ("speed", 1), ("quality", 1)])
def test_killed_proof_goes_on(stage: str, step: int, bundle: Path, copied: Path, make_job: Any) -> None:
    for name in STAGES[STAGES.index(stage) :]:
        (copied / "work" / "stages" / f"{name}.json").unlink()
    with pytest.raises(KilledError):
        make_job(copied, killed_at(stage, step)).run()
    job = make_job(copied)
    job.run()
    assert reused(job) == set(STAGES[: STAGES.index(stage)])
    assert files_of(copied) == files_of(bundle)
    for name in (PARITY_INPUTS, PARITY_REFERENCE):
        assert (copied / name).read_bytes() == (bundle / name).read_bytes()
    first, second = read(bundle / "report.json"), read(copied / "report.json")
    assert {name: second[name] for name in ("parity", "size", "quality")} == {
        name: first[name] for name in ("parity", "size", "quality")
    }


@pytest.mark.usefixtures("quick")
def test_killed_calibration_keeps_its_videos(tmp_path: Path, make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvdit.method import calibration

    with pytest.raises(KilledError):
        make_job(tmp_path / "out", killed_at("calibrate", 1)).run("calibrate")
    sampled = []
    record = calibration._record_some
    monkeypatch.setattr(calibration, "_record_some", lambda *args: sampled.extend(args[3]) or record(*args))
    job = make_job(tmp_path / "out")
    job.run("calibrate")
    assert sampled == [1]


@pytest.mark.usefixtures("quick")
def test_killed_statistics_keep_their_sums(tmp_path: Path, make_job: Any) -> None:
    with pytest.raises(KilledError):
        make_job(tmp_path / "out", killed_at("statistics", 1)).run("statistics")
    (partial,) = (tmp_path / "out" / "work").rglob("statistics-*.partial.safetensors")
    job = make_job(tmp_path / "out")
    passes = []
    job.pipeline.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    job.run("statistics")
    assert len(passes) == 2  # the second prompt's two recorded steps
    assert not partial.exists()


def test_sigkill_and_start_again(bundle: Path, wan_folder: Path, tmp_path: Path, make_job: Any) -> None:
    """A real kill while the process traces; the second run traces anew, and the bytes are the same."""
    out = tmp_path / "out"
    command = [SCRIPTS / "qvdit-export", "--model", wan_folder, "--out", out, *SMALL]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker, deadline = out / "work" / "stages" / "quantize.json", time.monotonic() + 120
    try:
        while not marker.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert not (out / "onnx").exists()
    job = make_job(out)
    job.run("export")
    assert reused(job) == {"calibrate", "statistics", "quantize"}
    assert files_of(out) == files_of(bundle)


@pytest.mark.usefixtures("quick")
def test_bundle_of_other_bits_is_no_bundle_until_it_is_whole(copied: Path, make_job: Any) -> None:
    with pytest.raises(KilledError):
        make_job(copied, killed_at("export", 1), bits="w8a8").run("export")
    assert not (copied / "manifest.json").exists()


# The commands on a finished bundle ------------------------------------------------------------------------------------


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_parity_command(bundle: Path) -> None:
    done = script("qvdit", "parity", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers: 20 compared, 0 with integers that differ" in done.stdout


def rewrite(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the tensors of a safetensors file, keeping its metadata."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def test_parity_files_of_another_export_are_refused(copied: Path, cli: Any) -> None:
    save_file(load_file(copied / PARITY_REFERENCE), copied / PARITY_REFERENCE, {"model_sha256": "0" * 64})
    code, _, stderr = cli("qvdit", "parity", copied, "--threads", 1)
    assert code == 2
    assert "of another model" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["x_q", "acc"])
def test_parity_command_sees_one_wrong_integer(kind: str, copied: Path, cli: Any) -> None:
    reference = load_file(copied / PARITY_REFERENCE)
    reference[f"layer:blocks.1.ffn.net.2:{kind}"][0, 0] += 1
    rewrite(copied / PARITY_REFERENCE, reference)
    code, stdout, stderr = cli("qvdit", "parity", copied, "--threads", 1)
    assert (code, stderr) == (1, "")
    assert "layers: 20 compared, 1 with integers that differ" in stdout
    assert "blocks.1.ffn.net.2" in stdout


def test_parity_command_sees_a_wrong_model(copied: Path, cli: Any) -> None:
    reference = load_file(copied / PARITY_REFERENCE)
    reference["model:full"] = reference["model:quantized"] + 2 * (
        reference["model:full"] - reference["model:quantized"]
    )
    rewrite(copied / PARITY_REFERENCE, reference)
    assert cli("qvdit", "parity", copied, "--threads", 1)[0] == 0  # twice as far for both: the same ratio
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(reference["model:quantized"].shape).astype(np.float32)
    reference["model:quantized"] = reference["model:full"] + 1e-3 * noise
    rewrite(copied / PARITY_REFERENCE, reference)
    assert cli("qvdit", "parity", copied, "--threads", 1)[0] == 1


def test_inspect_command(bundle: Path) -> None:
    done = script("qvdit", "inspect", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny-wan (WanTransformer3DModel), recipe qvdit, w4a8" in done.stdout
    size = WeightSize.of(checkpoint.load(bundle / "quantized").layers)
    assert f"quantized weights: {size.quantized_bytes:,} bytes" in done.stdout
    for name in verify(bundle).files:
        assert f"{name}  {(bundle / name).stat().st_size:,} bytes  sha256 ok" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if "blocks.1.ffn.net.2" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "blocks.1.ffn.net.2",
        "32 x 48",
        "w4a8",
        "1",
        "low_bit",
    ]


def test_run_command(bundle: Path, wan_folder: Path, tmp_path: Path, cli: Any) -> None:
    """The same seed and prompt as the report's video give the report's video."""
    prompt = read(bundle / "report.json")["quality"]["prompts"][0]
    video = tmp_path / "video.safetensors"
    options = ("--model", wan_folder, "--prompt", prompt, "--steps", 2, "--seed", 2026 * 1_000_003, "--threads", 1)
    code, stdout, stderr = cli("qvdit", "run", bundle, "--out", video, *options)
    assert (code, stderr) == (0, "")
    assert f"wrote {video}" in stdout
    expected = load_file(bundle / "work" / "videos.safetensors")["quantized"]
    np.testing.assert_array_equal(load_file(video)["video"], expected)


@pytest.mark.parametrize("engine", [None, "tensorrt"])
def test_run_command_on_a_gpu(
    engine: str | None, bundle: Path, wan_folder: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs there is ONNX Runtime in its place; what is asked for, and the video, are the command's own."""
    import qvdit.runtimes

    asked: list[tuple[Any, ...]] = []
    load = qvdit.runtimes.load

    def stand_in(folder: Path, threads: int | None, device: str, engine: str | None = None) -> Any:
        asked.append((threads, device, engine))
        return load(folder, 1)

    monkeypatch.setattr("qvdit.runtimes.load", stand_in)
    video = tmp_path / "video.safetensors"
    chosen = () if engine is None else ("--engine", engine)
    options = ("--model", wan_folder, "--steps", 1, "--device", "cuda:0", *chosen)
    code, stdout, stderr = cli("qvdit", "run", bundle, "--out", video, *options)
    assert (code, stderr) == (0, "")
    assert f"wrote {video}, sampled in " in stdout
    assert asked == [(None, "cuda:0", engine)]
    assert load_file(video)["video"].shape == (1, 3, 16, 32, 32)


def test_run_command_writes_an_animation(bundle: Path, wan_folder: Path, tmp_path: Path, cli: Any) -> None:
    from PIL import Image

    path = tmp_path / "video.webp"
    assert cli("qvdit", "run", bundle, "--out", path, "--model", wan_folder, "--steps", 1)[0] == 0
    with Image.open(path) as image:
        assert (image.size, image.n_frames) == ((192, 192), 16)


def test_doctor_command(cli: Any) -> None:
    code, stdout, stderr = cli("qvdit", "doctor")
    assert (code, stderr) == (0, "")
    assert f"onnx {onnx.__version__}" in stdout
    assert f"recipes: {', '.join(recipes.names())}" in stdout
    assert "onnxruntime target: ready" in stdout
    assert "tensorrt target: " in stdout
    assert "plugin for Jetson Orin, JetPack 6.2: " in stdout


@pytest.mark.usefixtures("quick")
def test_tensorrt_target_writes_all_but_the_engine(copied: Path, wan_folder: Path, cli: Any) -> None:
    (copied / "report.json").unlink()
    code, _, stderr = cli("qvdit-export", "--model", wan_folder, "--out", copied, "--target", "tensorrt", *SMALL)
    assert code == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: got ")
    for part in ("plugin", f"python -m qvdit.runtimes.tensorrt {copied}"):
        assert part in line
    manifest = verify(copied)
    assert manifest.target == "tensorrt"
    assert {"tensorrt/model.onnx", "tensorrt/layers.onnx"} <= set(manifest.files)
    report = read(copied / "report.json")
    assert report["target"] == "tensorrt"
    assert_parity(report)
    model = onnx.load(copied / "tensorrt" / "model.onnx")
    assert len(model.functions) == 0
    _, found = with_placeholders(model)
    held = {layer.name: arrays(layer) for layer in checkpoint.load(copied / "quantized").layers}
    assert {layer.name for layer in found} == set(held)
    for layer in found:
        for name, value in arrays(layer).items():
            np.testing.assert_array_equal(value, held[layer.name][name])


@pytest.mark.usefixtures("quick")
def test_a_folder_for_a_device(copied: Path, wan_folder: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT/edge is a bundle of its own that carries everything; without tools the sources alone go along."""
    monkeypatch.setenv("CUDACXX", "/no/nvcc")
    options = ("--model", wan_folder, "--out", copied, "--target", "tensorrt", *SMALL)
    code, stdout, _ = cli("qvdit-export", *options, "--device", "orin", "--jetpack", "6.0")
    assert code == 0
    text = " ".join(stdout.split())
    assert f"edge {copied}/edge for Jetson Orin, JetPack 6.0, TensorRT 8.6: copy it there and run ./build.sh" in text
    assert "without a compiled plugin (no /no/nvcc): build.sh compiles it on the device" in text
    edge = copied / "edge"
    files = verify(edge).files
    assert {"build.sh", "device.json", "tensorrt/layers.onnx", "csrc/runner/main.cc"} <= set(files)
    plan = load_file(edge / "sample" / "plan.safetensors")
    videos = load_file(copied / "work" / "videos.safetensors")
    np.testing.assert_array_equal(plan["reference"], videos["quantized"][:1])
    assert len(plan["timesteps"]) == len(plan["gain"]) == 2
    code, stdout, _ = cli("qvdit", "parity", edge, "--threads", "1")
    assert code == 0
    assert "20 compared, 0 with integers that differ" in stdout
    # The same command again finds it done; another quantization takes the stale folder's manifest away.
    code, stdout, _ = cli("qvdit-export", *options, "--device", "orin", "--jetpack", "6.0")
    assert "edge" in next(line for line in stdout.splitlines() if line.startswith("reused"))
    assert cli("qvdit", "export", *options, "--bits", "w8a8")[0] == 2  # no engine is built here
    assert not (edge / "manifest.json").exists()


@pytest.mark.usefixtures("quick")
def test_tensorrt_target_with_a_kept_layer(copied: Path, make_job: Any) -> None:
    make_job(copied, target="tensorrt", layer_bits={"blocks.1.attn2.to_q": 16}).run("export")
    model = onnx.load(copied / "tensorrt" / "model.onnx")
    _, found = with_placeholders(model)
    assert len(found) == LAYERS - 1
    make_job(copied).run("export")
    assert not (copied / "tensorrt" / "model.onnx").exists()


@pytest.mark.usefixtures("quick")
def test_tensorrt_target_with_static_layers(copied: Path, make_job: Any) -> None:
    pytest.importorskip("modelopt")
    make_job(copied, recipe="int8-static", bits="w8a8", target="tensorrt").run("export")
    model = onnx.load(copied / "tensorrt" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert {"tensorrt/model.onnx", "tensorrt/layers.onnx"} <= set(verify(copied).files)


@pytest.mark.usefixtures("quick")
def test_export_command_tells_its_result(bundle: Path, copied: Path, wan_folder: Path, cli: Any) -> None:
    code, stdout, stderr = cli("qvdit-export", "--model", wan_folder, "--out", copied, *SMALL)
    assert (code, stderr) == (0, "")
    assert "reused: calibrate, statistics, quantize, trace, export, parity, speed, quality" in stdout
    assert "parity   20 of 20 layers compared, 0 x_q and 0 acc differ" in stdout
    assert f"look at {copied / 'report.html'}" in stdout
    assert files_of(copied) == files_of(bundle)


def test_version(cli: Any) -> None:
    import qvdit

    assert cli("qvdit", "--version") == (0, f"qvdit {qvdit.__version__}\n", "")
