"""Sampling a video's latents without PyTorch: a loop of plain arithmetic around any session.

What needs the pipeline (its scheduler, text encoder and random numbers) is in a plan, which export/plan.py writes.
"""

from __future__ import annotations

import numpy as np

from qvdit.contract import QvditError
from qvdit.contract.plan import SamplingPlan
from qvdit.runtimes.transformer import Session


def sample(session: Session, plan: SamplingPlan) -> np.ndarray:
    """Sample one video with a session: float32 [1, …]; both guided passes in one batch."""
    x, batch = plan.latents, len(plan.condition)
    for step in range(len(plan.timesteps)):
        inputs = {
            "hidden_states": np.repeat(x, batch, axis=0),
            "timestep": np.full(batch, plan.timesteps[step], np.float32),
            "encoder_hidden_states": plan.condition,
        }
        velocity = np.asarray(session.infer(inputs), np.float32)
        if batch == 2:
            velocity = velocity[:1] + np.float32(plan.guidance) * (velocity[1:] - velocity[:1])
        x = plan.keep[step] * x + plan.gain[step] * velocity
        if not np.isfinite(x).all():
            raise QvditError(f"NaN or Inf after step {step + 1}", "finite latents", "check the engine: run parity")
    return np.clip(x, -1, 1) if plan.clamp else x
