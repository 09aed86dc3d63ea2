"""Make the bundles that engines are proven on: the shipped models at several widths and as static INT8, side by side.

    python3 tests/gpu/bundles.py OUT [--models wan-shapes,latte-shapes] [--widths w8a8,w4a8,w3a8,w3a6,int8-static]
                                     [--compute auto] [--jobs N]

A model may be a pipeline's folder (tests/gpu/families.py writes random ones). OUT/MODEL-WIDTH is a bundle up to its
parity files, of a short calibration and without distillation: it proves an engine, not the method. What is there is
reused. One that cannot be made (int8-static needs nvidia-modelopt) is named, the others are made, and the exit status
is 1. qvdit is that of this source tree.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

STATIC = "int8-static"


def make(out: Path, model: str, width: str, device: str, threads: int, last: str) -> str:
    """Run one bundle's job up to a stage, in a process of its own; returns what it took."""
    import torch

    from qvdit.job import Job
    from qvdit.settings import JobSettings

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    settings = JobSettings(
        model=model,
        out=out / f"{Path(model).name}-{width}",
        bits="w8a8" if width == STATIC else width,
        recipe=STATIC if width == STATIC else "qvdit",
        target="tensorrt",
        prompt_count=1,
        steps=8,
        records=2,
        compute=device,
        distillation_steps=None if width == STATIC else 0,
        calibration=out / "calibration" / Path(model).name,
        threads=threads,
    )
    job = Job(settings)
    job.run(last)
    costs = {**job.calibration_stages.costs, **job.stages.costs}
    return ", ".join(f"{name} {cost.seconds:.0f} s" for name, cost in costs.items() if not cost.reused)


def make_all(pool: ProcessPoolExecutor, out: Path, names: Iterable[tuple[str, str]], *how: object) -> list[str]:
    """Make several side by side and say how each went; returns those that failed."""
    running = {pool.submit(make, out, model, width, *how): f"{Path(model).name}-{width}" for model, width in names}
    failed = []
    for done in as_completed(running):
        error = done.exception()
        if error is not None:
            failed.append(running[done])
        print(f"{running[done]}: {f'FAILED, {type(error).__name__}: {error}' if error else done.result()}", flush=True)
    return failed


def main() -> int:
    """Calibrate each model once, then make all bundles; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="wan-shapes,latte-shapes")
    parser.add_argument("--widths", default=f"w8a8,w4a8,w3a8,w3a6,{STATIC}")
    parser.add_argument("--compute", default="auto", help="of calibration and quantization: auto, cpu or cuda")
    parser.add_argument("--jobs", type=int, help="bundles made at once (default: one for two cores)")
    given = parser.parse_args()
    models, widths = given.models.split(","), given.widths.split(",")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cores = len(os.sched_getaffinity(0))
    jobs = min(given.jobs or max(cores // 2, 1), len(models) * len(widths))
    start = time.monotonic()
    # Spawned: PyTorch and CUDA do not survive a fork. One process a bundle: its memory is gone with it.
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        first = [(model, widths[0]) for model in models]
        failed = make_all(pool, given.out, first, given.compute, max(cores // len(models), 1), "statistics")
        if not failed:
            names = [(model, width) for model in models for width in widths]
            failed = make_all(pool, given.out, names, given.compute, max(cores // jobs, 1), "parity")
    print(f"bundles in {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
