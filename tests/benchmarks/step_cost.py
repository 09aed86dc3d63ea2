"""What a step of distillation and a step of sampling cost on a GPU, and which kernels the time goes into.

    python tests/benchmarks/step_cost.py --out out/step-cost.json

Milliseconds of one process alone, steady after compilation, and the kernels that take most of the GPU's time, recipe by
recipe: `qvdit` with and without its rotation, and a recipe of the paper's table.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from qvdit.compare import sampling
from qvdit.compare.bench import SEED, Bench
from qvdit.compare.settings import CompareSettings
from qvdit.contract import Bits
from qvdit.contract.files import write_json
from qvdit.method import quantization
from qvdit.method import recipe as recipes
from qvdit.method.recipe import Recipe
from qvdit.models.loading import find_model

STEPS, WARM, SHOWN = 40, 20, 12
BITS = Bits(3, 6)


def chosen() -> dict[str, Recipe]:
    """The recipes, by the name of their row."""
    ours = recipes.load("qvdit")
    return {
        "efficientdm": recipes.load("efficientdm"),
        "qvdit": ours,
        "qvdit, no rotation": dataclasses.replace(ours, rotation="none"),
    }


class Steps:
    """The wall time of each step, and a profile of the last ones; called as a step begins."""

    def __init__(self, total: int):
        self.total, self.times, self.begun = total, list[float](), 0.0
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.ended = False

    def __call__(self, done: int, total: int) -> None:
        done -= total - self.total  # layers come first
        if done < WARM or self.ended:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if WARM < done <= self.total - 8:
            self.times.append(1000 * (now - self.begun))
        if done == self.total - 8:
            self.profiler.start()
        if done == self.total:
            self.profiler.stop()
            self.ended = True
        self.begun = time.perf_counter()

    def found(self, profiled: int = 8) -> dict[str, Any]:
        """Median milliseconds, the GPU's own, how many kernels, and the longest of them."""
        kernels = sorted(self.profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in kernels) / 1000 / profiled
        longest = {e.key[:100]: round(e.self_device_time_total / 1000 / profiled, 3) for e in kernels[:SHOWN]}
        count = sum(event.count for event in kernels) // profiled
        return {"ms": median(self.times), "gpu_ms": busy, "kernels": count, "longest_ms": longest}


def sampled(bench: Bench, layers: Any, batch: int) -> dict[str, Any]:
    """One guided step of ``batch`` videos."""
    model = sampling.quantized_transformer(bench.full, layers, bench.model.adapter)
    record = next(bench.data.batches())
    inputs = {name: tensor.repeat_interleave(batch, 0).to(bench.device) for name, tensor in record.items()}
    steps = Steps(STEPS)
    with torch.no_grad(), sampling.arithmetic(bench.device):
        for done in range(STEPS + 1):
            steps(done, STEPS)
            if done < STEPS:
                model(**inputs, return_dict=False)
    return steps.found()


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = "wan-shapes,latte-shapes",
) -> None:
    """Time every recipe on every model."""
    rows = []
    for name in models.split(","):
        settings = CompareSettings(models=name, prompt_count=8)
        folder = out.parent / f"work-{name}"
        bench = Bench(find_model(name), settings.terms, settings.chosen_device, 256, folder, lambda *_: None)
        for label, recipe in chosen().items():
            steps = Steps(STEPS)
            job = quantization.QuantizationJob(recipe, BITS, STEPS, SEED)
            layers = quantization.quantize(bench.full, bench.model.adapter, bench.statistics, bench.data, job, steps)
            row = {
                "model": name,
                "recipe": label,
                "distillation": steps.found(),
                "sampling": sampled(bench, layers, 256),
            }
            rows.append({**row, "device": torch.cuda.get_device_name()})
            write_json(out, {"rows": rows})
            for kind in ("distillation", "sampling"):
                found = row[kind]
                print(
                    f"{name} {label} {kind}: {found['ms']:.1f} ms, {found['gpu_ms']:.1f} of them the GPU's", flush=True
                )
                print("\n".join(f"    {ms:8.3f}  {kernel}" for kernel, ms in found["longest_ms"].items()), flush=True)


if __name__ == "__main__":
    typer.run(main)
