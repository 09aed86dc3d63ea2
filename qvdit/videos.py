"""Writing a sampled video to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic

_SUFFIXES = (".webp", ".gif", ".safetensors")
FRAMES_PER_SECOND = 8
_SMALLEST_SIDE = 192  # pixels: smaller videos are enlarged by a whole factor


def check_suffix(path: Path) -> None:
    """Refuse a file type before any work is done."""
    if path.suffix not in _SUFFIXES:
        raise QvditError(f"--out {path}", f"a file ending in {', '.join(_SUFFIXES)}", "check --out")


def write_video(video: Any, path: Path) -> None:
    """Write a video [1, 3, T, H, W] in -1 … 1, of any device, as an animation, or any latents as safetensors."""
    tensor = torch.as_tensor(video).float().cpu()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        write_atomic(path, lambda temporary: save_file({"video": tensor.contiguous()}, temporary))
        return
    if tensor.ndim != 5 or tensor.shape[1] != 3:
        raise QvditError(f"latents of shape {tuple(tensor.shape)}", "pixels", "write them to a .safetensors file")
    from PIL import Image

    frames = ((tensor[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    factor = max(1, _SMALLEST_SIDE // min(frames.shape[1:3]))
    images = [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in frames]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    write_atomic(
        path,
        lambda temporary: images[0].save(
            temporary,
            format=path.suffix[1:].upper(),
            save_all=True,
            append_images=images[1:],
            duration=1000 // FRAMES_PER_SECOND,
            loop=0,
            **options,
        ),
    )
