"""The sampling plan of a pipeline: what a program without PyTorch needs to repeat a run of it.

What needs the pipeline (noise, text encoder, scheduler) is taken from it here. What is left is arithmetic:
x ← keep · x + gain · v at every step, v the model's guided output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qvdit.contract import QvditError
from qvdit.contract.plan import SamplingPlan

_TAKEN = {"hidden_states", "timestep", "encoder_hidden_states"}  # what the model is given in every pass


def plan_sampling(
    pipeline: Any, sample: Callable[[Any], Any], guidance: float, clamp: bool, reference: np.ndarray | None = None
) -> SamplingPlan:
    """The plan of what ``sample(pipeline)`` samples: one video, both guided passes in one batch.

    The model is not run: something takes its place that notes its inputs and answers with zeros. A pipeline that calls
    it otherwise, or whose scheduler is not linear in its last input and output alone, raises QvditError.
    """
    recorder = _Recorder(pipeline.transformer)
    kept = pipeline.transformer
    pipeline.transformer = recorder
    try:
        sample(pipeline)
    finally:
        pipeline.transformer = kept
    if not recorder.calls or any(not call.keys() >= _TAKEN for call in recorder.calls):
        raise _unplanned(f"a transformer that is not called with tensors {', '.join(sorted(_TAKEN))}")
    first, times = recorder.calls[0], [float(call["timestep"].flatten()[0]) for call in recorder.calls]
    batch = first["encoder_hidden_states"].shape[0]
    if first["hidden_states"].shape[0] != batch or batch != (2 if guidance > 1 else 1):
        raise _unplanned(f"{batch} conditions and {first['hidden_states'].shape[0]} videos in a pass")
    keep, gain = step_factors(pipeline.scheduler, len(times))
    return SamplingPlan(
        latents=first["hidden_states"][:1].numpy(),
        timesteps=np.array(times, np.float32),
        keep=keep,
        gain=gain,
        condition=first["encoder_hidden_states"].numpy(),
        guidance=guidance,
        clamp=clamp,
        reference=reference,
    )


def step_factors(scheduler: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """keep and gain, float32 [S] each, of a scheduler whose step is keep · x + gain · v; QvditError for any other."""
    # One video of one frame: some schedulers look at the dimensions.
    x, velocity = (torch.tensor(values).reshape(1, 1, 1, 1, 2) for values in ([1.0, 0.0], [0.0, 1.0]))
    probe = _run(scheduler, steps, x, [velocity] * steps, chain=False)
    keep, gain = (np.array([values.flatten()[i].item() for values in probe], np.float32) for i in (0, 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, 8, 8, generator=generator)
    velocities = [torch.randn(1, 1, 1, 8, 8, generator=generator) for _ in range(steps)]
    expected = x
    for k, g, velocity in zip(keep, gain, velocities, strict=True):
        expected = float(k) * expected + float(g) * velocity
    found = _run(scheduler, steps, x, velocities, chain=True)[-1]
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise _unplanned(f"a {type(scheduler).__name__}, which looks back at earlier steps or clips")
    return keep, gain


def _run(
    scheduler: Any, steps: int, x: torch.Tensor, velocities: list[torch.Tensor], chain: bool
) -> list[torch.Tensor]:
    """What each step makes: of the last one's result, or with ``chain`` false of ``x`` every time."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    if len(own.timesteps) != steps:
        raise _unplanned(f"a {type(scheduler).__name__}, which makes {len(own.timesteps)} steps of {steps}")
    made, last = [], x
    for time, velocity in zip(own.timesteps, velocities, strict=True):
        made.append(own.step(velocity, time, last if chain else x, return_dict=False)[0])
        last = made[-1]
    return made


def _unplanned(what: str) -> QvditError:
    return QvditError(
        what, "one video, guided in one batch, by a scheduler of single linear steps", "sample with the pipeline"
    )


class _Recorder:
    """In a transformer's place: notes what it is given, float32 on the CPU, and answers with zeros."""

    def __init__(self, transformer: Any):
        self.config, self.dtype, self.device = transformer.config, transformer.dtype, transformer.device
        self.calls: list[dict[str, torch.Tensor]] = []

    def __call__(self, hidden_states: torch.Tensor, return_dict: bool = True, **others: Any) -> Any:
        given = {"hidden_states": hidden_states, **others}
        self.calls.append(
            {name: v.detach().cpu().float().clone() for name, v in given.items() if isinstance(v, torch.Tensor)}
        )
        zeros = torch.zeros_like(hidden_states)
        return SimpleNamespace(sample=zeros) if return_dict else (zeros,)
