"""Judging videos: sampled from the same prompts and seeds by two models, measured from their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import qvdit.runtimes
from qvdit.contract.files import finite, write_atomic
from qvdit.contract.parity import relative_error
from qvdit.contract.video import VideoSize
from qvdit.method.calibration import Progress, no_progress, sample
from qvdit.reference import measure, world

if TYPE_CHECKING:
    from qvdit.report import ReportVideo

_SHOWN = 8  # videos in the report: more are measured, but not looked at


@dataclass(frozen=True)
class Trial:
    """Prompts and the seed of each one's noise."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    size: VideoSize | None = None  # the pipeline's own when absent

    @staticmethod
    def fresh(count: int, seed: int, steps: int, guidance: float, without: tuple[str, ...] = ()) -> Trial:
        """Prompts of the drawn world that are not among ``without`` (those of calibration, say)."""
        generator = torch.Generator().manual_seed(seed)
        known = set(without)
        prompts: list[str] = []
        while len(prompts) < count:
            prompts += [s.prompt for s in world.SceneBatch.draw(count, generator).scenes() if s.prompt not in known]
        return Trial.of(tuple(prompts[:count]), seed, steps, guidance)

    @staticmethod
    def of(prompts: tuple[str, ...], seed: int, steps: int, guidance: float) -> Trial:
        """Given prompts, each with a seed of its own that calibration does not use."""
        return Trial(prompts, tuple(seed * 1_000_003 + i for i in range(len(prompts))), steps, guidance)

    @staticmethod
    def pooled(trials: Sequence[Trial]) -> Trial:
        """Several trials of the same sampler as one, one after the other."""
        prompts = tuple(prompt for trial in trials for prompt in trial.prompts)
        seeds = tuple(seed for trial in trials for seed in trial.seeds)
        return Trial(prompts, seeds, trials[0].steps, trials[0].guidance, trials[0].size)


def sample_trial(pipeline: Any, trial: Trial, batch: int, progress: Progress = no_progress) -> torch.Tensor:
    """Videos of a trial, on the CPU, ``batch`` at a time; the first dimension counts them."""
    videos = []
    for start in range(0, len(trial.prompts), batch):
        progress(start, len(trial.prompts))
        part = slice(start, start + batch)
        prompts, seeds = list(trial.prompts[part]), list(trial.seeds[part])
        frames = sample(pipeline, prompts, trial.steps, trial.guidance, seeds, trial.size)
        videos.append(frames.float().cpu())
    progress(len(trial.prompts), len(trial.prompts))
    return torch.cat(videos)


def measurements(videos: torch.Tensor, trial: Trial) -> dict[str, torch.Tensor]:
    """Measurements [B] of each video by name; none where prompts or videos are not of the drawn world."""
    if videos.shape[1:] != (3, world.FRAMES, world.SIZE, world.SIZE):
        return {}
    try:
        scenes = [world.parse_prompt(prompt) for prompt in trial.prompts]
    except ValueError:
        return {}
    return measure.measure(videos, world.SceneBatch.from_scenes(scenes, videos.device))


def means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of every measurement."""
    return {name: value.mean().item() for name, value in values.items()}


def means_and_errors(values: dict[str, torch.Tensor]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error of the mean of every measurement."""
    return {
        name: {
            "mean": finite(value.mean().item()),
            "sem": finite((value.std() / len(value) ** 0.5).item()) if len(value) > 1 else 0.0,
        }
        for name, value in values.items()
    }


def judge_videos(
    pipeline: Any, bundle: Path, trial: Trial, keep: Path, threads: int, progress: Progress
) -> dict[str, Any]:
    """Sample a trial with the full-precision pipeline and with the bundle's runtime in its place; measure both.

    The videos go to ``keep``. Returns what report.json holds under ``quality``.
    """
    count, full_transformer = len(trial.prompts), pipeline.transformer
    full = sample_trial(pipeline, trial, 1, lambda done, _: progress(done, 2 * count))
    pipeline.transformer = qvdit.runtimes.load(bundle, threads)
    try:
        quantized = sample_trial(pipeline, trial, 1, lambda done, _: progress(count + done, 2 * count))
    finally:
        pipeline.transformer = full_transformer
    tensors = {"full": full.contiguous(), "quantized": quantized.contiguous()}
    write_atomic(keep, lambda temporary: save_file(tensors, temporary))
    measured = measurements(full, trial)
    return {
        "videos": count,
        "prompts": list(trial.prompts),
        "psnr_db": finite(measure.psnr(quantized, full).mean().item()) if measured else None,
        "rel_err": finite(relative_error(quantized.numpy(), full.numpy())),
        "fp": means(measured),
        "quantized": means(measurements(quantized, trial)),
    }


def report_videos(kept: Path, trial: Trial) -> list[ReportVideo]:
    """The kept videos as the report shows them; none where they are latents rather than pixels."""
    from qvdit.report import ReportVideo

    tensors = load_file(kept)
    full, quantized = tensors["full"], tensors["quantized"]
    if full.shape[1] != 3:
        return []
    full, quantized = full[:_SHOWN], quantized[:_SHOWN]
    psnr = measure.psnr(quantized, full).tolist()
    rows = zip(trial.prompts[:_SHOWN], _pixels(full), _pixels(quantized), psnr, strict=True)
    return [ReportVideo(prompt, f, q, db) for prompt, f, q, db in rows]


def _pixels(videos: torch.Tensor) -> np.ndarray:
    """float [B, 3, T, H, W] in -1 … 1 → uint8 [B, T, H, W, 3]."""
    scaled = (videos.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
