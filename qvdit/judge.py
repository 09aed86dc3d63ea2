"""The quality stage: the same videos from both models, measured, and kept for the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import qvdit.runtimes
from qvdit.contract.files import write_atomic
from qvdit.contract.parity import relative_error
from qvdit.method.calibration import Progress
from qvdit.quality import Trial, means, measurements, sample_trial
from qvdit.reference import measure

if TYPE_CHECKING:
    from qvdit.report import ReportVideo

_SHOWN = 8  # videos in the report: more are measured, but not looked at


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
        "psnr_db": measure.psnr(quantized, full).mean().item() if measured else None,
        "rel_err": relative_error(quantized.numpy(), full.numpy()),
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
