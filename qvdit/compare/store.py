"""Finished cells as small JSON files, apart from the heavy data, so that they can be carried between machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvdit.compare.plan import SweepRun, Task, Terms
from qvdit.compare.sharing import held
from qvdit.contract import QvditError
from qvdit.contract.files import read_json, write_json

Record = dict[str, Any]
Say = Callable[[str], None]

_NEEDED = {
    "cell": ("model", "recipe", "bits", "regime", "effective_weight_bits", "seconds", "metrics", "terms", "key"),
    "sweep": ("model", "recipe", "learning_rate", "held_out_error", "seconds"),
}


class Store:
    """A folder of finished cells and tried learning rates, one file each."""

    def __init__(self, folder: Path, say: Say):
        self.folder, self.say = folder, say

    def read(self, item: Task | SweepRun, terms: Terms) -> Record | None:
        """What is known of a cell or a sweep's run; None if there is nothing, or nothing whole."""
        path = self._path(item, terms)
        return self._read(path, _kind(item), "it is measured again") if path.is_file() else None

    def has(self, item: Task | SweepRun, terms: Terms) -> bool:
        """Whether there is a file, whole or not."""
        return self._path(item, terms).is_file()

    @contextmanager
    def claimed(self, item: Task | SweepRun, terms: Terms, wait: bool = False) -> Iterator[bool]:
        """Keep a cell or a sweep's run from other processes; whether it is this one's to measure.

        It is not where another process has it and there is no ``wait``, nor where it has been measured by now.
        """
        path = self._path(item, terms)
        with held(path, wait) as free:
            yield free and not _is_whole(path, _kind(item))

    def write(self, item: Task | SweepRun, terms: Terms, record: Record) -> None:
        """Save a result, whole or not at all."""
        write_json(self._path(item, terms), record)

    def cells(self) -> list[Record]:
        """Every whole cell in the folder, wherever it was measured."""
        found = (self._read(path, "cell", "it is left out") for path in sorted(self.folder.glob("cell-*.json")))
        return [record for record in found if record is not None]

    def _path(self, item: Task | SweepRun, terms: Terms) -> Path:
        names = item.label if isinstance(item, Task) else (item.model.name, item.recipe.name, f"{item.rate:g}")
        return self.folder / f"{'-'.join([_kind(item), *names, item.key(terms)])}.json"

    def _read(self, path: Path, kind: str, consequence: str) -> Record | None:
        try:
            return _whole(path, kind)
        except QvditError as error:
            self.say(f"{error.got}: {consequence}")
            return None


def _is_whole(path: Path, kind: str) -> bool:
    try:
        return bool(_whole(path, kind))
    except QvditError:
        return False


def _whole(path: Path, kind: str) -> Record:
    record = read_json(path, f"a finished {kind}")
    if not isinstance(record, dict) or any(name not in record for name in _NEEDED[kind]):
        raise QvditError(f"{path}, which is no {kind} of a comparison", f"a finished {kind}", "measure it again")
    return record


def _kind(item: Task | SweepRun) -> str:
    return "cell" if isinstance(item, Task) else "sweep"
