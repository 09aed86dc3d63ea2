"""Sampling a video's latents without PyTorch: a loop of plain arithmetic around any session.

What needs the pipeline (its scheduler, text encoder and random numbers) is in a plan, which export/plan.py writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from qvdit.contract import QvditError
from qvdit.runtimes.transformer import Session

FORMAT = "qvdit-plan-1"
_TENSORS = {"latents", "timesteps", "keep", "gain", "encoder_hidden_states", "guidance"}


@dataclass(frozen=True)
class Plan:
    """One video's sampling in S steps; all float32."""

    latents: np.ndarray  # [1, …]: the noise to start from
    timesteps: np.ndarray  # [S], as the model is given them
    keep: np.ndarray  # [S]: x ← keep x + gain v, which is the scheduler's step
    gain: np.ndarray  # [S]
    condition: np.ndarray  # [2, L, D]: without and with the prompt; [1, L, D] where there is no guidance
    guidance: float  # v = v_without + guidance (v_with - v_without)
    clamp: bool  # the result to -1 … 1: pixels


def read_plan(path: Path) -> Plan:
    """Read a plan's file; QvditError where it is none, or of another version."""
    expected, fix = f"a sampling plan ({FORMAT})", "export it again"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise QvditError(f"{path} ({error})", expected, fix) from None
    if metadata.get("format") != FORMAT or not set(tensors) >= _TENSORS:
        raise QvditError(f"{path} of another kind", expected, fix)
    steps = {len(tensors[name]) for name in ("timesteps", "keep", "gain")}
    if len(steps) != 1 or len(tensors["latents"]) != 1 or len(tensors["encoder_hidden_states"]) not in (1, 2):
        raise QvditError(f"{path} with tensors that do not belong together", expected, fix)
    return Plan(
        tensors["latents"],
        tensors["timesteps"],
        tensors["keep"],
        tensors["gain"],
        tensors["encoder_hidden_states"],
        float(tensors["guidance"][0]),
        metadata.get("clamp") == "true",
    )


def sample(session: Session, plan: Plan) -> np.ndarray:
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
