"""Pictures of a table: scene consistency and PSNR against width, and what the bits really stored are worth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvdit.compare.plan import AUTHORS, EARLIER, FULL, OURS, REGIMES, UNIFORM
from qvdit.compare.table import COLUMNS, Cell, mean_of, recipe_order, width_order
from qvdit.contract.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_INK, _MUTED, _GRID = "#1a1a1a", "#5f5f5f", "#e3e3e3"
# Okabe and Ito's colours, which stay apart for colour-blind readers; beyond them markers and dashes tell lines apart.
_PALETTE = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999", "#8C6D00", "#332288")
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "h", "p")
_DASHES = ("-", "--", ":", "-.")
_OURS_COLOUR = "#D55E00"
_PLOTTED = ("scene_consistency", "psnr_db")


@dataclass(frozen=True)
class Style:
    """How a recipe is drawn, in every picture alike."""

    colour: str
    marker: str
    dashes: str
    width: float

    @property
    def size(self) -> float:
        """Of the marker, points."""
        return 3.5 + 1.5 * self.width


def write(cells: Sequence[Cell], out: Path) -> None:
    """Write ``widths.png`` and ``bits.png``; models side by side."""
    if all(cell["recipe"] == FULL for cell in cells):
        return
    _save(_widths(cells), out / "widths.png")
    _save(_bits(cells), out / "bits.png")


def style(name: str) -> Style:
    """A recipe's style, which does not depend on what else is drawn: ours stands out, the authors' comes next."""
    if name == OURS:
        return Style(_OURS_COLOUR, "o", "-", 2.6)
    if name in (AUTHORS, "q-vdit-paper"):
        return Style("#000000", "D" if name == AUTHORS else "s", "-" if name == AUTHORS else "--", 1.7)
    # A method unknown here is one of the user's: its name decides, so that pictures of different tables agree.
    index = EARLIER.index(name) if name in EARLIER else len(EARLIER) + sum(name.encode()) % len(_PALETTE)
    colour = _PALETTE[index % len(_PALETTE)]
    return Style(colour, _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)], 1.2)


def _widths(cells: Sequence[Cell]) -> Figure:
    """A row for each metric, a column for each model: mean ± standard error against width, a line for each recipe."""
    models, uniform = _models(cells), [cell for cell in cells if cell["regime"] == UNIFORM]
    figure, panels = _panels(len(_PLOTTED), len(models))
    for (row, metric), (column, model) in itertools.product(enumerate(_PLOTTED), enumerate(models)):
        axes = panels[row][column]
        members = [cell for cell in uniform if cell["model"] == model]
        widths = sorted({cell["bits"] for cell in members if cell["recipe"] != FULL}, key=width_order)
        _full_line(axes, members, metric)
        for recipe in _recipes(members):
            _line(axes, [cell for cell in members if cell["recipe"] == recipe], metric, widths)
        axes.set_xticks(range(len(widths)), widths)
        axes.set_xlim(-0.35, max(len(widths) - 0.65, 0.35))
        if metric == "scene_consistency":
            axes.set_ylim(0, _top(cells))
            _title(axes, model)
        if column == 0:
            axes.set_ylabel(COLUMNS[metric], color=_INK)
    for axes in panels[-1]:
        axes.set_xlabel("bits of weights and activations", color=_MUTED)
    _legend(figure, panels)
    return figure


def _bits(cells: Sequence[Cell]) -> Figure:
    """Scene consistency against effective bits: a row for each regime, a column for each model."""
    models = _models(cells)
    regimes = [regime for regime in REGIMES if any(c["regime"] == regime and c["recipe"] != FULL for c in cells)]
    effective = [cell["effective_weight_bits"] for cell in cells if cell["recipe"] != FULL]
    figure, panels = _panels(len(regimes), len(models))
    for (row, regime), (column, model) in itertools.product(enumerate(regimes), enumerate(models)):
        axes = panels[row][column]
        members = [cell for cell in cells if cell["model"] == model]
        _full_line(axes, members, "scene_consistency")
        for cell in members:
            if cell["regime"] == regime and cell["recipe"] != FULL:
                _point(axes, cell)
        axes.set_ylim(0, _top(cells))
        axes.set_xlim(min(effective) - 0.3, max(effective) + 0.3)
        _title(axes, model if regime == UNIFORM else f"{model}, {regime}")
        if column == 0:
            axes.set_ylabel(COLUMNS["scene_consistency"], color=_INK)
    for axes in panels[-1]:
        axes.set_xlabel("effective bits of a weight, everything stored counted", color=_MUTED)
    _legend(figure, panels, ("filled: 8-bit activations", "hollow: 6-bit activations"))
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, color=_INK, fontsize=12, fontweight="bold", loc="left")


def _top(cells: Sequence[Cell]) -> float:
    """Upper end of the axis of scene consistency: the markers of the best are not cut."""
    return 1.06 * max((mean_of(cell, "scene_consistency") or 0.0 for cell in cells), default=1.0) or 1.0


def _line(axes: Axes, cells: Sequence[Cell], metric: str, widths: Sequence[str]) -> None:
    """One recipe's line; where a width is missing the line is broken rather than drawn through."""
    by_width = {cell["bits"]: cell for cell in cells}
    means = [mean_of(by_width.get(width), metric) for width in widths]
    if all(mean is None for mean in means):
        return
    nan = float("nan")
    values = [nan if mean is None else mean for mean in means]
    errors = [_error(by_width.get(width), metric) for width in widths]
    drawn = style(cells[0]["recipe"])
    axes.errorbar(
        range(len(widths)),
        values,
        yerr=errors,
        label=cells[0]["recipe"],
        color=drawn.colour,
        marker=drawn.marker,
        linestyle=drawn.dashes,
        linewidth=drawn.width,
        markersize=drawn.size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=0.9,
        zorder=3 + drawn.width,
    )


