"""From finished cells to one table: which cells belong together, how rows are ordered, and how it is written.

Cells are the dictionaries of their JSON files. Everything here needs nothing but them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qvdit.compare.plan import AUTHORS, EARLIER, FULL, MLP8, OURS, UNIFORM
from qvdit.contract import Bits

Cell = dict[str, Any]

COLUMNS = {
    "scene_consistency": "scene consistency",
    "subject_consistency": "subject consistency",
    "background_consistency": "background consistency",
    "motion_smoothness": "motion smoothness",
    "dynamic_degree": "dynamic degree",
    "imaging_quality": "imaging quality",
    "overall_consistency": "overall consistency",
    "psnr_db": "PSNR, dB",
}
"""The metrics and their headings. All of them are better when they are higher."""

_LAST = (AUTHORS, "q-vdit-paper", OURS)
_NONE = "—"
_PARTED = 0.5  # of full precision's scene consistency: below it a method has failed


# Which cells --------------------------------------------------------------------------------------------------------


def select(
    cells: Iterable[Cell],
    terms: str | None = None,
    budget: str | None = None,
    asked: frozenset[str] = frozenset(),
) -> list[Cell]:
    """The cells of one table, in its order, none twice; those measured on other terms are not comparable.

    terms, budget: digests of what must be the same; those of most cells when absent. Of two cells for one place that in
    ``asked`` (a set of keys) wins, or else the newer.
    """
    cells = list(cells)
    terms = terms or _most(cell["terms"] for cell in cells)
    cells = [cell for cell in cells if cell["terms"] == terms]
    budget = budget or _most(cell["budget"] for cell in cells if cell["budget"])
    cells = [cell for cell in cells if cell["budget"] in (None, budget)]
    cells.sort(key=lambda cell: (cell["key"] in asked, cell.get("date", "")))
    return sorted({label(cell): cell for cell in cells}.values(), key=_place)


def label(cell: Cell) -> tuple[str, str, str, str]:
    """Model, recipe, bits and regime."""
    return cell["model"], cell["recipe"], cell["bits"], cell["regime"]


def recipe_order(name: str) -> tuple[int, str]:
    """Where a recipe's row stands: earlier methods as the paper lists them, others by name, Q-VDiT's, ours last."""
    if name in EARLIER:
        return EARLIER.index(name), ""
    if name in _LAST:
        return len(EARLIER) + 1 + _LAST.index(name), ""
    return (-1, "") if name == FULL else (len(EARLIER), name)


def width_order(bits: str) -> tuple[int, int]:
    """Where a width stands: widest weights first, then widest activations."""
    parsed = Bits.parse(bits)
    return -parsed.weight, -parsed.act


def _place(cell: Cell) -> tuple[Any, ...]:
    width = (-99, 0) if cell["recipe"] == FULL else width_order(cell["bits"])
    return cell["model"], cell["regime"] == MLP8, width, recipe_order(cell["recipe"])


def _most(values: Iterable[str]) -> str | None:
    counted = Counter(values)
    return max(counted, key=lambda value: (counted[value], value)) if counted else None


# quality.json -------------------------------------------------------------------------------------------------------


def quality(cells: Sequence[Cell]) -> dict[str, Any]:
    """What quality.json holds: the cells, and what measured them. The same cells give the same content."""
    newest = max(cells, key=lambda cell: cell.get("date", ""))
    names = sorted({name for cell in cells for name in cell.get("versions", {})})
    return {
        "command": newest.get("command", ""),
        "versions": {name: _all(cell.get("versions", {}).get(name) for cell in cells) for name in names},
        "device": _all(cell.get("device") for cell in cells),
        "date": newest.get("date", "")[:10],
        "cells": [{name: value for name, value in cell.items() if name != "versions"} for cell in cells],
    }


def _all(values: Iterable[str | None]) -> str:
    """What was the same, or all that there were."""
    return ", ".join(sorted({value for value in values if value}))


# table.md -----------------------------------------------------------------------------------------------------------


def markdown(cells: Sequence[Cell]) -> str:
    """The table as Markdown, and where the methods part."""
    facts = quality(cells)
    lines = [
        "# Quantization methods compared",
        "",
        f"{_counts(cells)}; mean ± standard error of the mean over all videos. {facts['device']}, {facts['date']}.",
        "Bits: nominal is what the weights' integers have, effective is everything stored, by the number of weights.",
        "In bold: the best of its width among quantized models. PSNR is against full precision, from the same noise.",
        "",
        f"    {facts['command']}",
        "",
    ]
    models = itertools.groupby(cells, key=lambda cell: cell["model"])
    by_model = {model: list(members) for model, members in models}
    for model, members in by_model.items():
        lines += [f"## {model}", "", *_model_table(members), ""]
    lines += ["## Where the methods part", ""]
    for model, members in by_model.items():
        lines += [f"- **{model}**: {parting_text(members)}"]
    return "\n".join(lines) + "\n"


def _counts(cells: Sequence[Cell]) -> str:
    counts = sorted({(cell.get("videos", 0), cell.get("seeds", 0)) for cell in cells})
    return ", ".join(f"{videos} videos of {seeds} seed{'s' * (seeds != 1)}" for videos, seeds in counts)


def _model_table(cells: Sequence[Cell]) -> list[str]:
    heads = ["width", "method", "nominal bits", "effective bits", *COLUMNS.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'--:|' * (len(heads) - 2)}"]
    for (width, regime), group in itertools.groupby(cells, key=lambda cell: (cell["bits"], cell["regime"])):
        members = list(group)
        best = {name: _best(members, name) for name in COLUMNS}
        for cell in members:
            title = width if regime == UNIFORM else f"{width}, {regime}"
            bits = [f"{cell['nominal_weight_bits']:.2f}", f"{cell['effective_weight_bits']:.2f}"]
            values = [_emphasized(cell, name, best[name]) for name in COLUMNS]
            lines.append(f"| {' | '.join([title, cell['recipe'], *bits, *values])} |")
    return lines


def _best(group: Sequence[Cell], metric: str) -> str | None:
    """The highest mean as it is written; None where there is nothing to choose from."""
    means = [mean for cell in group if cell["recipe"] != FULL and (mean := mean_of(cell, metric)) is not None]
    return _number(max(means), metric) if len(means) > 1 else None


def _emphasized(cell: Cell, metric: str, best: str | None) -> str:
    text, mean = value_text(cell, metric), mean_of(cell, metric)
    return f"**{text}**" if mean is not None and _number(mean, metric) == best else text


def mean_of(cell: Cell | None, metric: str) -> float | None:
    """A metric's mean; None where it was not measured or is not finite."""
    found = None if cell is None else cell["metrics"].get(metric)
    return None if found is None else found["mean"]


