"""Pipelines of small random models, one of every family: what engines are proven on where nothing was trained.

python3 tests/gpu/families.py DIR
python3 tests/gpu/bundles.py OUT --models DIR/wan,DIR/latte,DIR/cogvideox
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

TEXT = 7  # tokens of a prompt of the drawn world


def wan() -> Any:
    """Two blocks, hidden 128, whose projections can be merged; 256 tokens in 16 frames."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 8, 8),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=64,
        freq_dim=64,
        ffn_dim=320,
        num_layers=2,
        rope_max_seq_len=64,
    )


def latte() -> Any:
    """A spatial and a temporal block, hidden 96, whose projections cannot be merged; 1024 tokens in 16 frames."""
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        cross_attention_dim=96,
        attention_bias=True,
        sample_size=32,
        patch_size=4,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=64,
        video_length=16,
    )


def cogvideox() -> Any:
    """Two blocks, hidden 128, rotary embedding. It takes a video of 3 channels and 16 frames for one of 16 and 3."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=2,
        sample_width=32,
        sample_height=32,
        sample_frames=9,
        patch_size=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


FAMILIES: dict[str, Callable[[], Any]] = {"wan": wan, "latte": latte, "cogvideox": cogvideox}


def random_pipeline(family: str, folder: Path, seed: int = 0) -> Path:
    """A pipeline that samples pixels with random weights, on disk; the same seed gives the same bytes."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from qvdit.reference.pipeline import PixelVideoPipeline, PromptTable

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FAMILIES[family]().eval().requires_grad_(False)
    table = PromptTable.draw(torch.Generator().manual_seed(seed))
    PixelVideoPipeline(transformer, FlowMatchEulerDiscreteScheduler(), table).save_pretrained(folder)
    return folder


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for family in FAMILIES:
        print(random_pipeline(family, given.out / family))


if __name__ == "__main__":
    main()
