"""What the toolchain must know of a model family: one adapter each, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qvdit.contract import FrameRows


@dataclass(frozen=True)
class Site:
    """A linear that may be quantized."""

    name: str  # module path inside the transformer
    role: str  # one of ROLES
    rows: FrameRows  # how its rows relate to frames; NONE where they are no video tokens
    shared_input: str  # sites with the same value read the same tensor (q, k and v of one attention)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r} is not one of {', '.join(ROLES)}")


ROLES = ("self_attention", "spatial_attention", "temporal_attention", "cross_attention", "text", "mlp")
TEMPORAL_ROLES = ("self_attention", "temporal_attention")
"""Where tokens of different frames meet: full 3D attention counts as temporal."""


class ModelAdapter(ABC):
    """A family of video DiTs."""

    family: str  # short name
    class_name: str  # of diffusers
    inputs: tuple[str, ...]  # tensor inputs of forward, by diffusers' names, in order
    dynamic_axes: ClassVar[dict[str, dict[int, str]]]  # which dimensions of the inputs vary: axis → name

    @abstractmethod
    def sites(self, model: torch.nn.Module) -> list[Site]:
        """The linears to quantize; embeddings, modulation and the output projection stay in full precision."""

    @abstractmethod
    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The transformer blocks, in the order they run."""

    @abstractmethod
    def frames(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> int:
        """T: how many frames the tokens of a forward pass with these inputs span."""

    @abstractmethod
    def output_frames(self, output: torch.Tensor, frames: int) -> torch.Tensor:
        """The model's output [B, C, T·p, H, W] as one feature per frame of tokens, [B, T, D]."""

    @abstractmethod
    def export_shapes(self, config: dict[str, Any]) -> dict[str, Any]:
        """Dynamic shapes for torch.export, by input name."""

    def prepare_for_export(self, model: torch.nn.Module) -> None:  # noqa: B027  (most families need nothing)
        """Replace, in place, what computes the same but exports badly."""


def frames_first(output: torch.Tensor, frames: int) -> torch.Tensor:
    """[B, C, F, H, W] → [B, T, D]: whole frames, every channel of them together (F a multiple of T)."""
    batch = output.shape[0]
    return output.permute(0, 2, 1, 3, 4).reshape(batch, frames, -1)
