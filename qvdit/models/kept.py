"""What quantization leaves as it is: embeddings, norms, modulation, the output head, layers kept at 16 bits.

A bundle holds their weights beside the quantized layers, so that a whole transformer can be built from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic


def save(transformer: torch.nn.Module, quantized: Iterable[str], path: Path) -> None:
    """Write the parameters and persistent buffers of everything but the modules named ``quantized``.

    Each in the smallest of bfloat16, float16 and its own type that holds its values exactly: a pipeline is loaded in
    float32 whatever its files hold.
    """
    prefixes = tuple(f"{name}." for name in quantized)
    state = {name: value for name, value in transformer.state_dict().items() if not name.startswith(prefixes)}
    tensors = {name: _compact(value.detach().cpu()).contiguous() for name, value in state.items()}
    write_atomic(path, lambda temporary: safetensors.torch.save_file(tensors, temporary))


def load(path: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a model, its quantized modules in place, the weights that :func:`save` wrote, as ``dtype``.

    What the model's class keeps in float32 stays in float32, as when diffusers loads it. The model's own tensors may be
    on the meta device. A file that is damaged, or of another model, raises QvditError.
    """
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    fix = "export the model again"
    try:
        held = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise QvditError(f"{path}, which cannot be read ({error})", "weights of what is not quantized", fix) from None
    wanted = model.state_dict()
    others = [name for name, value in held.items() if name not in wanted or wanted[name].shape != value.shape]
    if others:
        raise QvditError(f"{path} with {others[0]}", "the weights of this model", fix)
    for name, value in held.items():
        if value.is_floating_point():
            held[name] = value.to(torch.float32 if in_float32.intersection(name.split(".")) else dtype)
    model.load_state_dict(held, strict=False, assign=True)
    missing = [name for name, parameter in model.named_parameters() if name not in held]
    if missing:
        raise QvditError(f"{path} without {missing[0]}", "the weights of everything that is not quantized", fix)


def _compact(value: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if value.dtype == torch.float32 and torch.equal(value.to(dtype).float(), value):
            return value.to(dtype)
    return value
