"""A session in the clothes of a diffusers transformer, so that a pipeline can call it.

Takes and gives torch tensors where the pipeline uses torch, numpy arrays otherwise; torch is imported by the caller or
not at all.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from qvdit.contract import QvditError
from qvdit.contract.bundle import Manifest


class Session(Protocol):
    """What every runtime's session offers."""

    def infer(self, inputs: dict[str, Any]) -> Any:
        """Run the model once: numpy arrays, or PyTorch's CUDA tensors where the session is on a GPU."""


class _Config(SimpleNamespace):
    """A transformer's configuration, read by attribute, by key or with ``get``, as diffusers' is."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        return getattr(self, name, default)


class RuntimeTransformer:
    """``pipe.transformer = RuntimeTransformer(…)``: answers what diffusers' pipelines ask of their transformer."""

    def __init__(self, session: Session, manifest: Manifest, device: str = "cpu"):
        self.session, self.manifest, self._device = session, manifest, device
        self.config = _Config(**manifest.source_config)

    @property
    def dtype(self) -> Any:
        """The dtype that a pipeline should feed: float32."""
        return sys.modules["torch"].float32 if "torch" in sys.modules else np.dtype(np.float32)

    @property
    def device(self) -> Any:
        """Where the session runs."""
        return sys.modules["torch"].device(self._device) if "torch" in sys.modules else self._device

    def to(self, *_: Any, **__: Any) -> RuntimeTransformer:
        """Stay where it is: an engine does not move."""
        return self

    def eval(self) -> RuntimeTransformer:
        """It never trains."""
        return self

    @contextlib.contextmanager
    def cache_context(self, _: str, **__: Any) -> Iterator[None]:
        """Diffusers names its conditional and unconditional passes; there is nothing to cache here."""
        yield

    def __call__(
        self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True, **others: Any
    ) -> Any:
        """Run the model; names and shapes are those of the diffusers class in the manifest.

        A time step without a batch dimension is repeated for the batch. Other arguments must be absent or None.
        """
        unknown = {k for k, v in others.items() if v is not None and not _harmless(k, v)}
        if unknown:
            raise QvditError(
                f"argument {sorted(unknown)[0]!r}", "only what the model was exported with", "leave it out"
            )
        stays = self._device != "cpu" and getattr(hidden_states, "is_cuda", False)
        inputs: dict[str, Any] = {
            name: _on_device(value, hidden_states.device) if stays else _numpy(value)
            for name, value in (
                ("hidden_states", hidden_states),
                ("timestep", timestep),
                ("encoder_hidden_states", encoder_hidden_states),
            )
        }
        batch = (hidden_states.shape[0],)
        inputs["timestep"] = inputs["timestep"].expand(batch) if stays else np.broadcast_to(inputs["timestep"], batch)
        output = self.session.infer(inputs)
        sample = output.to(hidden_states.device, hidden_states.dtype) if stays else _like(output, hidden_states)
        return SimpleNamespace(sample=sample) if return_dict else (sample,)


def _harmless(name: str, value: Any) -> bool:
    """Whether an argument asks for nothing but what was exported."""
    if name == "image_rotary_emb":  # a constant of the video's size, which the session checks
        return True
    return (name == "enable_temporal_attentions" and value is True) or (name == "attention_kwargs" and not value)


def _on_device(value: Any, device: Any) -> Any:
    return sys.modules["torch"].as_tensor(value).detach().to(device)


def _numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().float().numpy() if hasattr(value, "detach") else np.asarray(value)


def _like(output: np.ndarray, model: Any) -> Any:
    """The output as the kind of array that came in."""
    if hasattr(model, "detach"):
        return sys.modules["torch"].from_numpy(output).to(model.device, model.dtype)
    return output.astype(model.dtype)
