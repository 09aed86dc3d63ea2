"""What makes a model's passes fast on a GPU and leaves them as they are on a CPU.

TF32 products, bf16 around the quantized layers (which compute in float32 of their own accord), and compiled blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qvdit.models import ModelAdapter

_RECOMPILATIONS = 64  # recipes differ in what their layers compute, and one process may try them all


@contextmanager
def fast_arithmetic(device: torch.device | str) -> Iterator[None]:
    """On a GPU, TF32 for float32 products and bf16 for what autocast knows; nothing on a CPU."""
    device = torch.device(device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compile_blocks(model: torch.nn.Module, adapter: ModelAdapter) -> None:
    """Compile a model's transformer blocks in place, on a GPU only.

    Block by block, because blocks of one kind share their compiled code, and so do those of the next model of the same
    recipe: a whole model would be compiled anew each time. A batch of another size is compiled for itself: left to it,
    PyTorch would make later sizes one that varies, with slower code that no other process has in its cache.
    """
    if next(model.parameters()).device.type != "cuda":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    for block in adapter.blocks(model):
        block.compile(dynamic=False)
