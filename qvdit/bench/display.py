"""A benchmark on the terminal: a line for each size as it is measured, then tables and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from qvdit.bench.floors import Figure, Verdict, verdicts
from qvdit.bench.results import Results, Row
from qvdit.bench.saved import ratio
from qvdit.bench.shapes import Shape

_WIDTH = 144  # where the terminal does not say: a log
_WORST = 3  # figures shown of a floor that is met
_SPREAD = 0.05  # interquartile ranges above this share of the median are said


def console() -> Console:
    """Standard output, wide enough for a line of the table where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=_WIDTH, highlight=False)


class Lines:
    """Shows rows as they come."""

    def __init__(self, to: Console):
        self.to = to
        self.begun = False

    def say(self, text: str) -> None:
        self.to.print(text, style="dim", markup=False, soft_wrap=True)

    def measured(self, results: Results, rows: Sequence[Row]) -> None:
        for shape in dict.fromkeys(row.shape for row in rows if not row.what.startswith("block_")):
            self.to.print(_filled(results, [shape], _SPEED, header=not self.begun))
            self.begun = True
        for row in rows:
            if row.what.startswith("block_"):
                self.say(f"{row.what} w{row.weight_bits}a{row.act_bits}: {row.ms:.2f} ms")


def show(results: Results, to: Console) -> None:
    """All of a run: tables, then what of the floors is met."""
    to.print(f"{results.gpu}, driver {results.driver}, {results.date}: {results.command}", soft_wrap=True, markup=False)
    limit = f", within {results.power_limit_w:.0f} W" if results.power_limit_w else ""
    to.print(f"copy: {results.copy_tb_s:.2f} TB/s, read and written{limit}. TOP/s unless said otherwise.")
    for columns in (_SPEED, _MEMORY):
        if results.shapes():
            to.print(_filled(results, results.shapes(), columns))
    if long := list(dict.fromkeys(row.shape for row in results.rows if row.sustained)):
        to.print("TOP/s, each by itself, at the clocks that the GPU's power limit leaves it:")
        to.print(_filled(results, long, _SUSTAINED))
    if results.blocks():
        to.print(_blocks(results))
    noisy = [row for row in results.rows if row.spread > _SPREAD]
    to.print(f"spread (interquartile range / median) above {_SPREAD:.0%}: {len(noisy)} of {len(results.rows)} rows")
    for verdict in verdicts(results):
        for line in say(verdict):
            to.print(line, markup=False, soft_wrap=True)


def say(verdict: Verdict) -> Iterator[str]:
    """A verdict in lines: the floor, then what misses it, or what comes closest."""
    state = {True: "met", False: "MISSED", None: "not measured"}[verdict.met]
    count = f", {len(verdict.figures) - len(verdict.missed)} of {len(verdict.figures)}" if verdict.figures else ""
    yield f"{state}{count}: {verdict.floor}"
    for figure in verdict.missed or verdict.figures[:_WORST]:
        yield f"    {_figure(figure, verdict.unit)}"


def _figure(figure: Figure, unit: str) -> str:
    shown = f"{figure.value:.2f}x" if unit == "x" else f"{figure.value:.1f} {unit}"
    against = f" ({'at most' if figure.most else 'at least'} {figure.bound:g})" if figure.bound else ""
    return f"{figure.where}: {shown}{against}"


# Columns: a heading, and a cell from the results of a size ----------------------------------------------------------

Cell = Callable[[Results, Shape], str]


def _tops(what: str, rank: int = 0, weight_bits: int | None = None, sustained: bool = False) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        row = results.find(shape, what, rank, weight_bits, sustained=sustained)
        return "" if row is None or row.tops is None else f"{row.tops:.0f}"

    return cell


def _times(
    what: str, rank: int, weight_bits: int | None = None, against: str = "bf16", sustained: bool = False
) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        slow = results.find(shape, against, sustained=sustained)
        found = ratio(slow, results.find(shape, what, rank, weight_bits, sustained=sustained))
        return "" if found is None else f"{found:.2f}"

    return cell


def _share(what: str, rank: int) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        row = results.find(shape, what, rank)
        known = row is not None and row.tops is not None and results.peaks is not None
        return f"{row.tops / results.peaks[0]:.0%}" if known else ""  # type: ignore[index,operator,union-attr]

    return cell


