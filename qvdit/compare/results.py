"""The files of a table: quality.json, table.md and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvdit.compare import plots
from qvdit.compare.plan import Task, Terms
from qvdit.compare.store import Store
from qvdit.compare.table import Cell, markdown, quality, select
from qvdit.contract import QvditError
from qvdit.contract.files import write_json, write_text


def write(store: Store, out: Path, terms: Terms | None = None, tasks: Sequence[Task] = ()) -> list[Cell]:
    """Write the table of a store's cells into ``out``; returns the cells in it.

    Without terms it is the table that most of the cells belong to.
    """
    found = store.cells()
    if terms is None:
        cells = select(found)
    else:
        asked = frozenset(task.key(terms) for task in tasks)
        cells = select(found, terms.digest(), terms.budget_digest(), asked)
    if not cells:
        raise QvditError(f"no finished cells in {store.folder}", "at least one", "run the comparison without --render")
    if len(cells) < len(found):
        left_out = len(found) - len(cells)
        store.say(f"{left_out} of {len(found)} cells in {store.folder} are older or of other terms: left out")
    write_json(out / "quality.json", quality(cells))
    write_text(out / "table.md", markdown(cells))
    plots.write(cells, out)
    return cells
