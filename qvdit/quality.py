"""Judging videos: sampled from the same prompts and seeds by two models, measured from their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qvdit.method.calibration import Progress, no_progress, sample
from qvdit.reference import measure, world


@dataclass(frozen=True)
class Trial:
    """Prompts and the seed of each one's noise."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float

    @staticmethod
    def fresh(count: int, seed: int, steps: int, guidance: float, without: tuple[str, ...] = ()) -> Trial:
        """Prompts of the drawn world that are not among ``without`` (those of calibration, say)."""
        generator = torch.Generator().manual_seed(seed)
        known = set(without)
        prompts: list[str] = []
        while len(prompts) < count:
            prompts += [s.prompt for s in world.SceneBatch.draw(count, generator).scenes() if s.prompt not in known]
        seeds = tuple(seed * 1_000_003 + i for i in range(count))
        return Trial(tuple(prompts[:count]), seeds, steps, guidance)


def sample_trial(pipeline: Any, trial: Trial, batch: int, progress: Progress = no_progress) -> torch.Tensor:
    """Videos of a trial, on the CPU, ``batch`` at a time; the first dimension counts them."""
    videos = []
    for start in range(0, len(trial.prompts), batch):
        progress(start, len(trial.prompts))
        part = slice(start, start + batch)
        frames = sample(pipeline, list(trial.prompts[part]), trial.steps, trial.guidance, list(trial.seeds[part]))
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
    return measure.measure(videos, world.SceneBatch.from_scenes(scenes))


def means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of every measurement."""
    return {name: value.mean().item() for name, value in values.items()}


def means_and_errors(values: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Mean and standard error of the mean of every measurement."""
    return {
        name: {"mean": value.mean().item(), "sem": (value.std() / len(value) ** 0.5).item() if len(value) > 1 else 0.0}
        for name, value in values.items()
    }
