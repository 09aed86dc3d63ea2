"""Timing side by side: every candidate a CUDA graph, the graphs replayed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qvdit.bench.results import Row
from qvdit.bench.shapes import Shape
from qvdit.bench.turns import for_long, in_turns, summary
from qvdit.contract import QvditError


@dataclass(frozen=True)
class Candidate:
    """Something to time. ``call`` takes the number of an input set; other fields as in :class:`Row`."""

    what: str
    call: Callable[[int], object]
    weight_bits: int | None = None
    act_bits: int | None = None
    rank: int = 0
    tile: str | None = None
    prologue: str | None = None
    operations: float | None = None  # of a call
    moved: float | None = None  # bytes of a call

    def row(self, shape: Shape, times: Sequence[float]) -> Row:
        """Times of a call, ms, as a row."""
        ms, spread = summary(times)
        return Row(
            m=shape.m,
            n=shape.n,
            k=shape.k,
            what=self.what,
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            rank=self.rank,
            ms=ms,
            spread=spread,
            tops=None if self.operations is None else round(self.operations / ms / 1e9, 1),
            gb_s=None if self.moved is None else round(self.moved / ms / 1e6, 1),
            tile=self.tile,
            prologue=self.prologue,
        )

    def __str__(self) -> str:
        parts = (self.prologue, self.tile, f"rank {self.rank}" if self.rank else None)
        return " ".join(part for part in (self.what, *parts) if part)


Timers = Mapping[Candidate, Callable[[], float]]


def timed(timers: Timers, shape: Shape, repeats: int) -> list[Row]:
    """A row for each, timed in turns."""
    return [candidate.row(shape, times) for candidate, times in in_turns(timers, repeats).items()]


def sustained(timers: Timers, shape: Shape, rounds: int, seconds: float) -> list[Row]:
    """A row for each by itself, for so many seconds in every round, at the clocks that it keeps up."""
    times = for_long(timers, rounds, seconds)
    return [replace(candidate.row(shape, found), sustained=True) for candidate, found in times.items()]


def ready(
    candidates: Sequence[Candidate], shape: Shape, calls: int, say: Callable[[str], None]
) -> dict[Candidate, Callable[[], float]]:
    """A timer for every candidate that runs here; what does not run is said, with its reason."""
    pool = torch.cuda.graph_pool_handle()  # one for all: what a graph leaves is never read
    timers = {}
    for candidate in candidates:
        try:
            timers[candidate] = captured(candidate.call, calls, pool)
        except (RuntimeError, QvditError) as error:
            torch.cuda.synchronize()  # a GPU that is beyond use says so here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            say(f"left out at {shape}: {candidate}: {reason}")
    return timers


def captured(call: Callable[[int], object], calls: int, pool: Any) -> Callable[[], float]:
    """A timer of a graph of calls, each on an input set of its own; it gives ms a call.

    A graph, because PyTorch takes longer to start the shorter kernels than they run.
    """
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for i in range(calls):
            call(i)

    def time() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return time
