"""Wan (``WanTransformer3DModel``): full 3D attention over (frame, height, width) tokens, text by cross-attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.export import Dim

from qvdit.contract import FrameRows
from qvdit.models.adapter import Fusion, ModelAdapter, Site, attention_fusions, frames_first, pair_turn, rotate_pairs


class WanAdapter(ModelAdapter):
    """Text-to-video Wan 2.1."""

    family = "wan"
    class_name = "WanTransformer3DModel"
    inputs = ("hidden_states", "timestep", "encoder_hidden_states")
    dynamic_axes: ClassVar[dict[str, dict[int, str]]] = {
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

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def frames(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> int:
        return inputs["hidden_states"].shape[2] // config.get("patch_size", (1, 2, 2))[0]

    def output_frames(self, output: torch.Tensor, frames: int) -> torch.Tensor:
        return frames_first(output, frames)

    def prepare_for_export(self, model: torch.nn.Module) -> None:
        processor = _ExportProcessor(model.config.attention_head_dim)  # type: ignore[union-attr, arg-type]
        for block in model.blocks:  # type: ignore[union-attr]
            for attention in (block.attn1, block.attn2):
                if attention.add_k_proj is None:
                    attention.set_processor(processor)

    def fusions(self, model: torch.nn.Module) -> list[Fusion]:
        # One flag of an attention stands for its image keys and values too, which are not quantized.
        found = attention_fusions(self.sites(model))
        return [f for f in found if getattr(model.get_submodule(f.attention), "add_k_proj", None) is None]

    def export_shapes(self, config: dict[str, Any]) -> dict[str, Any]:
        _, patch_height, patch_width = config.get("patch_size", (1, 2, 2))
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


class _ExportProcessor:
    """Wan's attention with the rotary embedding as a product with a constant matrix.

    Diffusers writes every second element of a tensor in place, which becomes ScatterND between two transposes of the
    whole tensor: a third of the model's time in ONNX Runtime. Multiplying by a signed permutation is the same, exactly.
    """

    def __init__(self, features: int):
        self.turn = pair_turn(features)  # of a head

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))  # [B, L, H, D]
        if rotary_emb is not None:
            query, key = (rotate_pairs(x, *rotary_emb, self.turn) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
