"""One comparison filled by several processes of this machine, over all the GPUs that it sees, behind one display.

A process alone leaves a GPU waiting most of the time: a training step of a small model takes longer to launch than to
run. The workers share cells by their locks (:mod:`qvdit.compare.sharing`), as processes started by hand do.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qvdit.compare import job
from qvdit.compare.fill import Outcome, Watch
from qvdit.compare.job import Places
from qvdit.compare.settings import CompareSettings
from qvdit.compare.store import Store
from qvdit.compare.table import Cell
from qvdit.contract import QvditError

_SAY, _REMARK, _ITEM, _OUTCOME, _ERROR = "say", "remark", "item", "outcome", "error"
_POLL_SECONDS = 1.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Order:
    """What every worker is told."""

    settings: CompareSettings
    places: Places
    command: str
    minutes: float | None
    threads: int  # of the CPU, for each


class _Reporter:
    """A worker's watch: what it begins and says goes to the parent."""

    def __init__(self, worker: int, news: Any):
        self.worker, self.news = worker, news

    def items(self, done: int, total: int, seconds_left: float | None) -> None:
        self.news.put((self.worker, _ITEM, seconds_left))

    def stage(self, name: str, done: int, total: int) -> None:
        """Too many to send."""

    def say(self, text: str) -> None:
        self.news.put((self.worker, _SAY, text))


def run(
    settings: CompareSettings, places: Places, watch: Watch, command: str, minutes: float | None, processes: int
) -> tuple[Outcome, list[Cell]]:
    """As :func:`qvdit.compare.job.run`, in ``processes`` processes that take turns over the visible GPUs."""
    terms, tasks = settings.terms, settings.tasks()
    store = Store(places.store, watch.say)
    order = Order(settings, places, command, minutes, max(1, (os.cpu_count() or 1) // processes))
    with _started(order, processes, _devices(settings.chosen_device)) as (workers, news):
        outcomes, errors = _listen(workers, news, watch, lambda: (job.measured(store, tasks, terms), len(tasks)))
    outcome = together(outcomes, errors, job.measured(store, tasks, terms))
    return outcome, job.write(settings, places, store, outcome)


def together(outcomes: Sequence[Outcome], errors: Sequence[str], measured: int) -> Outcome:
    """One outcome of all workers': what one left or found taken, another may have done."""
    computed = tuple(dict.fromkeys(text for outcome in outcomes for text in outcome.computed))
    failed = tuple(dict.fromkeys([text for outcome in outcomes for text in outcome.failed] + list(errors)))
    left = dict.fromkeys(text for outcome in outcomes for text in outcome.left)
    return Outcome(computed, tuple(text for text in left if text not in computed), failed, measured)


def _devices(device: str) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each worker in turn: one GPU of those that this process sees."""
    if device != "cuda":
        return [None]
    named = os.environ.get(_VISIBLE)
    return list(named.split(",")) if named else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _started(order: Order, processes: int, devices: Sequence[str | None]) -> Iterator[tuple[list[Any], Any]]:
    """The workers and the queue of what they report; none outlives the block."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    news = context.Queue()
    workers = [context.Process(target=_work, args=(i, order, news), daemon=True) for i in range(processes)]
    try:
        for i, worker in enumerate(workers):
            with _visible(devices[i % len(devices)]):
                worker.start()
        yield workers, news
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()


@contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """The environment that a worker inherits."""
    before = os.environ.get(_VISIBLE)
    if device is not None:
        os.environ[_VISIBLE] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ[_VISIBLE] = before
        elif device is not None:
            del os.environ[_VISIBLE]


def _work(worker: int, order: Order, news: Any) -> None:
    """A worker's whole life."""
    torch.set_num_threads(order.threads)
    watch = _Reporter(worker, news)
    try:
        for text in job.remarks(order.settings):
            news.put((worker, _REMARK, text))
        news.put((worker, _OUTCOME, job.fill(order.settings, order.places, watch, order.command, order.minutes)))
    except QvditError as error:
        news.put((worker, _ERROR, str(error)))
    except Exception:
        news.put((worker, _ERROR, traceback.format_exc()))
    except KeyboardInterrupt:
        pass


def _listen(
    workers: Sequence[Any], news: Any, watch: Watch, count: Callable[[], tuple[int, int]]
) -> tuple[list[Outcome], list[str]]:
    """Pass on what the workers say until all have ended; their outcomes, and what went wrong."""
    outcomes: list[Outcome] = []
    errors: list[str] = []
    ended: set[int] = set()
    remarks: set[str] = set()  # said already: most hold for all workers
    while len(ended) < len(workers):
        done, total = count()
        watch.items(done, total, None)
        try:
            worker, kind, value = news.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for i, process in enumerate(workers):
                if i not in ended and process.exitcode is not None and news.empty():
                    ended.add(i)
                    errors.append(f"process {i} ended with status {process.exitcode}")
            continue
        if kind == _SAY:
            watch.say(f"[{worker}] {value}")
        elif kind == _REMARK:
            if value not in remarks:
                watch.say(value)
            remarks.add(value)
        elif kind == _OUTCOME:
            outcomes.append(value)
            ended.add(worker)
        elif kind == _ERROR:
            errors.append(f"process {worker}: {value}")
            ended.add(worker)
    return outcomes, errors
