"""Charts as inline SVG whose colours are the page's own CSS variables, so that they follow its theme."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_VARIABLES = ("kind-1", "kind-2", "kind-3", "kind-4")
OTHER, OTHER_VARIABLE = "other", "kind-other"
_VARIABLES = ("ink", "muted", "line", "band", "full", "quantized", "bad", *KIND_VARIABLES, OTHER_VARIABLE)
_UNITS_PER_INCH = 72  # of matplotlib's SVG
_FONT = 12
_MOST_BLOCK_LABELS = 30


@dataclass(frozen=True)
class Bar:
    """One bar of a comparison."""

    label: str
    value: float
    text: str  # what is written at its end, with the unit
    variable: str  # CSS variable of its colour


def layer_kind(name: str) -> str:
    """What a layer belongs to: the part after the block's number, ``attn1`` of ``blocks.0.attn1.to_q``."""
    parts = name.split(".")
    named = [part for part in parts[_block_depth(parts) :] if not part.isdigit()]
    return named[0] if named else parts[0]


def kind_variables(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The CSS variable of every kind of layer; kinds beyond the palette share the last colour as ``other``."""
    kinds = list(dict.fromkeys(layer_kind(layer["name"]) for layer in layers))
    variables = dict(zip(kinds, KIND_VARIABLES, strict=False))
    return variables if len(variables) == len(kinds) else {**variables, OTHER: OTHER_VARIABLE}


def mismatches(layer: Mapping[str, Any]) -> int:
    """How many integers of a layer differ, inputs and accumulators together."""
    return layer["xq_mismatches"] + (layer["acc_mismatches"] or 0)


def layers_svg(layers: Sequence[Mapping[str, Any]]) -> str:
    """Quantization error of every layer in model order, coloured by kind, with a mark over each that differs."""
    figure, axes = _figure(1080, 270)
    variables = kind_variables(layers)
    errors = [layer["quantization_error"] for layer in layers]
    colours = [_colour(variables.get(layer_kind(layer["name"]), OTHER_VARIABLE)) for layer in layers]
    for index, bar in enumerate(axes.bar(range(len(layers)), errors, width=0.8, color=colours, zorder=2)):
        bar.set_gid(f"layer{index}")
    top = max(errors) or 1.0
    _mark_mismatches(axes, layers, errors, top)
    _label_blocks(axes, [layer["name"] for layer in layers])
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylim(0, top * 1.18)
    _percent_axis(axes)
    svg = _svg(figure, "layers", f"Quantization error of each of {len(layers)} layers")
    return _with_titles(svg, [_layer_title(layer) for layer in layers])


def bars_svg(bars: Sequence[Bar], identifier: str, label: str) -> str:
    """Horizontal bars, each with its value at the end. ``identifier`` is unique in the page, ``label`` says it all."""
    figure, axes = _figure(400, 40 * len(bars))
    axes.barh([bar.label for bar in bars], [bar.value for bar in bars], 0.66, color=[_colour(b.variable) for b in bars])
    longest = max(bar.value for bar in bars) or 1.0
    for row, bar in enumerate(bars):
        axes.text(bar.value + longest * 0.02, row, bar.text, va="center", color=_colour("ink"), fontsize=_FONT + 1)
    axes.set_xlim(0, longest * 1.32)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", labelcolor=_colour("ink"), labelsize=_FONT + 1)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure, identifier, label)


def _block_depth(parts: Sequence[str]) -> int:
    """How many parts of a name lead to its block: those up to the first number, 0 if there is none."""
    return next((index + 1 for index, part in enumerate(parts) if part.isdigit()), 0)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: _block_depth(parts)])


def _runs(names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Neighbouring layers of one block: its number, the first layer's index and how many there are."""
    start = 0
    for block, members in itertools.groupby(names, _block):
        count = len(list(members))
        yield block.rpartition(".")[2], start, count
        start += count


def _label_blocks(axes: Axes, names: Sequence[str]) -> None:
    runs = [run for run in _runs(names) if run[0]]
    if not runs:
        axes.set_xlabel("layer", color=_colour("muted"), fontsize=_FONT)
        return
    for _, start, count in runs[1::2]:
        axes.axvspan(start - 0.5, start + count - 0.5, color=_colour("band"), linewidth=0, zorder=0)
    shown = runs[:: -(-len(runs) // _MOST_BLOCK_LABELS)]
    axes.set_xticks([start + (count - 1) / 2 for _, start, count in shown], [label for label, _, _ in shown])
    axes.set_xlabel("block", color=_colour("muted"), fontsize=_FONT)


def _mark_mismatches(axes: Axes, layers: Sequence[Mapping[str, Any]], errors: Sequence[float], top: float) -> None:
    differing = [index for index, layer in enumerate(layers) if mismatches(layer)]
    axes.vlines(differing, [errors[i] for i in differing], top * 1.09, color=_colour("bad"), linewidth=1.5, zorder=3)
    axes.plot(differing, [top * 1.1] * len(differing), "X", color=_colour("bad"), markersize=10, zorder=4)


def _layer_title(layer: Mapping[str, Any]) -> str:
    title = f"{layer['name']}: {layer['quantization_error'] * 100:.2f}\u00a0%, {layer['weight_bits']}-bit weights"
    return f"{title}, {mismatches(layer)} integers differ" if mismatches(layer) else title


def _percent_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\u00a0%"))
    axes.grid(axis="y", color=_colour("line"), linewidth=1, zorder=1)


def _figure(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty figure of this many SVG units and its bare axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _UNITS_PER_INCH, height / _UNITS_PER_INCH), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_colour("muted"), labelsize=_FONT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_colour("line"))
    return figure, axes


def _colour(variable: str) -> str:
    """A colour that stands for a CSS variable until the SVG is written: matplotlib knows no variables."""
    return f"#0000{_VARIABLES.index(variable) + 1:02x}"


def _svg(figure: Figure, identifier: str, label: str) -> str:
    """The figure as an SVG element to put into HTML, the same bytes each time."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identifier}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), identifier, label)


def _inline(document: str, identifier: str, label: str) -> str:
    """Reduce an SVG document to an element: no prolog, no namespaces, identifiers of its own, CSS variables."""
    body = document[document.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box
    body = body[body.index(">") + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", body)
    body = re.sub(r"#0000([0-9a-f]{2})\b", lambda match: f"var(--{_VARIABLES[int(match[1], 16) - 1]})", body)
    return f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">\n{body}\n'


def _with_titles(svg: str, titles: Sequence[str]) -> str:
    """Give the bars their tooltips."""

    def titled(match: re.Match[str]) -> str:
        return f"{match[0]}<title>{html.escape(titles[int(match[1])])}</title>"

    return re.sub(r'<g id="[a-z]+-layer(\d+)">', titled, svg)
