"""Renders report.json and sampled videos as one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvdit.contract.files import write_text
from qvdit.report.charts import Bar, bars_svg, kind_variables, layer_kind, layers_svg, mismatches

_FRAMES_PER_SECOND = 8
_SHOWN_WIDTH = 192  # pixels to which small videos are enlarged
_MOST_WIDTH = 480  # pixels beyond which videos are reduced: lossless frames are large
_WORST, _MOST_DIFFERING = 5, 20  # rows of the tables of layers
_STAGES = ("calibrate", "statistics", "quantize", "trace", "export", "parity", "speed", "quality")
_NONE = "—"
_NO_ACCUMULATORS = "none compared: the kernels of static layers do not show them"


@dataclass(frozen=True)
class ReportVideo:
    """A prompt's two videos, sampled from the same seed."""

    prompt: str
    full: np.ndarray  # uint8 [T, H, W, 3], by the full-precision model
    quantized: np.ndarray  # uint8 [T, H, W, 3], by the quantized model in the runtime
    psnr_db: float  # of ``quantized`` against ``full``


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    note: str
    tone: str = "plain"  # plain, good, warn or bad


@dataclass(frozen=True)
class Verdict:
    """What the comparison of integers came to."""

    tone: str  # good, warn or bad
    title: str
    text: str


def write_html(report: dict[str, Any], videos: Sequence[ReportVideo], path: Path) -> None:
    """Write the report as one self-contained HTML file, atomically; the same input gives the same bytes.

    report: the content of report.json. videos: may be empty, uint8 [T, H, W, 3] each.
    """
    write_text(path, _render(report, videos))


def _render(report: dict[str, Any], videos: Sequence[ReportVideo]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qvdit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=_count, size=_size, seconds=_seconds, number=_number, relative=_relative, words=_words, psnr=_psnr
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        bits=report["bits"].upper(),
        tiles=_tiles(report),
        verdict=_verdict(report["parity"]),
        statements=_statements(report["parity"]),
        videos=[_shown(video) for video in videos],
        charts=_charts(report),
        kinds=kind_variables(report["parity"]["layers"]),
        worst=_worst(report["parity"]["layers"]),
        differing=[layer for layer in report["parity"]["layers"] if mismatches(layer)],
        most_differing=_MOST_DIFFERING,
        quality=_quality_rows(report["quality"]),
        stages=_stages(report["stages"]),
    )


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    size = report["size"]
    return [
        _size_tile(size),
        _speed_tile(report["speed"]),
        _psnr_tile(report["quality"]),
        _integers_tile(report["parity"]),
        _bits_tile(size),
    ]


def _bits_tile(size: Mapping[str, Any]) -> Tile:
    note = f"per weight, {size['nominal_weight_bits']:g} nominal"
    return Tile("effective bits", f"{size['effective_weight_bits']:.2f}", note)


def _size_tile(size: Mapping[str, Any]) -> Tile:
    note = f"FP16 {_size(size['weights_fp16_bytes'])} → {_size(size['weights_quantized_bytes'])}"
    ratio = size["ratio"]
    if ratio > 1:
        return Tile("weights larger", _times(ratio), note, "warn")
    return Tile("weights smaller", _times(1 / ratio), note)


def _speed_tile(speed: Mapping[str, Any]) -> Tile:
    speedup = speed["speedup"]
    note = f"FP32 {_milliseconds(speed['fp32_ms'])} → {_milliseconds(speed['quantized_ms'])}"
    if abs(speedup - 1) <= speed["spread"]:
        return Tile("forward pass: no change beyond the spread", _times(speedup), note, "warn")
    if speedup < 1:
        return Tile("forward pass slower", _times(1 / speedup), note, "warn")
    return Tile("forward pass faster", _times(speedup), note)


def _psnr_tile(quality: Mapping[str, Any]) -> Tile:
    if quality["psnr_db"] is None:
        return Tile("PSNR", _NONE, "not measured for this model")
    return Tile("PSNR", _psnr(quality["psnr_db"]), f"against full precision, {_plural(quality['videos'], 'video')}")


