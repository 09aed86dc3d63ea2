"""Engines on the terminal: a line each as they are measured, then a table and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qvdit.bench.display import say
from qvdit.bench.saved import ratio
from qvdit.bench.tensorrt.floors import verdicts
from qvdit.bench.tensorrt.results import Results, Row

_HEADINGS = (
    "engine",
    "ms",
    "± %",
    "/ FP16",
    "weights MB",
    "engine MB",
    "GPU MB",
    "rel. error",
    "error ratio",
    "layers",
)


class Lines:
    """Shows rows as they come."""

    def __init__(self, to: Console):
        self.to = to

    def say(self, text: str) -> None:
        self.to.print(text, style="dim", markup=False, soft_wrap=True)

    def measured(self, results: Results, rows: Sequence[Row]) -> None:
        for row in rows:
            self.say(f"{row.model} as {row.engine}: {row.ms:.3f} ms")


def show(results: Results, to: Console) -> None:
    """All of a run: a table a model, then what of the floors is met."""
    to.print(f"{results.gpu}, driver {results.driver}, {results.date}: {results.command}", soft_wrap=True, markup=False)
    to.print(f"TensorRT {results.versions.get('tensorrt', 'unknown')}; layers: compared / integers that differ")
    to.print("rel. error: to PyTorch's FP16 run; / FP16 run, / float32: error to full precision over PyTorch's")
    for model in results.models():
        to.print(_table(results, model))
    for verdict in verdicts(results):
        for line in say(verdict):
            to.print(line, markup=False, soft_wrap=True)


def _table(results: Results, model: str) -> Table:
    table = Table(title=model, title_justify="left", box=None, padding=(0, 1), header_style="bold")
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if index else "left")
    for row in results.rows:
        if row.model == model:
            table.add_row(*_cells(results, row))
    return table


def _cells(results: Results, row: Row) -> list[str]:
    faster = ratio(results.find(row.model, "fp16"), row)
    differ = row.xq_mismatches + row.acc_mismatches
    return [
        row.engine,
        f"{row.ms:.3f}",
        f"{100 * row.spread:.1f}",
        "" if faster is None else f"{faster:.2f}x",
        *(f"{size / 1e6:.1f}" for size in (row.weight_bytes, row.engine_bytes, row.device_bytes)),
        "NaN" if row.rel_err is None else f"{row.rel_err:.1e}",
        "NaN" if row.error_ratio is None else f"{row.error_ratio:.3f}",
        "" if row.error_ratio_float32 is None else f"{row.error_ratio_float32:.3f}",
        f"{row.layers_compared} / {differ}" if row.layers_compared else "",
    ]
