"""Pictures of a run: a roofline, and speeds side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvdit.bench.results import Results
from qvdit.bench.shapes import Shape
from qvdit.contract.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_INK, _MUTED, _GRID = "#1a1a1a", "#5f5f5f", "#e3e3e3"

# What is drawn: label, colour (Okabe and Ito's), marker, then what, rank and weight bits of the rows, and the bytes
# that an element of x, of the weights and of y takes at least.
_DRAWN = (
    ("bf16, cuBLAS", "#999999", "s", ("bf16", 0, None), (2, 2, 2)),
    ("fp8 by rows, product alone", "#56B4E9", "^", ("fp8_row", 0, None), (1, 1, 2)),
    ("ours, product with TQE rank 1", "#E69F00", "D", ("gemm", 1, None), (1, 1, 2)),
    ("fp8 by rows, whole linear", "#0072B2", "v", ("fp8_row_linear", 0, None), (2, 1, 2)),
    ("ours, whole 4-bit linear with TQE rank 1", "#D55E00", "o", ("linear", 1, 4), (2, 0.5, 2)),
)


def write(results: Results, path: Path) -> list[Path]:
    """Write the pictures beside a run's JSON, named after it; returns their paths."""
    if not results.shapes():
        return []
    pictures = {"roofline": _roofline(results), "bars": _bars(results)}
    written = []
    for name, figure in pictures.items():
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        save_figure(figure, written[-1])
    return written


def intensity(shape: Shape, bytes_each: tuple[float, float, float]) -> float:
    """Operations per byte that must be moved."""
    x, weight, y = bytes_each
    moved = x * shape.m * shape.k + weight * shape.n * shape.k + y * shape.m * shape.n
    return 2.0 * shape.m * shape.n * shape.k / moved


def _roofline(results: Results) -> Figure:
    """Achieved TOP/s against arithmetic intensity, below the measured copy bandwidth and the data sheet's peaks."""
    figure, axes = new_axes(9.0, 5.6)
    reached = []
    for label, colour, marker, (what, rank, bits), bytes_each in _DRAWN:
        found = [(shape, results.find(shape, what, rank, bits)) for shape in results.shapes()]
        points = [(intensity(shape, bytes_each), row.tops) for shape, row in found if row and row.tops]
        if points:
            reached += points
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=34, color=colour, marker=marker, label=label, zorder=3)
    low, high = (min(x for x, _ in reached) / 2, max(x for x, _ in reached) * 2) if reached else (10.0, 1000.0)
    peaks = results.peaks
    for name, peak in zip(("int8 and fp8", "bf16"), peaks or (), strict=False):
        _roof(axes, low, high, results.copy_tb_s, peak, name)
    if peaks is None:
        axes.plot([low, high], [low * results.copy_tb_s, high * results.copy_tb_s], color=_INK, linewidth=1.1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(low, high)
    if reached:
        axes.set_ylim(min(y for _, y in reached) / 1.5, 1.25 * max([*(peaks or ()), *(y for _, y in reached)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("operations per byte that must be moved", color=_MUTED)
    axes.set_ylabel("TOP/s", color=_INK)
    axes.set_title(f"{results.gpu}, copy {results.copy_tb_s:.1f} TB/s", loc="left", fontweight="bold", color=_INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower right")
    return figure


def _roof(axes: Axes, low: float, high: float, copy_tb_s: float, peak: float, name: str) -> None:
    """Bandwidth up to the ridge, then the peak."""
    ridge = peak / copy_tb_s if copy_tb_s else low
    xs = [low, max(low, ridge), high]
    axes.plot(xs, [min(peak, x * copy_tb_s) for x in xs], color=_INK, linewidth=1.1, zorder=2)
    axes.annotate(
        f"{name}, {peak:g} TOP/s", (high, peak), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=9
    )


def _bars(results: Results) -> Figure:
    """TOP/s of everything drawn, size by size."""
    shapes = results.shapes()
    figure, axes = new_axes(9.0, 1.6 + 0.62 * len(shapes))
    height = 0.8 / len(_DRAWN)
    for i, (label, colour, _, (what, rank, bits), _) in enumerate(_DRAWN):
        rows = [results.find(shape, what, rank, bits) for shape in shapes]
        values = [0.0 if row is None else row.tops or 0.0 for row in rows]
        places = [place + (i - (len(_DRAWN) - 1) / 2) * height for place in range(len(shapes))]
        axes.barh(places, values, height * 0.92, color=colour, label=label)
        _name_values(axes, places, values)
    axes.set_yticks(range(len(shapes)), [str(shape) for shape in shapes])
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xlabel("TOP/s", color=_MUTED)
    axes.set_title(f"M x N x K on {results.gpu}", loc="left", fontweight="bold", color=_INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    return figure


def _name_values(axes: Axes, places: Sequence[float], values: Sequence[float]) -> None:
    for place, value in zip(places, values, strict=True):
        if value:
            axes.annotate(
                f"{value:.0f}",
                (value, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=_MUTED,
            )


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure in the style of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=_MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """The same rows give the same bytes."""
    metadata = {"Software": None}
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI, metadata=metadata))
