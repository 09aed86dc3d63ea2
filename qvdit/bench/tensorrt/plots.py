"""Latency and bytes of weights, engine by engine, as bars beside the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvdit.bench.plots import new_axes, save_figure
from qvdit.bench.tensorrt.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "fp16": "#8c8c8c",
    "int8_qdq": "#b8860b",
    "w8a8": "#7fb3d5",
    "w4a8": "#1f618d",
    "w4a8_no_tqe": "#5499c7",
    "w3a6": "#117864",
}


def write(results: Results, path: Path) -> list[Path]:
    """Pictures beside a results file; returns them."""
    found = []
    for model in results.models():
        picture = path.with_name(f"{path.stem}-{model}.png")
        save_figure(_bars(results, model), picture)
        found.append(picture)
    return found


def _bars(results: Results, model: str) -> Figure:
    rows = [row for row in results.rows if row.model == model]
    figure, axes = new_axes(7.0, 1.2 + 0.42 * len(rows))
    places = range(len(rows))
    axes.barh(places, [row.ms for row in rows], 0.7, color=[_COLOURS.get(row.engine, "#8c8c8c") for row in rows])
    for place, row in zip(places, rows, strict=True):
        text = f"{row.ms:.2f} ms, weights {row.weight_bytes / 1e6:.1f} MB"
        axes.annotate(text, (row.ms, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [row.engine for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * max(row.ms for row in rows))
    axes.set_xlabel("ms a forward pass")
    version = results.versions.get("tensorrt", "")
    axes.set_title(f"{model}, TensorRT {version} on {results.gpu}", loc="left", fontweight="bold")
    return figure
