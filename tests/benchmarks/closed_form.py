"""What each building block is worth before any distillation: the whole model's error on inputs it was not fitted to.

    python tests/benchmarks/closed_form.py --model wan-shapes --out tests/benchmarks/results/closed-form.json

Every variant is `qvdit` with one thing changed, or another recipe. The error is the mean squared difference of the
predicted velocity to full precision's, over the recorded steps of held-out prompts. No GPU needed; goes on where it
stopped, and adds to the file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qvdit.contract import Bits
from qvdit.contract.files import read_json, write_json
from qvdit.contract.layer import WeightSize
from qvdit.method import calibration, quantization, statistics
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationData
from qvdit.method.recipe import Recipe
from qvdit.method.reference import quantized_transformer
from qvdit.models.loading import SourceModel, find_model
from qvdit.settings import shipped_prompts
from qvdit.system import cpu_name, tool_versions

PROMPTS, HELD_OUT = 8, 2


def variants() -> dict[str, Recipe]:
    """What is compared, by name."""
    ours = recipes.load("qvdit")
    unrotated = dataclasses.replace(ours, rotation="none")
    return {
        **{name: recipes.load(name) for name in ("qvdit", "rtn", "quarot", "q-dit", "svdquant")},
        "nearest rounding": recipes.override(ours, weights={"rounding": "nearest", "clip_by": "output"}),
        "clip by output before rounding": recipes.override(ours, weights={"clip_by": "output"}),
        "no bias correction": recipes.override(ours, weights={"bias_correction": False}),
        "no run-time term": recipes.override(ours, tqe={"rank": 0}),
        "rank 4": recipes.override(ours, tqe={"rank": 4}),
        "no frame gain": recipes.override(ours, tqe={"frame_gain": "none"}),
        "smoothing 0.25": recipes.override(ours, smoothing={"strength": 0.25}),
        "symmetric activations": recipes.override(ours, activations={"symmetric_from": 2}),
        "no rotation": unrotated,
        "no rotation, symmetric activations": recipes.override(unrotated, activations={"symmetric_from": 2}),
    }


class Trial:
    """A model, its statistics, and what it predicts for held-out inputs."""

    def __init__(self, source: SourceModel, folder: Path):
        self.source = source
        self.pipeline = source.load()
        prompts = calibration.read_prompts(shipped_prompts())[:PROMPTS]
        plan = calibration.CalibrationPlan(prompts, source=source.sampling)
        shards = calibration.record(self.pipeline, source.adapter, plan, folder / "shards").shards
        self.data = CalibrationData(shards[:-HELD_OUT])
        sites = source.adapter.sites(self.pipeline.transformer)
        self.statistics = statistics.collect(self.pipeline.transformer, sites, self.data, folder / "statistics")
        self.batches = list(CalibrationData(shards[-HELD_OUT:]).batches())
        self.targets = self.predict(self.pipeline.transformer)

    @torch.no_grad()
    def predict(self, transformer: Any) -> list[torch.Tensor]:
        """The predicted velocity for every held-out batch."""
        return [transformer(**batch, return_dict=False)[0] for batch in self.batches]

    def row(self, name: str, recipe: Recipe, bits: Bits) -> dict[str, Any]:
        """Quantize by a recipe and measure."""
        job = quantization.QuantizationJob(recipe, bits, 0)
        full = self.pipeline.transformer
        layers = quantization.quantize(full, self.source.adapter, self.statistics, self.data, job)
        found = self.predict(quantized_transformer(full, layers))
        errors = [(f - t).square().mean().item() for f, t in zip(found, self.targets, strict=True)]
        return {
            "model": self.source.name,
            "variant": name,
            "bits": str(bits),
            "effective_weight_bits": WeightSize.of(layers).effective_bits,
            "mse": sum(errors) / len(errors),
        }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to add to.")],
    model: Annotated[str, typer.Option(help="Model to quantize.")] = "wan-shapes",
    bits: Annotated[str, typer.Option(help="Bit widths, separated by commas.")] = "w3a6,w4a8",
) -> None:
    """Measure the variants that the file does not hold yet."""
    content = read_json(out, "results") if out.is_file() else {"rows": []}
    rows = content["rows"]
    there = {(row["model"], row["variant"], row["bits"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(find_model(model), Path(folder))
        for width in map(Bits.parse, bits.split(",")):
            for name, recipe in variants().items():
                if (trial.source.name, name, str(width)) in there:
                    continue
                rows.append(trial.row(name, recipe, width))
                print(f"{width} {name}: {rows[-1]['mse']:.3e}", flush=True)
                about = {"date": date.today().isoformat(), "device": cpu_name(), "versions": tool_versions()}
                command = f"python tests/benchmarks/closed_form.py --model {model} --bits {bits} --out {out}"
                write_json(out, {"command": command, **about, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
