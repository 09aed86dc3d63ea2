"""Wan (``WanTransformer3DModel``): full 3D attention over (frame, height, width) tokens, text by cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from qvdit.contract import FrameRows
from qvdit.models.adapter import ModelAdapter, Site, frames_first


class WanAdapter(ModelAdapter):
    """Text-to-video Wan 2.1 and 2.2."""

    family = "wan"
    class_name = "WanTransformer3DModel"
    inputs = ("hidden_states", "timestep", "encoder_hidden_states")
    dynamic_axes = {
        "hidden_states": {0: "batch", 3: "height", 4: "width"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
    }

    def sites(self, model: torch.nn.Module) -> list[Site]:
        video = FrameRows.SEQUENCE
        found = []
        for i in range(len(model.blocks)):  # type: ignore[arg-type]
            block = f"blocks.{i}"
            for projection in ("to_q", "to_k", "to_v"):
                found.append(Site(f"{block}.attn1.{projection}", "self_attention", video, f"{block}.attn1.x"))
            found.append(Site(f"{block}.attn1.to_out.0", "self_attention", video, f"{block}.attn1.out"))
            found.append(Site(f"{block}.attn2.to_q", "cross_attention", video, f"{block}.attn2.x"))
            for projection in ("to_k", "to_v"):
                found.append(Site(f"{block}.attn2.{projection}", "text", FrameRows.NONE, f"{block}.attn2.text"))
            found.append(Site(f"{block}.attn2.to_out.0", "cross_attention", video, f"{block}.attn2.out"))
            found.append(Site(f"{block}.ffn.net.0.proj", "mlp", video, f"{block}.ffn.x"))
            found.append(Site(f"{block}.ffn.net.2", "mlp", video, f"{block}.ffn.hidden"))
        return found

    def frames(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> int:
        return inputs["hidden_states"].shape[2] // config["patch_size"][0]

    def output_frames(self, output: torch.Tensor, frames: int) -> torch.Tensor:
        return frames_first(output, frames)

    def export_shapes(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        from torch.export import Dim

        _, patch_height, patch_width = config["patch_size"]
        batch = Dim("batch", min=1, max=4096)
        return {
            "hidden_states": {
                0: batch,
                3: patch_height * Dim("rows", min=1, max=1024),
                4: patch_width * Dim("columns", min=1, max=1024),
            },
            "timestep": {0: batch},
            "encoder_hidden_states": {0: batch, 1: Dim("text_tokens", min=1, max=4096)},
        }
