"""The HTML report: self-contained, reproducible, and honest about what differs."""

from __future__ import annotations

import base64
import copy
import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvdit.report import ReportVideo, write_html
from qvdit.report.charts import KIND_VARIABLES, OTHER, kind_variables, layer_kind

FRAMES, SIZE = 5, 32
LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")
METRICS = ("scene_consistency", "motion_smoothness", "colour")


def make_layer(index: int) -> dict[str, Any]:
    return {
        "name": f"blocks.{index // len(LAYERS)}.{LAYERS[index % len(LAYERS)]}",
        "weight_bits": 4,
        "quantization_error": 0.02 + 0.001 * (index % 7),
        "runtime_rel_err": 1e-7,
        "xq_mismatches": 0,
        "acc_mismatches": 0,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    stages = ("calibrate", "export", "quantize")
    return {
        "model": "wan-shapes",
        "recipe": "qvdit",
        "bits": "w4a8",
        "target": "onnxruntime",
        "date": "2026-11-22",
        "versions": {"qvdit": "0.1.0", "torch": "2.13.0"},
        "machine": {"cpu": "a processor", "threads": 2},
        "parity": {
            "layers_total": 60,
            "layers_compared": 60,
            "xq_compared": 31457280,
            "xq_mismatches": 0,
            "acc_compared": 44564480,
            "acc_mismatches": 0,
            "model_rel_err": 0.0021,
            "model_cosine": 0.999998,
            "error_runtime": 0.0412,
            "error_reference": 0.0411,
            "error_ratio": 1.002,
            "layers": [make_layer(index) for index in range(60)],
        },
        "size": {
            "weights_fp16_bytes": 10420224,
            "weights_quantized_bytes": 2900000,
            "ratio": 0.278,
            "effective_weight_bits": 4.45,
            "nominal_weight_bits": 4.0,
            "files": {"onnx/model.onnx": 12345678},
        },
        "speed": {
            "fp32_ms": 350.1,
            "quantized_ms": 301.2,
            "speedup": 1.16,
            "spread": 0.03,
            "linear_fp32_ms": 52.0,
            "linear_quantized_ms": 20.7,
            "linear_speedup": 2.5,
            "threads": 2,
        },
        "quality": {
            "videos": 2,
            "psnr_db": 31.2,
            "fp": dict.fromkeys(METRICS, 0.97),
            "quantized": dict.fromkeys(METRICS, 0.95),
        },
        "stages": {name: {"seconds": 31.0, "peak_memory_bytes": 1_200_000_000, "reused": False} for name in stages},
    }


def make_video(prompt: str, seed: int) -> ReportVideo:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    return ReportVideo(prompt, pixels[0], pixels[1], 31.25)


@pytest.fixture
def videos() -> list[ReportVideo]:
    return [make_video("a red circle moves left", 1), make_video("a <b>bold</b> & blue square", 2)]


def render(report: dict[str, Any], videos: list[ReportVideo], folder: Path) -> str:
    path = folder / "report.html"
    write_html(report, videos, path)
    return path.read_text(encoding="utf-8")


def visible(page: str) -> str:
    """The text that a reader sees, with single spaces."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def frames_of(source: str) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
    frames = []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
    return frames


def test_page_needs_no_other_file(report: dict[str, Any], videos: list[ReportVideo], tmp_path: Path) -> None:
    page = render(report, videos, tmp_path)
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith(("data:image/", "#"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_same_input_gives_same_bytes(report: dict[str, Any], videos: list[ReportVideo], tmp_path: Path) -> None:
    write_html(report, videos, tmp_path / "a.html")
    write_html(copy.deepcopy(report), videos, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_identifiers_are_unique_and_resolve(report: dict[str, Any], tmp_path: Path) -> None:
    page = render(report, [], tmp_path)
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {
        pair for name in identifiers for pair in ((name, ""), ("", name))
    }


def test_headline_figures(report: dict[str, Any], videos: list[ReportVideo], tmp_path: Path) -> None:
    text = visible(render(report, videos, tmp_path))
    for figure in (
        "3.60\u00d7 weights smaller",
        "1.16\u00d7 forward pass faster",
        "31.2 dB PSNR",
        "4.45 effective bits",
    ):
        assert figure in text
    assert "0 integers differ of 76 021 760 compared" in text
    assert "FP16 10.4 MB → 2.90 MB" in text
    assert "wan-shapes" in text
    assert "W4A8" in text


def test_exact_parity_is_said_in_words(report: dict[str, Any], tmp_path: Path) -> None:
    text = visible(render(report, [], tmp_path))
    assert "Layers compared 60 of 60" in text
    assert "x_q 0 of 31 457 280 differ" in text
    assert "acc 0 of 44 564 480 differ" in text
    assert "Exact" in text
    assert "Do not deploy" not in text


def test_videos_are_embedded_without_loss(report: dict[str, Any], videos: list[ReportVideo], tmp_path: Path) -> None:
    sources = re.findall(r'<img[^>]*src="([^"]*)"', render(report, videos, tmp_path))
    expected = [pixels for video in videos for pixels in (video.full, video.quantized)]
    assert len(sources) == len(expected)
    for source, pixels in zip(sources, expected, strict=True):
        frames = frames_of(source)
        assert len(frames) == FRAMES
        for frame, original in zip(frames, pixels, strict=True):
            assert frame.shape == (192, 192, 3)
            np.testing.assert_array_equal(frame, original.repeat(6, 0).repeat(6, 1))


def test_large_videos_are_reduced_and_say_so(report: dict[str, Any], tmp_path: Path) -> None:
    large = np.zeros((1, 8, 832, 3), np.uint8)
    page = render(report, [ReportVideo("wide", large, large, float("inf"))], tmp_path)
    sources = re.findall(r'<img[^>]*src="([^"]*)"', page)
    assert frames_of(sources[0])[0].shape == (4, 416, 3)
    assert "shown at 1/2 of its size" in page
    assert "identical" in visible(page)


def test_mismatches_alarm(report: dict[str, Any], tmp_path: Path) -> None:
    report["parity"].update(xq_mismatches=3, acc_mismatches=1234)
    report["parity"]["layers"][7].update(xq_mismatches=3, acc_mismatches=1234)
    page = render(report, [], tmp_path)
    text = visible(page)
    assert "1 237 of 76 021 760 integers differ" in text
    assert "In 1 layer the runtime does not compute" in text
    assert "Do not deploy" in text
    assert "Exact" not in text
    assert 'class="tile bad"' in page
    assert 'class="verdict bad"' in page
    assert re.search(r"blocks\.1\.attn2\.to_k[^<]*1237 integers differ</title>", page)
    assert "blocks.1.attn2.to_k 3 1 234" in text


def test_a_partial_comparison_is_not_called_exact(report: dict[str, Any], tmp_path: Path) -> None:
    report["parity"]["layers_compared"] = 58
    text = visible(render(report, [], tmp_path))
    assert "Only 58 of 60 layers were compared" in text
    assert "Exact" not in text


def test_no_comparison_is_not_called_exact(report: dict[str, Any], tmp_path: Path) -> None:
    nothing = {"layers_compared": 0, "xq_compared": 0, "acc_compared": None, "acc_mismatches": None, "layers": []}
    report["parity"].update(nothing)
    text = visible(render(report, [], tmp_path))
    assert "Not proven" in text
    assert "Exact" not in text


@pytest.mark.parametrize("differing", [None, 0])
def test_static_layers_have_no_accumulators(report: dict[str, Any], tmp_path: Path, differing: int | None) -> None:
    report["parity"].update(acc_compared=0, acc_mismatches=differing)
    for layer in report["parity"]["layers"]:
        layer["acc_mismatches"] = differing
    text = visible(render(report, [], tmp_path))
    assert "acc none compared: the kernels of static layers" in text
    assert "0 integers differ of 31 457 280 compared" in text


def test_quality_may_be_missing(report: dict[str, Any], tmp_path: Path) -> None:
    report["quality"] = {"videos": 3, "psnr_db": None, "rel_err": 0.034, "fp": {}, "quantized": {}}
    page = render(report, [], tmp_path)
    assert "<img" not in page
    assert "— PSNR not measured for this model" in visible(page)
    assert "Not measured for this model" in visible(page)
    assert "a relative error of 3.40 %" in visible(page)


def test_machine_may_be_missing(report: dict[str, Any], tmp_path: Path) -> None:
    del report["machine"]
    assert "torch 2.13.0" in visible(render(report, [], tmp_path))


def test_quality_shows_the_change(report: dict[str, Any], tmp_path: Path) -> None:
    assert "Motion smoothness 0.970 0.950 \u22120.020" in visible(render(report, [], tmp_path))


def test_text_is_escaped(report: dict[str, Any], tmp_path: Path) -> None:
    report["parity"]["layers"][0]["name"] = "blocks.0.<i>&$x_1$.to_q"
    page = render(report, [make_video('<b>& "quoted"', 3)], tmp_path)
    assert "<b>&" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert '<b>& "quoted"' in visible(page)


@pytest.mark.parametrize(
    ("speedup", "label"),
    [
        (1.16, "1.16\u00d7 forward pass faster"),
        (0.8, "1.25\u00d7 forward pass slower"),
        (0.99, "no change beyond the spread"),
    ],
)
def test_speed_is_not_flattered(report: dict[str, Any], tmp_path: Path, speedup: float, label: str) -> None:
    report["speed"]["speedup"] = speedup
    assert label in visible(render(report, [], tmp_path))


def test_stages_are_in_the_order_they_run(report: dict[str, Any], tmp_path: Path) -> None:
    text = visible(render(report, [], tmp_path))
    assert text.index("calibrate 31.0 s 1.20 GB new") < text.index("quantize 31.0 s") < text.index("export 31.0 s")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn1.to_q", "attn1"),
        ("transformer_blocks.11.attn1.to_out.0", "attn1"),
        ("blocks.3.ffn.net.0.proj", "ffn"),
        ("condition_embedder.time_embedder.linear_1", "condition_embedder"),
        ("net.0", "net"),
        ("proj_out", "proj_out"),
    ],
)
def test_kind_of_a_layer(name: str, kind: str) -> None:
    assert layer_kind(name) == kind


def test_kinds_beyond_the_palette_share_a_colour() -> None:
    layers = [{"name": f"blocks.0.kind{index}.to_q"} for index in range(len(KIND_VARIABLES) + 2)]
    variables = kind_variables(layers)
    assert list(variables)[-1] == OTHER
    assert len(variables) == len(KIND_VARIABLES) + 1
