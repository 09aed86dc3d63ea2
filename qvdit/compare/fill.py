"""Filling the table: cell after cell, each saved as soon as it is done, until all are there or the time is up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

import torch

from qvdit.compare.bench import Bench, Quantized
from qvdit.compare.plan import (
    SWEEP_BITS,
    UNIFORM,
    SweepRun,
    Task,
    Terms,
    layer_bits,
    trains,
)
from qvdit.compare.store import Record, Store
from qvdit.compare.table import COLUMNS
from qvdit.contract import QvditError
from qvdit.contract.files import finite
from qvdit.contract.layer import WeightSize
from qvdit.method.recipe import Recipe
from qvdit.models.loading import SourceModel
from qvdit.quality import means_and_errors
from qvdit.reference.measure import ATTRIBUTES

Item = Task | SweepRun
Clock = Callable[[], float]

_FULL_WEIGHT_BITS = 32.0


class Watch(Protocol):
    """Told how far the work is."""

    def items(self, done: int, total: int, seconds_left: float | None) -> None:
        """Cells and sweep runs, and how long the others will take; None: nobody knows yet."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress within one of them."""

    def say(self, text: str) -> None:
        """One line to read."""


@dataclass(frozen=True)
class Outcome:
    """What became of the cells."""

    computed: tuple[str, ...]
    left: tuple[str, ...]  # not started: the time was up
    failed: tuple[str, ...]  # with the reason
    measured: int  # cells that are there now, whenever they were measured
    elsewhere: tuple[str, ...] = ()  # another process of the same comparison had them


