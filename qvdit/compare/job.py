"""A whole comparison: what the user chose in, the files of a table out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qvdit.compare import results, sampling
from qvdit.compare.bench import Bench
from qvdit.compare.fill import Filling, Outcome, Watch
from qvdit.compare.plan import Task, Terms
from qvdit.compare.settings import CompareSettings, recipes_with_layer_bits
from qvdit.compare.sharing import held
from qvdit.compare.store import Store
from qvdit.compare.table import Cell
from qvdit.contract.video import described
from qvdit.models.loading import SourceModel
from qvdit.system import cpu_name, tool_versions


@dataclass(frozen=True)
class Places:
    """Where a comparison's files are."""

    out: Path
    cells: Path | None = None  # of finished cells, OUT/cells when absent

    @property
    def store(self) -> Path:
        """Small: carry it between machines."""
        return self.cells or self.out / "cells"

    @property
    def work(self) -> Path:
        """Heavy: calibration data, statistics, videos. It can be made again."""
        return self.out / "work"


def run(
    settings: CompareSettings, places: Places, watch: Watch, command: str, minutes: float | None = None
) -> tuple[Outcome, list[Cell]]:
    """Measure what is missing, for ``minutes`` at most, and write the table of what is there."""
    settings.tasks()  # refuses what cannot be compared before anything is said
    for text in remarks(settings):
        watch.say(text)
    outcome = fill(settings, places, watch, command, minutes)
    return outcome, write(settings, places, Store(places.store, watch.say), outcome)


def remarks(settings: CompareSettings) -> list[str]:
    """What to know before a comparison begins: how this process, on its GPU, will not do what one may expect."""
    found = [
        f"{name}: its own layer bits are not used, the regime says what every layer has"
        for name in recipes_with_layer_bits(settings.chosen_recipes)
    ]
    if settings.chosen_device == "cuda" and not settings.simulate and (missing := sampling.kernels_missing()):
        found.append(f"videos are sampled in PyTorch's simulation, several times slower: {missing}")
    return found


def fill(
    settings: CompareSettings, places: Places, watch: Watch, command: str, minutes: float | None = None
) -> Outcome:
    """Measure what is missing, for ``minutes`` at most."""
    terms, tasks, device = settings.terms, settings.tasks(), settings.chosen_device
    benches: dict[str, Bench] = {}

    def bench(model: SourceModel) -> Bench:
        if model.name not in benches:
            data = [model.sampling, described(terms.calibration), terms.held_out]
            digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
            folder = places.work / f"{model.name}-{digest}"
            benches[model.name] = Bench(
                model, terms, device, settings.sampling_batch, folder, watch.stage, settings.simulate
            )
        return benches[model.name]

    store = Store(places.store, watch.say)
    origin = {"device": _device_name(device), "command": command, "versions": tool_versions()}
    return Filling(terms, store, bench, watch, origin).run(tasks, minutes)


def write(settings: CompareSettings, places: Places, store: Store, outcome: Outcome) -> list[Cell]:
    """Write the table of the cells that are there; nothing where there are none."""
    if not outcome.measured:
        return []
    with held(places.out / "table.md"):
        return results.write(store, places.out, settings.terms, settings.tasks())


def measured(store: Store, tasks: Sequence[Task], terms: Terms) -> int:
    """How many of the cells are there."""
    return sum(store.has(task, terms) for task in tasks)


def render(places: Places, watch: Watch) -> list[Cell]:
    """Write the table of the cells that are there, without measuring any."""
    return results.write(Store(places.store, watch.say), places.out)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()
