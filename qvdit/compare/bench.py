"""One model set up to be compared: its calibration data, statistics and reference videos, made when first needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvdit.compare import sampling
from qvdit.compare.plan import Terms
from qvdit.compare.sharing import held
from qvdit.contract import Bits, QvditError, checkpoint
from qvdit.contract.files import write_atomic
from qvdit.contract.layer import Layer
from qvdit.method import calibration, quantization, statistics
from qvdit.method.calibration import CalibrationData
from qvdit.method.recipe import Recipe
from qvdit.models import Site
from qvdit.models.loading import SourceModel
from qvdit.quality import measurements
from qvdit.reference.measure import psnr

Stage = Callable[[str, int, int], None]
"""Called with the name of what is being done, how much of it is done and how much there is."""

SEED = 0  # of calibration and training: they happen once
_TOGETHER = {"cpu": 1, "cuda": 32}  # most prompts of calibration in a pass: alone, one leaves a GPU waiting


@dataclass(frozen=True)
class Quantized:
    """Frozen layers and what they cost."""

    layers: tuple[Layer, ...]
    seconds: float  # quantization and distillation
    peak_gpu_memory_bytes: int | None  # None on a CPU


class Bench:
    """A model with everything that its cells share."""

    def __init__(
        self,
        model: SourceModel,
        terms: Terms,
        device: str,
        batch: int,
        folder: Path,
        stage: Stage,
        simulate: bool = False,  # the kernels' layers, too
    ):
        self.model, self.terms, self.device, self.batch = model, terms, device, batch
        self.folder, self.stage, self.simulate = folder, stage, simulate
        self.together = min(_TOGETHER[device], batch)  # prompts of calibration, and held-out ones, in a pass

    @cached_property
    def pipeline(self) -> Any:
        """The full-precision pipeline."""
        self.stage("loading", 0, 1)
        return self.model.load(self.device)

    @cached_property
    def full(self) -> Any:
        """The full-precision transformer."""
        return self.pipeline.transformer

    @property
    def sites(self) -> list[Site]:
        """The linears that may be quantized."""
        return self.model.adapter.sites(self.full)

    @cached_property
    def recorded(self) -> CalibrationData:
        """The inputs recorded of all calibration prompts."""
        plan = replace(self.terms.calibration, source=self.model.sampling)
        folder = self.folder / "calibration"
        with held(folder):
            return calibration.record(
                self.pipeline,
                self.model.adapter,
                plan,
                folder,
                self._progress("calibration"),
                together=self.together,
            )

    @property
    def data(self) -> CalibrationData:
        """What statistics and training see."""
        shards = self.recorded.shards
        return CalibrationData(shards[: len(shards) - self.terms.held_out])

    @property
    def held_out(self) -> CalibrationData:
        """What learning rates are judged by."""
        shards = self.recorded.shards
        return CalibrationData(shards[len(shards) - self.terms.held_out :])

    @cached_property
    def statistics(self) -> statistics.Statistics:
        """Statistics of every layer's input."""
        path = self.folder / "statistics.safetensors"
        data = self.data
        with held(path):
            return statistics.collect(self.full, self.sites, data, path, self._progress("statistics"), self.together)

    @cached_property
    def reference(self) -> torch.Tensor:
        """Full precision's videos of the trial, float32 [B, 3, T, H, W] in -1 … 1."""
        path = self.folder / f"videos-{self.terms.digest()}.safetensors"
        with held(path):
            try:
                return load_file(path)["videos"]
            except (OSError, SafetensorError, KeyError):
                videos = self._sample("sampling full precision").contiguous()
                write_atomic(path, lambda temporary: save_file({"videos": videos}, temporary))
                return videos

    def quantize(self, recipe: Recipe, bits: Bits, steps: int) -> Quantized:
        """Quantize the model, training it for ``steps`` steps."""
        stats, data = self.statistics, self.data

        def progress(done: int, total: int) -> None:
            layers = total - steps
            trained = done > layers or (steps > 0 and done == layers)
            self.stage(*(("distillation", done - layers, steps) if trained else ("layers", done, layers)))

        gpu = self.device == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        job = quantization.QuantizationJob(recipe, bits, steps, SEED)
        layers = quantization.quantize(self.full, self.model.adapter, stats, data, job, progress)
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated() if gpu else None
        self._release()
        return Quantized(layers, seconds, peak)

    @torch.no_grad()
    def held_out_error(self, layers: tuple[Layer, ...]) -> float:
        """Mean squared error of the quantized model's prediction to full precision's, on held-out records."""
        model = self.quantized_transformer(layers, compiled=False)
        together, shards = self.together, self.held_out.shards
        total = 0.0
        for start in range(0, len(shards), together):
            self.stage("held-out error", start, len(shards))
            some = shards[start : start + together]
            errors = []
            for batch in CalibrationData(some).batches(together):
                inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
                with sampling.arithmetic(self.device):
                    target, found = (m(**inputs, return_dict=False)[0].float() for m in (self.full, model))
                errors.append((found - target).square().mean())
            total += len(some) * torch.stack(errors).mean().item()
        return total / len(shards)

    def computed_by(self, layers: tuple[Layer, ...]) -> str:
        """What computes the layers when they are sampled or judged: see :func:`sampling.computed_by`."""
        return sampling.SIMULATION if self.simulate else sampling.computed_by(layers, self.device)

    def quantized_transformer(self, layers: tuple[Layer, ...], compiled: bool = True) -> Any:
        """The model with frozen layers, to be run under :func:`sampling.arithmetic`."""
        adapter, computed = self.model.adapter, self.computed_by(layers)
        return sampling.quantized_transformer(self.full, layers, adapter, computed, compiled)

    def sample(self, layers: tuple[Layer, ...]) -> torch.Tensor:
        """The quantized model's videos of the trial, as :attr:`reference`."""
        with self._installed(layers):
            return self._sample("sampling")

    def measure(self, videos: torch.Tensor, reference: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Measurements [B] of the trial's videos by name, with their PSNR where there is a reference."""
        videos = videos.to(self.device)
        values = measurements(videos, self.terms.trial)
        return values if reference is None else {**values, "psnr_db": psnr(videos, reference.to(self.device))}

    def keep(self, name: str, layers: tuple[Layer, ...], recipe: Recipe, bits: Bits) -> None:
        """Save frozen layers under a name."""
        kept = checkpoint.QuantizedCheckpoint(
            layers, self.model.adapter.family, self.model.fingerprint, self.model.config, recipe.name, str(bits)
        )
        checkpoint.save(kept, self.folder / "swept" / name)

    def kept(self, name: str) -> tuple[Layer, ...] | None:
        """Layers saved under a name; None where there are none, or none whole."""
        try:
            return checkpoint.load(self.folder / "swept" / name).layers
        except QvditError:
            return None

    def _sample(self, stage: str) -> torch.Tensor:
        videos = sampling.sample(self.pipeline, self.terms.trial, self.batch, self.device, self._progress(stage))
        self._release()
        return videos

    def _release(self) -> None:
        """Give a GPU's unused memory back: other processes of the comparison want it."""
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _installed(self, layers: tuple[Layer, ...]) -> Iterator[None]:
        """The quantized transformer in the pipeline's, for a while."""
        full = self.full
        self.pipeline.transformer = self.quantized_transformer(layers)
        try:
            yield
        finally:
            self.pipeline.transformer = full

    def _progress(self, stage: str) -> calibration.Progress:
        return lambda done, total: self.stage(stage, done, total)
