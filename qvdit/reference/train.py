"""Train the reference models on videos drawn on the fly, and judge them from pixels.

    python -m qvdit.reference.train --model latte-shapes --out DIR      on one GPU; compiling takes a minute more
    python -m qvdit.reference.train --judge qvdit/reference/wan-shapes

Flow matching: x_t = (1 - t) x + t ε, the model predicts ε - x, t is logit-normal, shifted towards noise as the
sampler's steps are; the condition is dropped one time in ten; the weights that are saved are their exponential moving
average, in float16.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel, WanTransformer3DModel

from qvdit.reference import measure, world
from qvdit.reference.pipeline import PixelVideoPipeline, PromptTable, draw_noise

TEXT_DIM = 64
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan-shapes": (
        WanTransformer3DModel,
        {
            "patch_size": (1, 4, 4),
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "in_channels": 3,
            "out_channels": 3,
            "text_dim": TEXT_DIM,
            "freq_dim": 256,
            "ffn_dim": 640,
            "num_layers": 6,
        },
    ),
    "latte-shapes": (
        LatteTransformer3DModel,
        {
            "patch_size": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 64,
            "in_channels": 3,
            "out_channels": 3,
            "cross_attention_dim": 192,
            "caption_channels": TEXT_DIM,
            "num_layers": 5,  # pairs of a spatial and a temporal block
            "sample_size": world.SIZE,
            "video_length": world.FRAMES,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
    ),
}
BAR = {"colour": 0.98, "background": 0.98, "shape": 0.90, "direction": 0.90}
"""What the full-precision model must reach on 256 fresh prompts, and the drawn videos by 0.99."""

EMA = 0.999
DROP_CONDITION = 0.1
WARM_UP_STEPS = 200
SHIFT = 3.0  # towards noise, where it is decided what moves where


def build(name: str, device: torch.device, seed: int) -> tuple[torch.nn.Module, PromptTable]:
    """A fresh model and its prompt table."""
    torch.manual_seed(seed)
    kind, config = ARCHITECTURES[name]
    model = kind(**config).to(device)
    # Every block starts as the identity, which is worth a few hundred steps: its gates are zero.
    for parameter_name, parameter in model.named_parameters():
        if "blocks." in parameter_name and parameter_name.endswith("scale_shift_table"):
            parameter.data[..., [2, 5], :] = 0
    torch.nn.init.zeros_(model.proj_out.weight)
    table = PromptTable.draw(torch.Generator().manual_seed(seed), TEXT_DIM)
    return model, table.to(device)


def optimizers(model: torch.nn.Module, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks." in n and n.endswith(".weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def batch_loss(model: Callable[..., Any], table: PromptTable, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Flow-matching loss of one freshly drawn batch, a float32 scalar."""
    videos, scenes = world.draw_videos(batch, generator)
    condition = table.embed(scenes)
    dropped = torch.rand(batch, generator=generator, device=videos.device) < DROP_CONDITION
    condition = torch.where(dropped[:, None, None], table.codebook[0], condition)
    t = torch.sigmoid(torch.randn(batch, generator=generator, device=videos.device) + math.log(SHIFT))
    noise = torch.randn(videos.shape, generator=generator, device=videos.device)
    mixed = torch.lerp(videos, noise, t[:, None, None, None, None])
    with torch.autocast(videos.device.type, dtype=torch.bfloat16):
        predicted = model(hidden_states=mixed, timestep=t * 1000, encoder_hidden_states=condition, return_dict=False)[0]
    return torch.nn.functional.mse_loss(predicted.float(), noise - videos)


def train(
    name: str, out: Path, minutes: float, batch: int, optimizer: str, lr: float, seed: int, start: Path | None
) -> None:
    """Train for a time budget with a cosine schedule over it and save the averaged model as a pipeline in ``out``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model, table = build(name, device, seed)
    if start is not None:
        model.load_state_dict(ARCHITECTURES[name][0].from_pretrained(start / "transformer").state_dict())
    average = [p.detach().clone() for p in model.parameters()]
    steppers = optimizers(model, optimizer, lr)
    compiled = torch.compile(model) if device.type == "cuda" else model
    generator = torch.Generator(device).manual_seed(seed)
    began, step, logged = None, 0, time.monotonic()
    while began is None or time.monotonic() - began < minutes * 60:
        share = 0.0 if began is None else (time.monotonic() - began) / (minutes * 60)
        now = lr * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = now
        loss = batch_loss(compiled, table, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, list(model.parameters()), 1 - min(EMA, step / (step + 10)))
        if step == 10:  # compiled and warm
            began = time.monotonic()
        if time.monotonic() - logged > 20:
            print(f"step {step} loss {loss.item():.5f} lr {now:.2e}", flush=True)
            logged = time.monotonic()
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    print(f"trained {step} steps of {batch} videos", flush=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    PixelVideoPipeline(model.half().cpu(), scheduler, table.half().cpu()).save_pretrained(out)


@torch.no_grad()
def judge(path: Path, prompts: int = 256, seed: int = 2026, steps: int = 20, guidance: float = 2.5) -> dict[str, float]:
    """Measurements of videos sampled for fresh prompts, and of as many drawn ones (``drawn_…``)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = PixelVideoPipeline.from_pretrained(path).to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn, scenes = world.draw_videos(prompts, generator)
    noise = draw_noise(prompts, generator)
    sampled = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, prompts, 128):
            chosen = [scene.prompt for scene in scenes.scenes()[start : start + 128]]
            videos = pipe(
                chosen, num_inference_steps=steps, guidance_scale=guidance, latents=noise[start : start + 128]
            ).frames
            sampled.append(videos.cpu())
    result = {name: value.mean().item() for name, value in measure.measure(torch.cat(sampled), scenes).items()}
    for name, value in measure.measure(drawn, scenes).items():
        result[f"drawn_{name}"] = value.mean().item()
    return result


def main(
    model: Annotated[str, typer.Option(help=f"What to train: {' or '.join(ARCHITECTURES)}.")] = "wan-shapes",
    out: Annotated[Path | None, typer.Option(help="Folder to save the trained pipeline in.")] = None,
    minutes: Annotated[float, typer.Option(help="Time budget after compiling.")] = 8.0,
    batch: Annotated[int, typer.Option(help="Videos in a batch.")] = 128,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, codebook and data.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Pipeline whose weights to start from.")] = None,
    judge_only: Annotated[Path | None, typer.Option("--judge", help="Only judge this pipeline.")] = None,
    prompts: Annotated[int, typer.Option(help="Fresh prompts to judge on.")] = 256,
) -> None:
    """Train, then print the measurements of the model and of the world as JSON; exit status 1 below the bar."""
    if judge_only is None:
        if out is None:
            raise typer.BadParameter("give --out DIR to train into, or --judge DIR")
        if model not in ARCHITECTURES:
            raise typer.BadParameter(f"--model {model!r} is not one of {', '.join(ARCHITECTURES)}")
        train(model, out, minutes, batch, optimizer, lr, seed, start)
    result = judge(judge_only or out or Path(), prompts)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}, indent=1))
    met = all(result[n] >= bar and result[f"drawn_{n}"] >= 0.99 for n, bar in BAR.items())
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(main)
