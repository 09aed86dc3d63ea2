"""Layers that are rounded, kept on disk one by one: a job that is stopped goes on after the last.

Of a model of real size each takes seconds to minutes, and all of them hours on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvdit.contract.files import write_atomic

_RANDOM = "random_state"
_REQUIRED, _OPTIONAL = ("latent", "scale", "zero"), ("bias", "alpha", "beta")


@dataclass(frozen=True)
class StartedLayer:
    """What rounding a linear found: where its training starts."""

    latent: torch.Tensor  # float32 [N, K]: nearest rounding gives the integers
    scale: torch.Tensor  # float32 [N] or [N, C]
    zero: torch.Tensor  # float32, of the scale's shape
    bias: torch.Tensor | None  # float32 [N]
    alpha: torch.Tensor | None  # float32 [K, R]
    beta: torch.Tensor | None  # float32 [R, N]


class StartedLayers:
    """A folder of them, for one model, one recipe and one seed: the caller names it by all that they depend on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, name: str, generator: torch.Generator, device: torch.device) -> StartedLayer | None:
        """A layer that was kept, the generator as it was left behind it; None where there is none, or a damaged one."""
        try:
            tensors = load_file(self._path(name), device=str(device))
            state = tensors.pop(_RANDOM)
            required, optional = [tensors[field] for field in _REQUIRED], [tensors.get(field) for field in _OPTIONAL]
        except (OSError, SafetensorError, KeyError):
            return None
        generator.set_state(state.cpu())
        return StartedLayer(*required, *optional)

    def keep(self, name: str, layer: StartedLayer, generator: torch.Generator) -> None:
        """Write a layer, whole or not at all, and the state of the generator behind it."""
        tensors = {field: getattr(layer, field) for field in (*_REQUIRED, *_OPTIONAL)}
        kept = {field: tensor.contiguous() for field, tensor in tensors.items() if tensor is not None}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(name), lambda path: save_file({**kept, _RANDOM: generator.get_state()}, path))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
