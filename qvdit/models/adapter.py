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


@dataclass(frozen=True)
class Fusion:
    """Linears of one attention that read the same tensor and that diffusers can call as one."""

    attention: str  # module path of the attention inside the transformer
    merged: str  # the one linear's name in it, diffusers': to_qkv or to_kv
    parts: tuple[str, ...]  # the linears' names in it, in the order of the merged one's outputs

    def names(self) -> tuple[str, ...]:
        """Module paths of the linears."""
        return tuple(f"{self.attention}.{part}" for part in self.parts)


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

    def complete(self, model: torch.nn.Module) -> None:  # noqa: B027  (most families need nothing)
        """Let a model, in place, do with :attr:`inputs` alone: supply what else its pipeline would pass."""

    def prepare_for_export(self, model: torch.nn.Module) -> None:  # noqa: B027  (most families need nothing)
        """Replace, in place, what computes the same but exports badly."""

    def fusions(self, model: torch.nn.Module) -> list[Fusion]:
        """What :meth:`fuse` can merge; nothing where diffusers has no such mechanism for the family."""
        return []

    def fuse(self, model: torch.nn.Module, fusion: Fusion, linear: torch.nn.Module) -> None:
        """Let an attention call ``linear``, whose outputs are those of the parts side by side; the parts are removed.

        Diffusers' ``fuse_projections`` does this with full-precision weights. Its ``unfuse_projections`` would need
        the parts.
        """
        attention = model.get_submodule(fusion.attention)
        attention.add_module(fusion.merged, linear)
        for part in fusion.parts:
            delattr(attention, part)
        attention.fused_projections = True  # type: ignore[assignment]


def frames_first(output: torch.Tensor, frames: int) -> torch.Tensor:
    """[B, C, F, H, W] → [B, T, D]: whole frames, every channel of them together (F a multiple of T)."""
    batch = output.shape[0]
    return output.permute(0, 2, 1, 3, 4).reshape(batch, frames, -1)


def attention_fusions(sites: list[Site]) -> list[Fusion]:
    """Queries, keys and values of one tensor as ``to_qkv``, keys and values as ``to_kv``: diffusers' own names."""
    by_input: dict[str, list[str]] = {}
    for site in sites:
        by_input.setdefault(site.shared_input, []).append(site.name)
    known = {("to_q", "to_k", "to_v"): "to_qkv", ("to_k", "to_v"): "to_kv"}
    found = []
    for names in by_input.values():
        attention = names[0].rpartition(".")[0]
        parts = tuple(name.rpartition(".")[2] for name in names)
        if parts in known:
            found.append(Fusion(attention, known[parts], parts))
    return found


def pair_turn(features: int) -> torch.Tensor:
    """The float32 matrix [D, D] that turns pairs of features, (a, b) → (-b, a): a signed permutation.

    Made before a model is traced: within, it would be written element by element, as ScatterND, in every attention.
    """
    turn = torch.zeros(features, features)
    even = torch.arange(0, features, 2)
    turn[even + 1, even], turn[even, even + 1] = -1.0, 1.0
    return turn


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """A rotary embedding: pairs of features (a, b) → (a cos - b sin, a sin + b cos). x: [..., D]; cos, sin broadcast.

    As a product with ``turn``, :func:`pair_turn`'s: exact, and one MatMul where it is exported.
    """
    return x * cos + (x @ turn) * sin