def value_text(cell: Cell, metric: str) -> str:
    """Mean ± standard error."""
    mean = mean_of(cell, metric)
    if mean is None:
        return _NONE
    error = cell["metrics"][metric]["sem"]
    return f"{_number(mean, metric)} ± {_NONE if error is None else _number(error, metric)}"


def _number(value: float, metric: str) -> str:
    return f"{value:.2f}" if metric == "psnr_db" else f"{value:.3f}"


# Where the methods part ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parting:
    """The widest width at which every earlier method fails, and who does not."""

    bits: str
    full: Cell
    earlier: Cell  # the best of them
    measured: int  # how many earlier methods have been measured there
    ours: Cell | None
    authors: Cell | None

    def ratio(self) -> float | None:
        """Ours over the best earlier method, in scene consistency."""
        ours, earlier = (mean_of(cell, "scene_consistency") for cell in (self.ours, self.earlier))
        return ours / earlier if ours is not None and earlier else None

    def lead(self) -> float | None:
        """Ours minus the authors' method, in standard errors of the difference (as if of different videos)."""
        ours, authors = (mean_of(cell, "scene_consistency") for cell in (self.ours, self.authors))
        error = math.hypot(_scene_error(self.ours), _scene_error(self.authors))
        return (ours - authors) / error if ours is not None and authors is not None and error else None


def _scene_error(cell: Cell | None) -> float:
    return 0.0 if cell is None else cell["metrics"]["scene_consistency"]["sem"] or 0.0


def parting(cells: Sequence[Cell]) -> Parting | None:
    """Where one model's methods part: the first uniform width, from w8a8 down, at which no earlier method keeps half of
    full precision's scene consistency. None if there is no such width, or no full precision to compare with.
    """
    full = next((cell for cell in cells if cell["recipe"] == FULL), None)
    whole = mean_of(full, "scene_consistency")
    if full is None or whole is None:
        return None
    uniform = [cell for cell in cells if cell["regime"] == UNIFORM and cell["recipe"] != FULL]
    for bits in sorted({cell["bits"] for cell in uniform}, key=width_order):
        at = {cell["recipe"]: cell for cell in uniform if cell["bits"] == bits}
        earlier = [at[name] for name in EARLIER if name in at]
        best = max(earlier, key=lambda cell: mean_of(cell, "scene_consistency") or 0.0, default=None)
        if best is not None and (mean_of(best, "scene_consistency") or 0.0) < _PARTED * whole:
            return Parting(bits, full, best, len(earlier), at.get(OURS), at.get(AUTHORS))
    return None


def parting_text(cells: Sequence[Cell]) -> str:
    """Where one model's methods part, in words."""
    if not any(cell["recipe"] == FULL for cell in cells):
        return "full precision has not been measured."
    found = parting(cells)
    if found is None:
        return f"nowhere: at every width measured an earlier method keeps {_PARTED:g} of full precision's scene score."
    scene = "scene_consistency"
    text = (
        f"at {found.bits} the best of {found.measured} earlier methods measured, {found.earlier['recipe']}, has "
        f"{value_text(found.earlier, scene)} where full precision has {value_text(found.full, scene)}. "
    )
    if found.ours is None:
        return f"{text}{OURS} has not been measured there."
    ratio, lead = found.ratio(), found.lead()
    text += f"{OURS} has {value_text(found.ours, scene)}"
    text += ", which has no ratio to it. " if ratio is None else f", **{ratio:.2f} times** as much. "
    if found.authors is None:
        return f"{text}{AUTHORS} has not been measured there."
    text += f"{AUTHORS} has {value_text(found.authors, scene)}"
    return f"{text}." if lead is None else f"{text}; ours minus theirs is **{lead:+.1f} standard errors**."
