"""Latte (``LatteTransformer3DModel``): separate spatial and temporal attention, as in Open-Sora and the paper."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.export import Dim

from qvdit.contract import FrameRows
from qvdit.models.adapter import Fusion, ModelAdapter, Site, attention_fusions, frames_first


class LatteAdapter(ModelAdapter):
    """Text-to-video Latte."""

    family = "latte"
    class_name = "LatteTransformer3DModel"
    inputs = ("hidden_states", "timestep", "encoder_hidden_states")
    # Positions are a table of the configuration's size: only the batch and the text vary.
    dynamic_axes: ClassVar[dict[str, dict[int, str]]] = {
        "hidden_states": {0: "batch"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
    }

    def sites(self, model: torch.nn.Module) -> list[Site]:
        found = []
        for i in range(len(model.transformer_blocks)):  # type: ignore[arg-type]
            found += _block(model, f"transformer_blocks.{i}", "spatial_attention", FrameRows.SPATIAL)
            found += _block(model, f"temporal_transformer_blocks.{i}", "temporal_attention", FrameRows.TEMPORAL)
        return found

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)  # type: ignore[arg-type]
        return [block for pair in pairs for block in pair]

    def frames(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> int:
        return inputs["hidden_states"].shape[2]

    def output_frames(self, output: torch.Tensor, frames: int) -> torch.Tensor:
        return frames_first(output, frames)

    def fusions(self, model: torch.nn.Module) -> list[Fusion]:
        return attention_fusions(self.sites(model))

    def fuse(self, model: torch.nn.Module, fusion: Fusion, linear: torch.nn.Module) -> None:
        from diffusers.models.attention_processor import FusedAttnProcessor2_0

        super().fuse(model, fusion, linear)
        # This class of attention leaves it to the processor whether its projections are fused.
        model.get_submodule(fusion.attention).set_processor(FusedAttnProcessor2_0())  # type: ignore[operator]

    def export_shapes(self, config: dict[str, Any]) -> dict[str, Any]:
        batch = Dim("batch", min=1, max=4096)
        return {
            "hidden_states": {0: batch},
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("text_tokens", min=1, max=4096)},
        }


def _block(model: torch.nn.Module, block: str, role: str, rows: FrameRows) -> list[Site]:
    found = [Site(f"{block}.attn1.{p}", role, rows, f"{block}.attn1.x") for p in ("to_q", "to_k", "to_v")]
    found.append(Site(f"{block}.attn1.to_out.0", role, rows, f"{block}.attn1.out"))
    if getattr(model.get_submodule(block), "attn2", None) is not None:
        found.append(Site(f"{block}.attn2.to_q", "cross_attention", rows, f"{block}.attn2.x"))
        for projection in ("to_k", "to_v"):
            found.append(Site(f"{block}.attn2.{projection}", "text", FrameRows.NONE, f"{block}.attn2.text"))
        found.append(Site(f"{block}.attn2.to_out.0", "cross_attention", rows, f"{block}.attn2.out"))
    found.append(Site(f"{block}.ff.net.0.proj", "mlp", rows, f"{block}.ff.x"))
    found.append(Site(f"{block}.ff.net.2", "mlp", rows, f"{block}.ff.hidden"))
    return found