def _rate(what: str, rank: int = 0, prologue: str | None = None, weight_bits: int | None = None) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        row = results.find(shape, what, rank, weight_bits, prologue)
        return "" if row is None or row.gb_s is None else f"{row.gb_s:.0f}"

    return cell


def _cost(rank: int) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        found = ratio(results.find(shape, "linear", rank, 4), results.find(shape, "linear", 0, 4))
        return "" if found is None else f"{100 * (found - 1):+.1f}"

    return cell


def _ms(what: str, rank: int = 0, weight_bits: int | None = None) -> Cell:
    def cell(results: Results, shape: Shape) -> str:
        row = results.find(shape, what, rank, weight_bits)
        return "" if row is None else f"{row.ms:.3f}"

    return cell


_SPEED: tuple[tuple[str, Cell], ...] = (
    ("M x N x K", lambda _, shape: str(shape)),
    ("bf16", _tops("bf16")),
    ("int8 lib", _tops("int8_cublaslt")),
    ("fp8", _tops("fp8_row")),
    ("CUTLASS", _tops("cutlass_s8")),
    ("GEMM r1", _tops("gemm", 1)),
    ("/ bf16", _times("gemm", 1)),
    ("of peak", _share("gemm", 1)),
    ("unfused", _tops("unfused_w4a8")),
    ("fp8 lin", _tops("fp8_row_linear")),
    ("lin r1", _tops("linear", 1, 4)),
    ("/ bf16", _times("linear", 1, 4)),
    ("quant GB/s", _rate("quantize", 1)),
    ("copy GB/s", _rate("copy")),
)
_MEMORY: tuple[tuple[str, Cell], ...] = (
    ("M x N x K", lambda _, shape: str(shape)),
    ("bf16 ms", _ms("bf16")),
    ("lin r0 ms", _ms("linear", 0, 4)),
    ("r1 +%", _cost(1)),
    ("r4 +%", _cost(4)),
    ("w3 r1 ms", _ms("linear", 1, 3)),
    ("copy GB/s", _rate("copy")),
    ("quant r0", _rate("quantize")),
    ("r1", _rate("quantize", 1)),
    ("r4", _rate("quantize", 4)),
    ("GELU", _rate("quantize", 1, "gelu")),
    ("LN", _rate("quantize", 1, "layernorm")),
    ("unpack w4", _rate("unpack", weight_bits=4)),
)


_SUSTAINED: tuple[tuple[str, Cell], ...] = (
    ("M x N x K", lambda _, shape: str(shape)),
    ("bf16", _tops("bf16", sustained=True)),
    ("fp8", _tops("fp8_row", sustained=True)),
    ("GEMM r1", _tops("gemm", 1, sustained=True)),
    ("/ bf16", _times("gemm", 1, sustained=True)),
    ("/ fp8", _times("gemm", 1, against="fp8_row", sustained=True)),
)


def _filled(
    results: Results, shapes: Sequence[Shape], columns: Sequence[tuple[str, Cell]], header: bool = True
) -> Table:
    """A line for each size, columns as wide as any size needs: lines printed one by one stand below each other."""
    table = Table(box=None, show_header=header, padding=(0, 1), header_style="bold")
    for i, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if i else "left", width=22 if i == 0 else 7, no_wrap=False)
    for shape in shapes:
        table.add_row(*(cell(results, shape) for _, cell in columns))
    return table


def _blocks(results: Results) -> Table:
    """Where a block's time goes, ms."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    parts = list(dict.fromkeys(part for row in results.blocks() for part in row.parts_ms or {}))
    for i, heading in enumerate(("block", "ms", "TOP/s", *parts)):
        table.add_column(heading, justify="right" if i else "left")
    for row in results.blocks():
        spent = [f"{(row.parts_ms or {}).get(part, 0.0):.2f}" for part in parts]
        kind = "bf16" if row.weight_bits == 16 else f"w{row.weight_bits}a{row.act_bits}"
        table.add_row(f"{row.what} {kind}", f"{row.ms:.2f}", f"{row.tops or 0:.0f}", *spent)
    return table