def _integers_tile(parity: Mapping[str, Any]) -> Tile:
    if not _compared(parity):
        return Tile("integers differ", _NONE, "none compared", "warn")
    note = f"of {_count(_compared(parity))} compared"
    return Tile("integers differ", _count(_differing(parity)), note, _verdict(parity).tone)


def _compared(parity: Mapping[str, Any]) -> int:
    return parity["xq_compared"] + (parity["acc_compared"] or 0)


def _differing(parity: Mapping[str, Any]) -> int:
    return parity["xq_mismatches"] + (parity["acc_mismatches"] or 0)


def _verdict(parity: Mapping[str, Any]) -> Verdict:
    """Judge the integers; what was not compared is never called equal."""
    compared, total = parity["layers_compared"], parity["layers_total"]
    layers = sum(1 for layer in parity["layers"] if mismatches(layer))
    if _differing(parity) or layers:
        title = f"{_count(_differing(parity))} of {_count(_compared(parity))} integers differ"
        where = f"In {_plural(layers, 'layer')} the" if layers else "The"
        return Verdict("bad", title, f"{where} runtime does not compute what the reference computes. Do not deploy.")
    if not _compared(parity):
        return Verdict("warn", "Not proven", "No integer of the runtime was compared with the reference.")
    if compared < total:
        return Verdict("warn", "Partly proven", f"Only {compared} of {_plural(total, 'layer')} were compared.")
    return Verdict("good", "Exact", "Every layer, fed the reference's own input, computes the reference's integers.")