def _error(cell: Cell | None, metric: str) -> float:
    return 0.0 if mean_of(cell, metric) is None or cell is None else cell["metrics"][metric]["sem"] or 0.0


def _point(axes: Axes, cell: Cell) -> None:
    """One cell; activations of 8 bits are filled, others hollow."""
    mean = mean_of(cell, "scene_consistency")
    if mean is None:
        return
    drawn = style(cell["recipe"])
    filled = cell["bits"].endswith("a8")
    axes.scatter(
        cell["effective_weight_bits"],
        mean,
        s=4 * drawn.size**2 / 3,
        label=cell["recipe"],
        marker=drawn.marker,
        facecolors=drawn.colour if filled else "white",
        edgecolors=drawn.colour,
        linewidths=1.3,
        zorder=3 + drawn.width,
    )


def _full_line(axes: Axes, cells: Sequence[Cell], metric: str) -> None:
    full = next((mean_of(cell, metric) for cell in cells if cell["recipe"] == FULL), None)
    if full is not None:
        axes.axhline(full, color=_INK, linewidth=1, linestyle=(0, (1, 1.5)), label="full precision", zorder=2)


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * columns + 2.0, 3.2 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for axes in panels.flat:
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(length=0, labelcolor=_MUTED)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#b0b0b0")
    return figure, panels.tolist()


def _legend(figure: Figure, panels: Sequence[Sequence[Axes]], notes: Sequence[str] = ()) -> None:
    """One legend for all panels, in the order of the table's rows."""
    from matplotlib.lines import Line2D

    handles: dict[str, Any] = {}
    for axes in itertools.chain.from_iterable(panels):
        found, labels = axes.get_legend_handles_labels()
        handles |= {name: handle for name, handle in zip(labels, found, strict=True) if name not in handles}
    names = sorted(handles, key=lambda name: (-2, "") if name == "full precision" else recipe_order(name))
    shown: list[Any] = [handles[name] if not notes else _marker(name, handles[name]) for name in names]
    shown += [Line2D([], [], linestyle="none")] * len(notes)
    figure.legend(shown, [*names, *notes], loc="outside right center", frameon=False, labelcolor=_INK, fontsize=9.5)


def _marker(name: str, handle: Any) -> Any:
    """A filled marker for a recipe, whichever of its points came first."""
    from matplotlib.lines import Line2D

    if name == "full precision":
        return handle
    drawn = style(name)
    return Line2D([], [], color=drawn.colour, marker=drawn.marker, linestyle="none", markersize=drawn.size)


def _models(cells: Sequence[Cell]) -> list[str]:
    return sorted({cell["model"] for cell in cells})


def _recipes(cells: Sequence[Cell]) -> list[str]:
    return sorted({cell["recipe"] for cell in cells} - {FULL}, key=recipe_order)


def _save(figure: Figure, path: Path) -> None:
    """The same cells give the same bytes: nothing of the library's version or the date goes into the file."""
    metadata = {"Software": None}
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI, metadata=metadata))
