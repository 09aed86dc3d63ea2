"""What a user may get wrong: one line on stderr, exit status 2, and nothing half-written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = ("--prompt-count", "1", "--steps", "2", "--records", "2", "--videos", "1", "--compute", "cpu", "--threads", "1")
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def assert_refused(result: tuple[int, str, str], *words: str) -> str:
    """Exit status 2 and one line that says got, expected, what to do, and ``words``; returns the line."""
    code, stdout, stderr = result
    assert code == 2, stdout + stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: got ")
    assert "; expected " in stderr
    assert "Traceback" not in stdout + stderr
    for word in words:
        assert word in stderr
    return stderr


def assert_nothing_written(out: Path) -> None:
    """No bundle, and nothing that could be mistaken for a part of one."""
    assert not (out / "manifest.json").exists()
    assert not (out / "onnx").exists()
    assert not (out / "quantized").exists()
    assert not [path for path in out.rglob("*") if "partial" in path.name or path.suffix == ".safetensors"]


@pytest.fixture
def export(cli: Any, wan_folder: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """``export(*options, model=…)``: qvdit-export into ``tmp_path / "out"``."""

    def call(*options: object, model: object = wan_folder) -> tuple[int, str, str]:
        return cli("qvdit-export", "--model", model, "--out", tmp_path / "out", *SMALL, *options)

    return call


@pytest.fixture
def broken(wan_folder: Path, tmp_path: Path) -> Path:
    """The tiny pipeline's folder, to be damaged."""
    return shutil.copytree(wan_folder, tmp_path / "broken")


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "w5a3"), ("'w5a3'", "2, 3, 4, 6, 8", "6, 8")),
        (("--bits", "w4"), ("'w4'", "wXaY")),
        (("--bits", "4"), ("'4'", "wXaY")),
        (("--bits", "w4a16"), ("'w4a16'", "wXaY")),
        (("--recipe", "magic"), ("'magic'", "qvdit", "smoothquant")),
        (("--recipe", "no/such.yaml"), ("no/such.yaml", "a YAML file")),
        (("--target", "phone"), ("'phone'", "onnxruntime, tensorrt")),
        (("--compute", "tpu"), ("'tpu'", "cpu")),
        (("--size", "17x256"), ("'17x256'", "FRAMESxHEIGHTxWIDTH", "17x256x448")),
        (("--size", "8x32x32"), ("8x32x32", "videos of one size", "leave out --size")),
        (("--target", "tensorrt", "--device", "cuda"), ("'cuda'", "orin, thor, local", "--compute")),
        (("--target", "tensorrt", "--device", "orin", "--jetpack", "4"), ("'4'", "6.0, 6.1, 6.2")),
        (("--device", "orin"), ("--device orin", "--target tensorrt")),
        (("--jetpack", "6.0"), ("--jetpack 6.0", "--device")),
        (("--layer-bits", "*.ffn.*"), ("'*.ffn.*'", "GLOB=BITS")),
        (("--layer-bits", "*.ffn.*=many"), ("'*.ffn.*=many'", "GLOB=BITS")),
        (("--layer-bits", "=8"), ("'=8'", "GLOB=BITS")),
        (("--layer-bits", "*.ffn.*=5"), ("5 weight bits", "'*.ffn.*'", "16")),
        (("--rank", "99"), ("99", "0 … 64")),
        (("--rank", "-1"), ("-1", "0 … 64")),
        (("--prompts", "no-such-prompts.txt"), ("no-such-prompts.txt",)),
        (("--prompt-count", "100000"), ("100000",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_option(options: tuple[str, ...], words: tuple[str, ...], export: Any, tmp_path: Path) -> None:
    assert_refused(export(*options), *words)
    assert not (tmp_path / "out").exists()


def test_layers_without_tensorrt_kernels(export: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsource: me\nweights: {group: 16}\n")
    line = assert_refused(export("--recipe", recipe, "--target", "tensorrt"), "blocks.0.attn1.to_q (groups)")
    assert "20 layers" in line
    assert "--target onnxruntime" in line
    assert_nothing_written(tmp_path / "out")


def test_static_recipe_at_other_bits(export: Any, tmp_path: Path) -> None:
    assert_refused(export("--recipe", "int8-static", "--bits", "w4a8"), "w4a8", "w8a8")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "onnx").exists()


def test_layer_bits_that_keep_every_layer(export: Any, tmp_path: Path) -> None:
    assert_refused(export("--layer-bits", "*=16"), "at least one quantized layer")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "quantized").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ("not YAML",)),
        ("just words", ("a mapping",)),
        ("name: mine", ("'source'",)),
        ("name: mine\nsource: me\ncolour: red", ("'colour'",)),
        ("name: mine\nsource: me\ntqe: {rank: many}", ("'many'", "rank", "int")),
        ("name: mine\nsource: me\nlayer_bits: {'*': 5}", ("5 weight bits",)),
        ("name: mine\nsource: me\nkind: magic", ("'magic'", "dynamic, static")),
    ],
)
def test_bad_recipe_file(text: str, words: tuple[str, ...], export: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert_refused(export("--recipe", path), *words)
    assert not (tmp_path / "out").exists()


def test_empty_prompts_file(export: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# nothing\n\n")
    assert_refused(export("--prompts", prompts), "prompts")
    assert not (tmp_path / "out").exists()


def test_prompt_that_the_model_does_not_know(export: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat on a sofa\n")
    assert_refused(export("--prompts", prompts), "a cat on a sofa")
    assert_nothing_written(tmp_path / "out")


# Models ---------------------------------------------------------------------------------------------------------------


def test_no_model_folder(export: Any, tmp_path: Path) -> None:
    assert_refused(export(model=tmp_path / "nowhere"), "nowhere", "model_index.json", "wan-shapes")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_pipeline(export: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(export(model=tmp_path / "empty"), "model_index.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "UNet2DConditionModel"}', "{}"])
def test_config_of_no_video_transformer(text: str, broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / "transformer" / "config.json").write_text(text)
    assert_refused(export(model=broken), str(broken / "transformer" / "config.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "NoSuchPipeline"}'])
def test_damaged_model_index(text: str, broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / "model_index.json").write_text(text)
    assert_refused(export(model=broken))
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 5, 4000, -1])
def test_truncated_weights(kept: int, broken: Path, export: Any, tmp_path: Path) -> None:
    path = broken / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(export(model=broken), str(path))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_something_else(broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert_refused(export(model=broken), "safetensors")
    assert not (tmp_path / "out").exists()


def test_missing_weights(broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / WEIGHTS).unlink()
    assert_refused(export(model=broken), "no weights", str(broken / "transformer"))
    assert not (tmp_path / "out").exists()


def test_missing_shard(broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / WEIGHTS).unlink()
    index = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out.weight": "part-1.safetensors"}}))
    assert_refused(export(model=broken), "part-1.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_damaged_index_of_shards(text: str, broken: Path, export: Any, tmp_path: Path) -> None:
    (broken / WEIGHTS).unlink()
    (broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert_refused(export(model=broken), "index.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickled_weights_are_not_loaded(
    suffix: str, broken: Path, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a pickle was loaded")

    pickle = (broken / WEIGHTS).with_suffix(suffix)
    (broken / WEIGHTS).rename(pickle)
    monkeypatch.setattr(torch, "load", load)
    assert_refused(export(model=broken), str(pickle), "pickle", "safe_serialization")
    assert_refused(export(model=pickle), str(pickle), "pickle")
    assert not (tmp_path / "out").exists()


def test_safetensors_of_another_model(
    broken: Path, save_pipeline: Any, wan_model: Any, export: Any, tmp_path: Path
) -> None:
    """Weights that are whole, but not of the shape that the configuration tells."""
    path = broken / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "ffn_dim": 64}))
    assert_refused(export(model=broken))
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize(("layers", "words"), [(3, "too few (blocks.2."), (1, "too many (blocks.1.")])
def test_weights_of_another_depth(layers: int, words: str, broken: Path, export: Any, tmp_path: Path) -> None:
    """diffusers would draw what is missing, and leave out what is too much."""
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": layers}))
    assert_refused(export(model=broken), words, str(broken / "transformer"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "pickled"])
def test_damaged_weights_beside_the_transformer(damage: str, broken: Path, export: Any, tmp_path: Path) -> None:
    path = next(p for p in sorted(broken.rglob("*.safetensors")) if p.parent.name != "transformer")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path.rename(path.with_suffix(".bin"))
    assert_refused(export(model=broken), "pickle" if damage == "pickled" else str(broken))
    assert not (tmp_path / "out").exists()


def test_a_refused_model_may_be_mended(broken: Path, wan_folder: Path, export: Any, tmp_path: Path) -> None:
    """What failed before anything was made has no claim on the output folder, and leaves one that was there."""
    path = broken / "transformer" / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "num_layers": 3}))
    (tmp_path / "out").mkdir()
    assert_refused(export(model=broken))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(
    value: float, wan_model: Any, save_pipeline: Any, export: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(wan_model)
    model.blocks[1].ffn.net[2].weight.data[3, 4] = value
    folder = save_pipeline(tmp_path / "nan", model)
    assert_refused(export(model=folder), "blocks.1.ffn.net.2.weight", "NaN or Inf")
    assert_nothing_written(tmp_path / "out")


def test_model_that_samples_nan(wan_model: Any, save_pipeline: Any, export: Any, tmp_path: Path) -> None:
    """Finite weights whose product overflows: the second step's input is not finite."""
    model = copy.deepcopy(wan_model)
    model.proj_out.weight.data.fill_(3e38)
    folder = save_pipeline(tmp_path / "overflow", model)
    assert_refused(export(model=folder), "NaN or Inf in hidden_states", "a ")
    assert_nothing_written(tmp_path / "out")


def test_model_with_activations_that_overflow(wan_model: Any, save_pipeline: Any, export: Any, tmp_path: Path) -> None:
    """Recorded inputs are finite, statistics of an inner layer are not."""
    model = copy.deepcopy(wan_model)
    model.blocks[1].ffn.net[0].proj.weight.data.fill_(1e30)
    model.blocks[1].ffn.net[2].weight.data.fill_(1e-35)
    folder = save_pipeline(tmp_path / "overflow", model)
    assert_refused(export(model=folder), "NaN or Inf")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "onnx").exists()


# Output folders -------------------------------------------------------------------------------------------------------


def test_output_folder_with_other_files(export: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert_refused(export(), str(tmp_path / "out"), "other files", "an empty folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_output_folder_of_another_model(
    wan_model: Any, save_pipeline: Any, make_job: Any, export: Any, tmp_path: Path
) -> None:
    make_job(tmp_path / "out").run("calibrate")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = copy.deepcopy(wan_model)
    other.proj_out.bias.data += 1
    folder = save_pipeline(tmp_path / "other", other)
    assert_refused(export(model=folder), str(tmp_path / "out"), "another model (tiny-wan)")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_output_folder_that_is_a_file(export: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert_refused(export(), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "a file"


# Bundles --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copied")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("command", ["parity", "inspect"])
@pytest.mark.parametrize(
    "name", ["onnx/model.onnx", "onnx/model.ort.onnx", "quantized/model.safetensors", "quantized/config.json"]
)
def test_altered_bundle(command: str, name: str, copied: Path, cli: Any) -> None:
    flip(copied / name)
    assert_refused(cli("qvdit", command, copied), str(copied / name), "sha256")


def test_altered_bundle_is_not_sampled(copied: Path, wan_folder: Path, cli: Any, tmp_path: Path) -> None:
    flip(copied / "onnx" / "model.ort.onnx")
    video = tmp_path / "video.webp"
    assert_refused(cli("qvdit", "run", copied, "--model", wan_folder, "--out", video), "sha256")
    assert not video.exists()


@pytest.mark.parametrize("command", ["parity", "inspect"])
def test_bundle_without_a_file(command: str, copied: Path, cli: Any) -> None:
    (copied / "onnx" / "model.ort.onnx").unlink()
    assert_refused(cli("qvdit", command, copied), "onnx/model.ort.onnx")


@pytest.mark.parametrize("command", ["parity", "inspect"])
def test_no_bundle(command: str, cli: Any, tmp_path: Path) -> None:
    assert_refused(cli("qvdit", command, tmp_path / "nowhere"), "nowhere")
    assert_refused(cli("qvdit", command, tmp_path), "manifest.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 1}', "\x00"])
def test_damaged_manifest(text: str, copied: Path, cli: Any) -> None:
    (copied / "manifest.json").write_text(text)
    assert_refused(cli("qvdit", "parity", copied), str(copied / "manifest.json"))


def test_manifest_of_another_version(copied: Path, cli: Any) -> None:
    content = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**content, "schema": 99}))
    assert_refused(cli("qvdit", "inspect", copied), "manifest.json", "schema 1")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "onnx/../../secret"])
def test_manifest_that_points_outside(name: str, copied: Path, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    content = json.loads((copied / "manifest.json").read_text())
    content["files"][name] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(content))
    assert_refused(cli("qvdit", "parity", copied), repr(name))


def test_parity_of_a_bundle_without_its_reference(copied: Path, cli: Any) -> None:
    (copied / "parity" / "reference.safetensors").unlink()
    assert_refused(cli("qvdit", "parity", copied), "reference.safetensors")


@pytest.mark.parametrize("kept", [0, 100, -8])
def test_parity_of_a_truncated_reference(kept: int, copied: Path, cli: Any) -> None:
    path = copied / "parity" / "inputs.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(cli("qvdit", "parity", copied), "inputs.safetensors")


def test_run_with_another_model(copied: Path, wan_model: Any, save_pipeline: Any, cli: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(wan_model)
    other.proj_out.bias.data += 1
    folder = save_pipeline(tmp_path / "other", other)
    video = tmp_path / "video.webp"
    assert_refused(
        cli("qvdit", "run", copied, "--model", folder, "--out", video), "the model of this bundle (tiny-wan)"
    )
    assert not video.exists()


def test_run_samples_the_bundles_size(bundle: Path, wan_folder: Path, cli: Any, tmp_path: Path) -> None:
    """The pixel pipeline, which has one size, says which it was asked for."""
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "size": "17x64x96"}))
    video = tmp_path / "video.webp"
    for options, said in (((), "17x64x96"), (("--size", "9x32x32"), "9x32x32")):
        assert_refused(cli("qvdit", "run", copied, "--model", wan_folder, "--out", video, *options), said)
    assert not video.exists()


