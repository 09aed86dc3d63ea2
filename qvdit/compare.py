"""Comparing recipes fairly: the same calibration data, prompts and noise for every recipe and bit width.

Every cell of the table is saved as it is done, so that an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qvdit.contract import Bits
from qvdit.contract.files import read_json, write_atomic, write_json
from qvdit.contract.layer import WeightSize
from qvdit.method import calibration, quantization, statistics
from qvdit.method.recipe import Recipe
from qvdit.method.reference import quantized_transformer
from qvdit.models.loading import SourceModel
from qvdit.quality import Trial, means_and_errors, measurements, sample_trial
from qvdit.reference import measure
from qvdit.system import tool_versions

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    model: SourceModel
    recipes: tuple[Recipe, ...]
    bits: tuple[Bits, ...]
    plan: calibration.CalibrationPlan
    trial: Trial
    device: str
    distillation_steps: int | None  # None: what each recipe says for the device
    batch: int  # videos sampled at once
    seed: int

    def check(self) -> None:
        """Refuse a pair of recipe and bits that cannot be, before any is measured."""
        for chosen in self.recipes:
            for bits in self.bits:
                quantization.check_bits(chosen, bits)

    def budget(self, chosen: Recipe) -> int:
        """Distillation steps of a recipe."""
        return chosen.distillation_steps(self.device, self.distillation_steps)

    def key(self) -> str:
        """A digest of what all cells share."""
        return _digest(
            [dataclasses.asdict(self.plan), dataclasses.asdict(self.trial), self.seed, self.device, self.batch]
        )

    def cell_key(self, chosen: Recipe) -> str:
        """A digest of what a recipe's cells depend on besides."""
        return _digest([dataclasses.asdict(chosen), self.budget(chosen), tool_versions()])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def run(comparison: Comparison, folder: Path, say: Say) -> list[dict[str, Any]]:
    """Fill the table; returns its cells, full precision (recipe ``fp``) first."""
    folder = folder / comparison.key()  # another question, another folder: nothing of it could be reused
    pipeline = comparison.model.load(comparison.device)
    adapter, full = comparison.model.adapter, pipeline.transformer
    say("calibration")
    comparison.check()
    data = calibration.record(pipeline, adapter, comparison.plan, folder / "calibration")
    sites = adapter.sites(full)
    stats = statistics.collect(full, sites, data, folder / "statistics.safetensors")
    say("full precision")
    reference = _reference_videos(pipeline, comparison, folder / "fp.safetensors")
    cells = [_cell(comparison, "fp", None, None, 0.0, reference, reference)]
    write_json(folder / "cells" / "fp.json", cells[0])
    for bits in comparison.bits:
        for chosen in comparison.recipes:
            path = folder / "cells" / f"{chosen.name}-{bits}-{comparison.cell_key(chosen)}.json"
            if not path.is_file():
                say(f"{chosen.name} {bits}")
                write_json(path, _measure(pipeline, comparison, stats, data, chosen, bits, reference))
                pipeline.transformer = full
            cells.append(read_json(path, "a cell of the comparison"))
    return cells


def _reference_videos(pipeline: Any, comparison: Comparison, path: Path) -> torch.Tensor:
    if not path.is_file():
        videos = sample_trial(pipeline, comparison.trial, comparison.batch)
        write_atomic(path, lambda temporary: save_file({"videos": videos.contiguous()}, temporary))
    return load_file(path)["videos"]


def _measure(
    pipeline: Any,
    comparison: Comparison,
    stats: statistics.Statistics,
    data: calibration.CalibrationData,
    chosen: Recipe,
    bits: Bits,
    reference: torch.Tensor,
) -> dict[str, Any]:
    started = time.monotonic()
    steps = comparison.budget(chosen)
    job = quantization.QuantizationJob(chosen, bits, steps, comparison.seed)
    layers = quantization.quantize(pipeline.transformer, comparison.model.adapter, stats, data, job)
    seconds = time.monotonic() - started
    pipeline.transformer = quantized_transformer(pipeline.transformer, layers)
    videos = sample_trial(pipeline, comparison.trial, comparison.batch)
    cell = _cell(comparison, chosen.name, bits, WeightSize.of(layers), seconds, videos, reference)
    return {**cell, "distillation_steps": steps, "regime": "mixed" if chosen.layer_bits else "uniform"}


def _cell(
    comparison: Comparison,
    name: str,
    bits: Bits | None,
    size: WeightSize | None,
    seconds: float,
    videos: torch.Tensor,
    reference: torch.Tensor,
) -> dict[str, Any]:
    values = measurements(videos, comparison.trial)
    if videos is not reference:
        values["psnr_db"] = measure.psnr(videos, reference)
    return {
        "model": comparison.model.name,
        "recipe": name,
        "bits": "fp32" if bits is None else str(bits),
        "regime": "uniform",
        "nominal_weight_bits": 32.0 if size is None else size.nominal_bits,
        "effective_weight_bits": 32.0 if size is None else size.effective_bits,
        "seconds": round(seconds, 1),
        "distillation_steps": 0,
        "metrics": means_and_errors(values),
    }
