"""``qvdit bench kernels``: every size in turn, the file written after each."""

from __future__ import annotations

import gc
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Protocol

from qvdit.bench.results import Results, Row, save
from qvdit.bench.shapes import Shape
from qvdit.contract import QvditError
from qvdit.system import tool_versions

_ROUNDS, _SECONDS = 2, 1.0  # of what runs by itself: some tenths of a second until its clocks are settled


@dataclass(frozen=True)
class Settings:
    """What to time, and how often."""

    shapes: tuple[Shape, ...]
    blocks: bool
    tiles: bool  # the GEMM with every tile too
    repeats: int
    sustained: bool  # many rows' products by themselves for long, too


class Watch(Protocol):
    """Who is told of what is measured."""

    def say(self, text: str) -> None: ...

    def measured(self, results: Results, rows: Sequence[Row]) -> None: ...


def run(settings: Settings, out: Path, command: str, watch: Watch) -> Results:
    """Measure on this machine's GPU; ``out`` is the JSON. Without a GPU or kernels for it: QvditError."""
    check_machine()
    import torch

    from qvdit.bench import blocks, candidates, timing

    device = torch.device("cuda")

    def shape_rows(shape: Shape) -> list[Row]:
        chosen = candidates.candidates(shape, settings.tiles, device)
        timers = timing.ready(chosen, shape, candidates.input_sets(shape), watch.say)
        rows = timing.timed(timers, shape, settings.repeats)
        if settings.sustained:
            long = {candidate: timers[candidate] for candidate in candidates.sustained(timers, shape)}
            rows += timing.sustained(long, shape, _ROUNDS, _SECONDS)
        return rows

    def block_rows(make: Callable[[], blocks.Block]) -> list[Row]:
        try:
            return blocks.rows(make, settings.repeats)
        except (ImportError, RuntimeError, QvditError) as error:
            torch.cuda.synchronize()
            watch.say(f"left out: the block {make.__name__}: {error}")
            return []

    # A peer is compiled once for every N and K, more often than PyTorch thinks good for one function.
    with torch._dynamo.config.patch(recompile_limit=256):
        nowhere = Shape(0, 0, 0)
        copy = timing.ready([candidates.large_copy(device)], nowhere, 1, watch.say)
        copied = timing.timed(copy, nowhere, settings.repeats)
        jobs: list[Callable[[], list[Row]]] = [partial(shape_rows, shape) for shape in settings.shapes]
        if settings.blocks:
            jobs += [partial(block_rows, make) for make in blocks.BLOCKS]
        return fill(about(command, (copied[0].gb_s or 0.0) / 1000), jobs, out, watch, _free)


def fill(
    results: Results, jobs: Sequence[Callable[[], list[Row]]], out: Path, watch: Watch, free: Callable[[], None]
) -> Results:
    """Do the jobs one by one; a run that is stopped leaves what it measured."""
    for job in jobs:
        rows = job()
        results = replace(results, rows=(*results.rows, *rows))
        save(results, out)
        watch.measured(results, rows)
        free()
    return results


def check_machine() -> None:
    """Raise QvditError unless there are a GPU and kernels for it."""
    import torch

    from qvdit.runtimes import cuda

    if not torch.cuda.is_available():
        raise QvditError(
            "no GPU that PyTorch can see", "an NVIDIA GPU", "run it where there is one; --render FILE draws its results"
        )
    cuda.library().check_device()


def about(command: str, copy_tb_s: float) -> Results:
    """A run without rows yet, on this machine."""
    import torch

    versions = {**tool_versions(), "python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    uuid = f"GPU-{torch.cuda.get_device_properties('cuda').uuid}"
    driver, watts = driver_and_limit(uuid)
    return Results(
        command,
        torch.cuda.get_device_name(),
        driver,
        versions,
        date.today().isoformat(),
        copy_tb_s,
        power_limit_w=watts,
    )


def driver_and_limit(uuid: str) -> tuple[str, float | None]:
    """The NVIDIA driver's version and a GPU's power limit in watts, where nvidia-smi tells."""
    query = ["nvidia-smi", "--query-gpu=uuid,driver_version,power.limit", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
    gpus = [line.split(", ") for line in done.stdout.strip().splitlines()]
    limit = next((limit for found, _, limit in gpus if found == uuid), "")
    return gpus[0][1], float(limit) if limit.replace(".", "", 1).isdigit() else None


def _free() -> None:
    """Give a size's memory back before the next."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