def test_run_with_an_unknown_prompt(bundle: Path, wan_folder: Path, cli: Any, tmp_path: Path) -> None:
    video = tmp_path / "video.webp"
    options = ("--model", wan_folder, "--out", video, "--prompt", "a cat on a sofa")
    assert_refused(cli("qvdit", "run", bundle, *options), "a cat on a sofa")
    assert not video.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "gpu"), ("'gpu'", "cpu, cuda or cuda:N")),
        (("--engine", "tensorrt"), ("engine 'tensorrt' on device 'cpu'", "onnxruntime")),
        (("--device", "cuda", "--engine", "openvino"), ("'openvino'", "pytorch or tensorrt or onnxruntime")),
        (("--device", "cuda:7"), ("CUDA",)),
        (("--device", "cuda", "--engine", "tensorrt", "--threads", 2), ("2 threads on a GPU",)),
    ],
)
def test_run_on_what_is_not_there(
    options, said, bundle: Path, wan_folder: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    video = tmp_path / "video.webp"
    assert_refused(cli("qvdit", "run", bundle, "--model", wan_folder, "--out", video, *options), *said)
    assert not video.exists()


def test_run_on_a_gpu_without_room(
    bundle: Path, wan_folder: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")

    monkeypatch.setattr("qvdit.runtimes.load", full)
    result = cli("qvdit", "run", bundle, "--model", wan_folder, "--out", tmp_path / "video.webp", "--device", "cuda")
    assert_refused(result, "without room", "20.00 GiB")


def test_run_into_an_unknown_file_type(bundle: Path, wan_folder: Path, cli: Any, tmp_path: Path) -> None:
    result = cli("qvdit", "run", bundle, "--model", wan_folder, "--out", tmp_path / "video.mp4")
    assert_refused(result, "video.mp4", ".webp")