def _statements(parity: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Subject, finding and whether it is alarming, for a reader who wants the figures."""
    xq, acc = parity["xq_mismatches"], parity["acc_mismatches"]
    return [
        ("Layers compared", f"{_count(parity['layers_compared'])} of {_count(parity['layers_total'])}", False),
        ("Quantized inputs, x_q", _difference(xq, parity["xq_compared"]) or "none compared", bool(xq)),
        ("Accumulators, acc", _difference(acc, parity["acc_compared"]) or _NO_ACCUMULATORS, bool(acc)),
        ("Runtime against quantized reference", _closeness(parity), False),
        ("Error against full precision", _errors(parity), False),
    ]


def _difference(differing: int | None, compared: int | None) -> str:
    """How many differ, or nothing where nothing was compared."""
    return "" if differing is None or not compared else f"{_count(differing)} of {_count(compared)} differ"


def _closeness(parity: Mapping[str, Any]) -> str:
    return f"relative error {_relative(parity['model_rel_err'])}, cosine {parity['model_cosine']:.6f}"


def _errors(parity: Mapping[str, Any]) -> str:
    runtime, reference = _relative(parity["error_runtime"]), _relative(parity["error_reference"])
    return f"{runtime} in the runtime, {reference} in the reference, ratio {parity['error_ratio']:.3f}"


def _charts(report: Mapping[str, Any]) -> dict[str, str]:
    """Inline SVG by name; ``layers`` is empty without layers."""
    layers = report["parity"]["layers"]
    return {
        "layers": layers_svg(layers) if layers else "",
        "size": _size_chart(report),
        "forward": _speed_chart(report, "forward", "fp32_ms", "quantized_ms"),
        "linear": _speed_chart(report, "linear", "linear_fp32_ms", "linear_quantized_ms"),
    }


def _size_chart(report: Mapping[str, Any]) -> str:
    values = report["size"]["weights_fp16_bytes"], report["size"]["weights_quantized_bytes"]
    return _comparison("size", "Weights", ("FP16", report["bits"].upper()), values, [_size(value) for value in values])


def _speed_chart(report: Mapping[str, Any], name: str, full: str, quantized: str) -> str:
    values = report["speed"][full], report["speed"][quantized]
    texts = [_milliseconds(value) for value in values]
    return _comparison(name, f"Time, {name}", ("FP32", report["bits"].upper()), values, texts)


def _comparison(name: str, subject: str, labels: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> str:
    bars = [Bar(*bar) for bar in zip(labels, values, texts, ("full", "quantized"), strict=True)]
    return bars_svg(bars, name, f"{subject}: {labels[0]} {texts[0]}, {labels[1]} {texts[1]}")


def _worst(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers with the largest quantization error, worst first, each with its colour."""
    variables = kind_variables(layers)
    ranked = sorted(layers, key=lambda layer: -layer["quantization_error"])[:_WORST]
    return [{**layer, "variable": variables.get(layer_kind(layer["name"]), "kind-other")} for layer in ranked]


def _quality_rows(quality: Mapping[str, Any]) -> list[dict[str, str]]:
    full, quantized = quality["fp"], quality["quantized"]
    return [_quality_row(name, full.get(name), quantized.get(name)) for name in {**full, **quantized}]


def _quality_row(name: str, full: float | None, quantized: float | None) -> dict[str, str]:
    change = _NONE if full is None or quantized is None else _change(round(quantized, 3) - round(full, 3))
    return {"name": _words(name), "full": _number(full), "quantized": _number(quantized), "change": change}


def _stages(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages in the order in which they run: JSON with sorted keys has lost it."""
    order = [name for name in _STAGES if name in stages] + [name for name in stages if name not in _STAGES]
    return [{"name": name, **stages[name]} for name in order]


def _shown(video: ReportVideo) -> dict[str, Any]:
    frames, _, width, _ = video.full.shape
    return {
        "prompt": video.prompt,
        "psnr": _psnr(video.psnr_db),
        "width": _resized(video.full[0]).width,
        "reduced": _reduction(width),
        "frames": frames,
        "full": _data_uri(video.full),
        "quantized": _data_uri(video.quantized),
    }


def _data_uri(video: np.ndarray) -> str:
    """Lossless animated WebP, which unlike GIF has no palette, of uint8 [T, H, W, 3]."""
    first, *rest = [_resized(frame) for frame in video]
    buffer = io.BytesIO()
    duration = 1000 // _FRAMES_PER_SECOND
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=duration, loop=0, lossless=True, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _resized(frame: np.ndarray) -> Any:
    """A frame, uint8 [H, W, 3], as an image: enlarged by whole pixels if small, averaged if very large."""
    from PIL import Image

    image, scale = Image.fromarray(frame), max(1, round(_SHOWN_WIDTH / frame.shape[1]))
    if scale > 1:
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return image.reduce(_reduction(image.width))


def _reduction(width: int) -> int:
    return math.ceil(width / _MOST_WIDTH)


def _with_unit(number: str, unit: str) -> str:
    """A number and its unit on one line."""
    return f"{number}\u00a0{unit}"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _plural(value: int, noun: str) -> str:
    return f"{_count(value)} {noun}" if value == 1 else f"{_count(value)} {noun}s"


def _size(value: float | None) -> str:
    """Bytes in decimal units with three significant figures."""
    if value is None:
        return _NONE
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return _with_unit(_three_figures(value) if unit != "B" else f"{value:.0f}", unit)
        value /= 1000
    return _with_unit(_three_figures(value), "TB")


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    if value < 99.5:
        return _with_unit(f"{value:.1f}", "s")
    minutes, seconds = divmod(round(value), 60)
    return _with_unit(f"{minutes}", "min") + "\u00a0" + _with_unit(f"{seconds:02d}", "s")


def _milliseconds(value: float) -> str:
    return _with_unit(_three_figures(value), "ms") if value < 9999.5 else _seconds(value / 1000)


def _three_figures(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\u00d7"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _change(value: float) -> str:
    if abs(value) < 0.0005:
        return "0.000"
    return f"{value:+.3f}".replace("-", "\u2212")


def _relative(value: float) -> str:
    """A relative error: percent, or a power of ten where percent would be all zeros."""
    return _with_unit(f"{value * 100:.2f}", "%") if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _psnr(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NONE
    return _with_unit(f"{value:.1f}", "dB") if math.isfinite(value) else "identical"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
