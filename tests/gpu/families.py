"""Bundles of small random models of every family: what engines are compared on where nothing was trained.

    python tests/gpu/families.py --out out/families                                   # everything, a folder a bundle
    python tests/gpu/families.py --out out/families --families wan --kinds w4a8,w3a6

Each is the job itself on a pipeline of random weights, up to its parity stage: OUT/FAMILY-KIND. A kind is a bit width,
or ``int8-static``, which needs NVIDIA ModelOpt. A family is calibrated once for all its kinds, in OUT/work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KINDS = ("int8-static", "w8a8", "w4a8", "w3a8", "w3a6")
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


def make_bundle(family: str, kind: str, out: Path, device: str = "cpu", threads: int = 1) -> Path:
    """The bundle OUT/FAMILY-KIND, for TensorRT; what is there already is reused."""
    from qvdit.job import Job
    from qvdit.settings import JobSettings

    model, bundle = out / "work" / family / "model", out / f"{family}-{kind}"
    if not (model / "model_index.json").is_file():
        random_pipeline(family, model)
    static = kind == "int8-static"
    settings = JobSettings(
        model=str(model),
        out=bundle,
        target="tensorrt",
        prompt_count=1,
        steps=4,
        records=2,
        videos=1,
        device=device,
        distillation_steps=0,
        calibration=out / "work" / family / "calibration",
        threads=threads,
        recipe=kind if static else "qvdit",
        bits="w8a8" if static else kind,
    )
    Job(settings).run("parity")
    return bundle


def main() -> None:
    """Make what is asked for, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for family in arguments.families.split(","):
        for kind in arguments.kinds.split(","):
            start = time.monotonic()
            bundle = make_bundle(family, kind, arguments.out, threads=arguments.threads)
            print(f"{bundle}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
