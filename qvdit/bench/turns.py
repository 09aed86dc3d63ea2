"""Taking turns, and what many times say: for every benchmark, with PyTorch or without."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")
WARM_UPS = 2  # rounds that are not counted: clocks rise, caches fill


def milliseconds(call: Callable[[], object]) -> Callable[[], float]:
    """A timer of a call that has ended when it returns."""

    def time_it() -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    return time_it


def in_turns(
    timers: Mapping[Name, Callable[[], float]], repeats: int, warm_ups: int = WARM_UPS
) -> dict[Name, list[float]]:
    """Every timer's times, taken in turns so that drift and heat hit all alike.

    Each round has an order of its own, the same in every run: clocks and caches are as whatever ran before leaves them.
    """
    times: dict[Name, list[float]] = {name: [] for name in timers}
    order, shuffler = list(timers), random.Random(0)
    for round_ in range(warm_ups + repeats):
        shuffler.shuffle(order)
        for name in order:
            taken = timers[name]()
            if round_ >= warm_ups:
                times[name].append(taken)
    return times


def for_long(
    timers: Mapping[Name, Callable[[], float]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Name, list[float]]:
    """Every timer's times, in turns that each last so many seconds; what begins in a turn's second half counts.

    A GPU lowers its clocks until what runs keeps within its power limit, which takes it some tenths of a second. In
    short turns all run at what clocks they leave each other.
    """
    times: dict[Name, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            begin = clock()
            while clock() < begin + seconds / 2:
                timer()
            while True:  # once at least
                times[name].append(timer())
                if clock() >= begin + seconds:
                    break
    return times


def summary(times: Sequence[float]) -> tuple[float, float]:
    """Median, and interquartile range over median."""
    first, median, third = statistics.quantiles(times, n=4)
    return round(median, 6), round((third - first) / median, 4)
