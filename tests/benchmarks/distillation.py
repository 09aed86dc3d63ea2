"""What each building block of distillation is worth: `qvdit` with one thing changed, trained, and its videos judged.

    python tests/benchmarks/distillation.py --out out/distillation --steps 400

Every row is a model, a width and a variant: the error of the predicted velocity on held-out records, as it is and
guided, by recorded step; PSNR to full precision's videos, and what is measured of them. Rows are files of their own:
the same command goes on with those that are missing, several processes of it share the work, and --render writes
OUT/distillation.json. Wants a GPU.
"""

from __future__ import annotations

import dataclasses
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qvdit.compare import sampling
from qvdit.compare.bench import SEED, Bench
from qvdit.compare.settings import CompareSettings
from qvdit.compare.sharing import held
from qvdit.contract import Bits, QvditError
from qvdit.contract.files import read_json, write_json
from qvdit.contract.layer import Layer, WeightSize
from qvdit.method import quantization
from qvdit.method import recipe as recipes
from qvdit.method.recipe import Recipe
from qvdit.models.loading import find_model
from qvdit.quality import means_and_errors
from qvdit.system import tool_versions

UNTRAINED = "untrained"  # a variant whose name begins so has no steps


def variants() -> dict[str, Recipe]:
    """What is compared, by name, the most telling first."""
    ours = recipes.load("qvdit")

    def trained(base: Recipe = ours, **fields: Any) -> Recipe:
        return recipes.override(base, distillation=fields)

    def at(rate: float, **fields: Any) -> Recipe:
        return trained(learning_rate=rate, scale_learning_rate=2 * rate, **fields)

    return {
        "qvdit 5e-4": at(5e-4),
        "untrained qvdit": ours,
        "untrained quarot": recipes.load("quarot"),
        "qvdit 1e-3": at(1e-3),
        "no relations 5e-4": at(5e-4, relation_weight=0.0),
        "no rotation 5e-4": trained(dataclasses.replace(ours, rotation="none"), learning_rate=5e-4),
        "qvdit 2e-4": at(2e-4),
        "qvdit 2e-3": at(2e-3),
    }


def errors(bench: Bench, layers: tuple[Layer, ...]) -> dict[str, list[float]]:
    """Mean squared error of the velocity on held-out records by recorded step, as it is and guided."""
    model = bench.quantized_transformer(layers)
    guidance = bench.terms.calibration.guidance
    found: dict[int, list[tuple[float, float]]] = {}
    for step, batch in bench.held_out.by_step():
        inputs = {name: tensor.to(bench.device) for name, tensor in batch.items()}
        with torch.no_grad(), sampling.arithmetic(bench.device):
            target, output = (m(**inputs, return_dict=False)[0].float() for m in (bench.full, model))
        error = output - target
        free, told = error.unflatten(0, (-1, 2)).unbind(1)  # this pipeline runs the unconditional one first
        guided = free + guidance * (told - free)
        both = (error.square().mean().item(), guided.square().mean().item())
        found.setdefault(step, []).append(both)
    means = [torch.tensor(found[step]).mean(0).tolist() for step in sorted(found)]
    return {"held_out_error": [plain for plain, _ in means], "held_out_error_guided": [pair for _, pair in means]}


def row(bench: Bench, name: str, recipe: Recipe, bits: Bits, steps: int) -> dict[str, Any]:
    """Quantize, train and judge."""
    started = time.monotonic()
    job = quantization.QuantizationJob(recipe, bits, 0 if name.startswith(UNTRAINED) else steps, SEED)
    layers = quantization.quantize(bench.full, bench.model.adapter, bench.statistics, bench.data, job)
    seconds = time.monotonic() - started
    measured = means_and_errors(bench.measure(bench.sample(layers), bench.reference))
    return {
        "model": bench.model.name,
        "variant": name,
        "bits": str(bits),
        "steps": job.distillation_steps,
        "effective_weight_bits": WeightSize.of(layers).effective_bits,
        "seconds": seconds,
        **errors(bench, layers),
        "metrics": measured,
        "distillation": dataclasses.asdict(recipe.distillation),
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "date": date.today().isoformat(),
        "versions": tool_versions(),
    }


def summary(found: dict[str, Any]) -> str:
    """A row in a line."""
    psnr, scene = (found["metrics"][name] for name in ("psnr_db", "scene_consistency"))
    plain, pair = (sum(found[f"held_out_error{kind}"]) / len(found["held_out_error"]) for kind in ("", "_guided"))
    return (
        f"{found['model']} {found['bits']} {found['variant']:<28} {found['steps']:>5} steps  "
        f"{psnr['mean']:.2f} ± {psnr['sem']:.2f} dB  scene {scene['mean']:.3f} ± {scene['sem']:.3f}  "
        f"error {plain:.5f}, guided {pair:.5f}  {found['effective_weight_bits']:.2f} bits  {found['seconds']:.0f} s"
    )


def chosen(names: str) -> dict[str, Recipe]:
    """The variants asked for: names separated by semicolons, or all."""
    known = variants()
    if names == "all":
        return known
    asked = [name.strip() for name in names.split(";")]
    wrong = next((name for name in asked if name not in known), None)
    if wrong is not None:
        raise QvditError(f"--variants {wrong!r}", f"some of {'; '.join(known)}", "check --variants")
    return {name: known[name] for name in asked}


def main(
    out: Annotated[Path, typer.Option(help="Folder of rows and heavy data.")],
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = "wan-shapes,latte-shapes",
    bits: Annotated[str, typer.Option(help="Bit widths, separated by commas.")] = "w3a6,w2a6",
    names: Annotated[str, typer.Option("--variants", help="Variants, separated by semicolons.")] = "all",
    steps: Annotated[int, typer.Option(help="Budget of the variants that train.")] = 400,
    videos: Annotated[int, typer.Option(help="Fresh prompts.")] = 128,
    minutes: Annotated[float | None, typer.Option(help="Begin no row later than this.")] = None,
    prompt_count: Annotated[int | None, typer.Option(help="Calibration prompts.")] = None,
    render: Annotated[bool, typer.Option("--render", help="Measure nothing: write OUT/distillation.json.")] = False,
) -> None:
    """Measure the rows that are missing, or write them all into one file."""
    rows, started = out / "rows", time.monotonic()
    if render:
        done = [read_json(path, "a row") for path in sorted(rows.glob("*.json"))]
        write_json(out / "distillation.json", {"rows": done})
        print("\n".join(map(summary, done)))
        return
    settings = CompareSettings(models=models, videos=videos, seeds=1, prompt_count=prompt_count)
    shared = (settings.terms, settings.chosen_device, settings.sampling_batch)
    benches = [
        Bench(model, *shared, out / f"work-{model.name}", lambda *_: None)
        for model in map(find_model, models.split(","))
    ]
    for name, recipe in chosen(names).items():
        for width in map(Bits.parse, bits.split(",")):
            for bench in benches:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    return
                path = rows / f"{bench.model.name}-{width}-{steps}-{name.replace(' ', '_').replace(',', '')}.json"
                with held(path, wait=False) as mine:
                    if not mine or path.is_file():
                        continue
                    found = row(bench, name, recipe, width, steps)
                    write_json(path, found)
                    print(summary(found), flush=True)


if __name__ == "__main__":
    typer.run(main)
