"""CogVideoX (``CogVideoXTransformer3DModel``): full attention over one sequence of text tokens and video tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.export import Dim

from qvdit.contract import FrameRows
from qvdit.models.adapter import Fusion, ModelAdapter, Site, attention_fusions, frames_first, pair_turn, rotate_pairs

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [T·H·W, D]."""


class CogVideoXAdapter(ModelAdapter):
    """Text-to-video CogVideoX 1.0 and 1.5.

    Every linear reads the joint sequence [B, text + T·P, K]. Its text rows would need gain 1, and ``FrameRows`` has no
    way to say that rows come before the first frame: no layer has gains by frame (``FrameRows.NONE``).
    """

    family = "cogvideox"
    class_name = "CogVideoXTransformer3DModel"
    inputs = ("hidden_states", "encoder_hidden_states", "timestep")  # hidden_states: [B, T·p, C, H, W]
    # Positions, be they a table or a rotary embedding, are constants of one size; the pipeline pads every text alike.
    dynamic_axes: ClassVar[dict[str, dict[int, str]]] = {name: {0: "batch"} for name in inputs}

    def sites(self, model: torch.nn.Module) -> list[Site]:
        found = []
        for i in range(len(model.transformer_blocks)):  # type: ignore[arg-type]
            block = f"transformer_blocks.{i}"
            for name, role, shared in (
                *((f"attn1.{p}", "self_attention", "attn1.x") for p in ("to_q", "to_k", "to_v")),
                ("attn1.to_out.0", "self_attention", "attn1.out"),
                ("ff.net.0.proj", "mlp", "ff.x"),
                ("ff.net.2", "mlp", "ff.hidden"),
            ):
                found.append(Site(f"{block}.{name}", role, FrameRows.NONE, f"{block}.{shared}"))
        return found

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        return list(model.transformer_blocks)  # type: ignore[arg-type]

    def frames(self, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> int:
        return inputs["hidden_states"].shape[1] // (config.get("patch_size_t") or 1)

    def output_frames(self, output: torch.Tensor, frames: int) -> torch.Tensor:
        return frames_first(output.transpose(1, 2), frames)

    def complete(self, model: torch.nn.Module) -> None:
        if model.config.use_rotary_positional_embeddings:  # type: ignore[union-attr]
            model.register_forward_pre_hook(_add_rotary, with_kwargs=True)

    def prepare_for_export(self, model: torch.nn.Module) -> None:
        processor = _ExportProcessor(model.config.attention_head_dim)  # type: ignore[union-attr, arg-type]
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            block.attn1.set_processor(processor)

    def fusions(self, model: torch.nn.Module) -> list[Fusion]:
        return attention_fusions(self.sites(model))

    def fuse(self, model: torch.nn.Module, fusion: Fusion, linear: torch.nn.Module) -> None:
        from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0

        super().fuse(model, fusion, linear)
        model.get_submodule(fusion.attention).set_processor(FusedCogVideoXAttnProcessor2_0())  # type: ignore[operator]

    def export_shapes(self, config: dict[str, Any]) -> dict[str, Any]:
        batch = Dim("batch", min=1, max=4096)
        return {name: {0: batch} for name in self.inputs}


def _add_rotary(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a forward pass the rotary embedding of its video's size, as the pipeline would, where the caller did not."""
    if kwargs.get("image_rotary_emb") is None:
        video = args[0] if args else kwargs["hidden_states"]
        kwargs["image_rotary_emb"] = rotary_embedding(model.config, video.shape, video.device)
    return args, kwargs


def rotary_embedding(config: Any, shape: torch.Size, device: torch.device) -> Rotary:
    """The rotary embedding of latents [B, T·p, C, H, W], as CogVideoXPipeline makes it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = shape[1], shape[3], shape[4]
    patch, patch_time = config.patch_size, config.patch_size_t
    grid, base = (height // patch, width // patch), (config.sample_height // patch, config.sample_width // patch)
    make: Callable[..., Rotary] = get_3d_rotary_pos_embed
    if patch_time is None:  # 1.0
        crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return make(config.attention_head_dim, crop, grid, frames, device=device)
    time = (frames + patch_time - 1) // patch_time
    return make(config.attention_head_dim, None, grid, time, grid_type="slice", max_size=base, device=device)


class _ExportProcessor:
    """CogVideoX's attention without writing into slices, which would become ScatterND over the whole sequence."""

    def __init__(self, features: int):
        self.turn = pair_turn(features)  # of a head

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)  # [B, H, L, D]
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :, :text], rotate_pairs(x[:, :, text:], *image_rotary_emb, self.turn)], 2)
                for x in (query, key)
            )
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]
