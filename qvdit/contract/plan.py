"""A sampling run as plain numbers, so that a program without PyTorch can repeat it: ``sample/plan.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from qvdit.contract.errors import QvditError
from qvdit.contract.files import write_atomic

FORMAT = "qvdit-plan-1"
_NEEDED = {"latents", "timesteps", "keep", "gain", "encoder_hidden_states", "guidance", "clamp"}


@dataclass(frozen=True)
class SamplingPlan:
    """One video's sampling; S steps: x ← keep · x + gain · v, v the model's output, guided."""

    latents: np.ndarray  # float32 [1, C, T, H, W]: the noise to start from
    timesteps: np.ndarray  # float32 [S], as the model is given them
    keep: np.ndarray  # float32 [S]
    gain: np.ndarray  # float32 [S]; flow matching: σ' - σ
    condition: np.ndarray  # float32 [2, L, D]: without and with the prompt; [1, L, D] where there is no guidance
    guidance: float  # v = v_without + guidance · (v_with - v_without)
    clamp: bool  # the pipeline clamps the result to -1 … 1
    reference: np.ndarray | None = None  # float32 [1, …]: what another runtime made of it


def save_plan(plan: SamplingPlan, path: Path) -> None:
    """Write a plan, whole or not at all."""
    tensors = {
        "latents": plan.latents,
        "timesteps": plan.timesteps,
        "keep": plan.keep,
        "gain": plan.gain,
        "encoder_hidden_states": plan.condition,
        "guidance": np.array([plan.guidance], np.float32),
        "clamp": np.array([plan.clamp], np.float32),
    }
    if plan.reference is not None:
        tensors["reference"] = plan.reference
    held = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    # One entry: the order of several changes from run to run.
    write_atomic(path, partial(save_file, held, metadata={"format": FORMAT}))


def read_plan(path: Path) -> SamplingPlan:
    """Read a plan's file; QvditError where it is none, or of another version."""
    expected, fix = f"a sampling plan ({FORMAT})", "export it again"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise QvditError(f"{path} ({error})", expected, fix) from None
    if metadata.get("format") != FORMAT or not set(tensors) >= _NEEDED:
        raise QvditError(f"{path} of another kind", expected, fix)
    sizes = {name: tensors[name].shape[:1] for name in _NEEDED}
    alone = {sizes[name] for name in ("latents", "guidance", "clamp")} == {(1,)}
    together = sizes["timesteps"] == sizes["keep"] == sizes["gain"] != ()
    if not alone or not together or sizes["encoder_hidden_states"] not in ((1,), (2,)):
        raise QvditError(f"{path} with tensors that do not belong together", expected, fix)
    return SamplingPlan(
        latents=tensors["latents"],
        timesteps=tensors["timesteps"],
        keep=tensors["keep"],
        gain=tensors["gain"],
        condition=tensors["encoder_hidden_states"],
        guidance=float(tensors["guidance"][0]),
        clamp=bool(tensors["clamp"][0]),
        reference=tensors.get("reference"),
    )