class Filling:
    """Fills the cells of one comparison."""

    def __init__(
        self,
        terms: Terms,
        store: Store,
        bench: Callable[[SourceModel], Bench],  # the same model always gives the same bench
        watch: Watch,
        origin: Record,  # device, command and versions, for every cell's file
        clock: Clock = time.monotonic,
    ):
        self.terms, self.store, self.bench, self.watch = terms, store, bench, watch
        self.origin, self.clock = origin, clock

    def run(self, tasks: Sequence[Task], minutes: float | None = None) -> Outcome:
        """Measure what is missing, in order; stop before a cell that would end after ``minutes``."""
        started = self.clock()
        known = Estimates(self.origin["device"], self.terms)
        missing = list(self._missing(tasks, known))
        computed: list[str] = []
        failed: list[str] = []
        elsewhere: list[str] = []
        for index, item in enumerate(missing):
            self.watch.items(index, len(missing), known.total(missing[index:]))
            spent = self.clock() - started
            if minutes is not None and spent + (known.seconds(item) or 0.0) >= minutes * 60:
                left = tuple(map(str, missing[index:]))
                return Outcome(tuple(computed), left, tuple(failed), self._measured(tasks), tuple(elsewhere))
            with self.store.claimed(item, self.terms) as mine:
                if not mine:
                    elsewhere.append(str(item))
                    continue
                self.watch.say(str(item))
                try:
                    known.add(self._measured_now(item))
                except QvditError as error:  # this cell's alone: the others can still be measured
                    failed.append(f"{item}: {error}")
                    continue
                computed.append(str(item))
        self.watch.items(len(missing), len(missing), 0.0)
        return Outcome(tuple(computed), (), tuple(failed), self._measured(tasks), tuple(elsewhere))

    def _measured(self, tasks: Sequence[Task]) -> int:
        return sum(self.store.has(task, self.terms) for task in tasks)

    def _missing(self, tasks: Sequence[Task], known: Estimates) -> Iterator[Item]:
        """What no file holds yet, learning rates right before the first cell that needs them."""
        swept: set[str] = set()
        for task in tasks:
            record = self.store.read(task, self.terms)
            if record is not None:
                known.add(record)
                continue
            for run in self._sweep(task):
                key = f"{run} {run.key(self.terms)}"
                if key not in swept:
                    swept.add(key)
                    tried = self.store.read(run, self.terms)
                    if tried is None:
                        yield run
                    else:
                        known.add(tried)
            yield task

    def _sweep(self, task: Task) -> list[SweepRun]:
        """The learning rates to try for a cell's model and recipe; none where there is no choice."""
        if task.recipe is None or not task.trains or not self.terms.training.sweeps:
            return []
        return [SweepRun(task.model, task.recipe, rate) for rate in self.terms.training.learning_rates]

    def _measured_now(self, item: Item) -> Record:
        record = self._measure(item)
        self.store.write(item, self.terms, record)
        return record

    def _measure(self, item: Item) -> Record:
        if isinstance(item, SweepRun):
            return {**self._try_rate(item), **self._stamp()}
        record = self._full_cell(item) if item.recipe is None else self._cell(item, item.recipe)
        return {**record, **self._stamp()}

    # Learning rates ---------------------------------------------------------------------------------------------------

    def _try_rate(self, run: SweepRun) -> Record:
        bench, name = self.bench(run.model), run.key(self.terms)
        record: Record = {"model": run.model.name, "recipe": run.recipe.name, "learning_rate": run.rate}
        started = time.monotonic()
        try:
            quantized = self._quantize(bench, run.recipe, Task(run.model, run.recipe, SWEEP_BITS), run.rate)
            error = finite(bench.held_out_error(quantized.layers))
        except QvditError as diverged:  # a rate that is too high is a result, too
            seconds = round(time.monotonic() - started, 3)
            return {**record, "held_out_error": None, "reason": str(diverged), "seconds": seconds}
        bench.keep(name, quantized.layers, run.recipe, SWEEP_BITS)
        return {**record, "held_out_error": error, **_cost(quantized)}

    def _losses(self, task: Task) -> dict[float, Record]:
        """The records of the learning rates tried, all of them: what another process is trying is waited for."""
        records = {}
        for run in self._sweep(task):
            with self.store.claimed(run, self.terms, wait=True) as mine:
                record = self._measured_now(run) if mine else self.store.read(run, self.terms)
            if record is not None:
                records[run.rate] = record
        return records

    def _best_rate(self, task: Task, tried: dict[float, Record]) -> float | None:
        """The learning rate to use; None for a cell that is not trained."""
        if not task.trains or not self.terms.training.steps:
            return None
        if not self.terms.training.sweeps:
            return self.terms.training.learning_rates[0]
        errors = {rate: r["held_out_error"] for rate, r in tried.items() if r["held_out_error"] is not None}
        if not errors:
            raise QvditError(
                f"no finite held-out error at any of {', '.join(f'{rate:g}' for rate in tried)}",
                "a learning rate that converges",
                "try lower --learning-rates",
            )
        return min(errors, key=lambda rate: errors[rate])

    # Cells ------------------------------------------------------------------------------------------------------------

    def _full_cell(self, task: Task) -> Record:
        bench, started = self.bench(task.model), time.monotonic()
        videos = bench.reference
        seconds = time.monotonic() - started
        return {**self._record(task, bench.measure(videos), None, seconds), "seconds": 0.0, "distillation_steps": 0}

    def _cell(self, task: Task, recipe: Recipe) -> Record:
        bench = self.bench(task.model)
        reference = bench.reference
        tried = self._losses(task)
        rate = self._best_rate(task, tried)
        quantized = self._swept(task, rate, tried) or self._quantize(bench, recipe, task, rate)
        started = time.monotonic()
        videos = bench.sample(quantized.layers)
        seconds = time.monotonic() - started
        values = bench.measure(videos, reference)
        return {
            **self._record(task, values, WeightSize.of(quantized.layers), seconds),
            **_cost(quantized),
            "layers": bench.computed_by(quantized.layers),
            "distillation_steps": 0 if rate is None else self.terms.training.steps,
            "distillation_batch": None if rate is None else self.terms.training.batch,
            "learning_rate": rate,
            "held_out_errors": {f"{r:g}": found["held_out_error"] for r, found in tried.items()},
        }

    def _swept(self, task: Task, rate: float | None, tried: dict[float, Record]) -> Quantized | None:
        """The model that the sweep has already trained, where this cell is the sweep's."""
        if task.bits != SWEEP_BITS or task.regime != UNIFORM or rate not in tried or task.recipe is None:
            return None
        layers = self.bench(task.model).kept(SweepRun(task.model, task.recipe, rate).key(self.terms))
        if layers is None:  # the sweep's files came without the heavy data
            return None
        return Quantized(layers, tried[rate]["seconds"], tried[rate].get("peak_gpu_memory_bytes"))

    def _quantize(self, bench: Bench, recipe: Recipe, task: Task, rate: float | None) -> Quantized:
        assert task.bits is not None
        training = self.terms.training
        applied = recipe if rate is None else training.applied(recipe, rate)
        applied = dataclasses.replace(applied, layer_bits=layer_bits(task.regime, bench.sites))
        return bench.quantize(applied, task.bits, 0 if rate is None else training.steps)

    def _record(
        self, task: Task, values: dict[str, torch.Tensor], size: WeightSize | None, sampling_seconds: float
    ) -> Record:
        """What all cells say."""
        model, recipe, bits, regime = task.label
        found = means_and_errors(values)
        return {
            "model": model,
            "recipe": recipe,
            "bits": bits,
            "regime": regime,
            "nominal_weight_bits": _FULL_WEIGHT_BITS if size is None else size.nominal_bits,
            "effective_weight_bits": _FULL_WEIGHT_BITS if size is None else size.effective_bits,
            "sampling_seconds": round(sampling_seconds, 3),
            "metrics": {name: found[name] for name in COLUMNS if name in found},
            "attributes": {name: found[name] for name in ATTRIBUTES},
            "videos": len(self.terms.trial.prompts),
            "seeds": self.terms.seeds,
            "sampling_precision": self.terms.precision,
            "terms": self.terms.digest(),
            "budget": self.terms.budget_digest() if task.trains else None,
            "key": task.key(self.terms),
        }

    def _stamp(self) -> Record:
        return {**self.origin, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _cost(quantized: Quantized) -> Record:
    seconds = {"seconds": round(quantized.seconds, 3)}
    peak = quantized.peak_gpu_memory_bytes
    return seconds if peak is None else {**seconds, "peak_gpu_memory_bytes": peak}


class Estimates:
    """How long cells take, from those that are done on this device: quantization and sampling apart."""

    def __init__(self, device: str, terms: Terms):
        self.device, self.terms = device, terms
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        """Learn from a finished cell or sweep's run."""
        if record.get("device") == self.device:
            self.records.append(record)

    def seconds(self, item: Item) -> float | None:
        """How long an item will take; None if nothing like it has been done."""
        if isinstance(item, Task) and item.recipe is None:
            return self._sampling(item.model.name)
        assert item.recipe is not None
        quantizing = self._quantizing(item.model.name, item.recipe)
        if isinstance(item, SweepRun):
            return quantizing
        sampling = self._sampling(item.model.name)
        return None if quantizing is None and sampling is None else (quantizing or 0.0) + (sampling or 0.0)

    def total(self, items: Sequence[Item]) -> float | None:
        """How long all of them will take; None if nothing is known of one of them."""
        each = [self.seconds(item) for item in items]
        return None if None in each else sum(seconds for seconds in each if seconds is not None)

    def _quantizing(self, model: str, recipe: Recipe) -> float | None:
        """Of the same model and recipe, else of the same recipe, else of those that train alike."""
        trained = trains(recipe) and self.terms.training.steps > 0
        alike = [r for r in self.records if "recipe" in r and r["recipe"] != "fp" and _trained(r) == trained]
        own = [r for r in alike if r["recipe"] == recipe.name]
        for group in ([r for r in own if r["model"] == model], own, alike):
            if group:
                return _mean(group, "seconds")
        return None

    def _sampling(self, model: str) -> float | None:
        """Of quantized cells of the same model, else of any cell."""
        sampled = [r for r in self.records if "sampling_seconds" in r]
        quantized = [r for r in sampled if r["recipe"] != "fp"]
        for group in ([r for r in quantized if r["model"] == model], quantized, sampled):
            if group:
                return _mean(group, "sampling_seconds")
        return None


def _trained(record: Record) -> bool:
    return "held_out_error" in record or bool(record.get("distillation_steps"))


def _mean(records: Sequence[dict[str, Any]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)
