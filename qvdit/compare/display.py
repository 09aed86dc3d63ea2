"""A comparison on the terminal: bars while it runs, a table at its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qvdit.compare.fill import Outcome
from qvdit.compare.plan import FULL, UNIFORM
from qvdit.compare.table import Cell, value_text


class Bars:
    """A bar for all cells, with the time that is left, and one for what is being done in the present cell."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.overall = progress.add_task("cells", total=None, note="")
        self.inner = progress.add_task("", total=None, visible=False, note="")

    def items(self, done: int, total: int, seconds_left: float | None) -> None:
        note = "" if seconds_left is None or done == total else f"about {duration(seconds_left)} left"
        self.progress.update(self.overall, completed=done, total=total, note=note)
        self.progress.update(self.inner, visible=done < total)

    def stage(self, name: str, done: int, total: int) -> None:
        changed = self.progress.tasks[self.inner].description != name
        if changed:
            self.progress.reset(self.inner)
        self.progress.update(self.inner, description=name, completed=done, total=total)

    def say(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True, highlight=False, markup=False, style="dim")


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Bars for as long as the comparison runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


def say_left(console: Console, outcome: Outcome) -> None:
    """Say what could not be measured and what there was no time for."""
    for text in outcome.failed:
        console.print(f"failed: {text}", soft_wrap=True, highlight=False, markup=False, style="red")
    if outcome.elsewhere:
        console.print(f"{len(outcome.elsewhere)} were left to other processes: --render writes the table of all cells")
    if outcome.left:
        console.print(f"the time is up; {len(outcome.left)} left, run the same command again to go on:")
        for text in outcome.left:
            console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds in words, to the minute where there are many."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def tables(cells: Sequence[Cell]) -> Iterator[Table]:
    """The most telling columns, a table for each model: effective bits, steps of distillation, and two metrics."""
    for model, members in itertools.groupby(cells, key=lambda cell: cell["model"]):
        shown = Table(title=model, title_justify="left")
        for heading in ("width", "recipe", "bits", "steps", "scene", "PSNR, dB"):
            shown.add_column(heading, no_wrap=True)
        for (bits, regime), group in itertools.groupby(members, key=lambda cell: (cell["bits"], cell["regime"])):
            for cell in group:
                shown.add_row(bits if regime == UNIFORM else f"{bits} {regime}", *_row(cell))
            shown.add_section()
        yield shown


def _row(cell: Cell) -> tuple[str, ...]:
    steps = cell.get("distillation_steps")
    return (
        cell["recipe"],
        f"{cell['effective_weight_bits']:.2f}",
        str(steps or ""),
        value_text(cell, "scene_consistency"),
        "" if cell["recipe"] == FULL else value_text(cell, "psnr_db"),
    )
