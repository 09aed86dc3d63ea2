"""Sampling: the quantized transformer that a cell's videos come from, and the precision of what is around it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from qvdit.contract import QvditError
from qvdit.contract.kernels import unserved
from qvdit.contract.layer import Layer
from qvdit.method import reference
from qvdit.method.acceleration import compile_blocks, fast_arithmetic
from qvdit.method.calibration import Progress
from qvdit.method.lowbit import FrozenLinear, replace_linears
from qvdit.models import ModelAdapter
from qvdit.models.copies import copy_with
from qvdit.quality import Trial, sample_trial

SIMULATION, KERNELS = "simulation", "kernels"
"""What computes quantized layers: PyTorch by the operator's definition, or the CUDA kernels; the integers are equal."""


def computed_by(layers: tuple[Layer, ...], device: str) -> str:
    """What computes a model's layers on a device: the kernels where they are built and serve them all."""
    served = device == "cuda" and all(unserved(layer) is None for layer in layers) and kernels_missing() is None
    return KERNELS if served else SIMULATION


@functools.cache
def kernels_missing() -> str | None:
    """Why the kernels cannot be used on this process's GPU, or None."""
    from qvdit.runtimes import cuda

    try:
        cuda.library().check_device()
    except QvditError as error:
        return str(error)
    return None


def quantized_transformer(
    full: torch.nn.Module,
    layers: tuple[Layer, ...],
    adapter: ModelAdapter,
    computed: str = SIMULATION,
    compiled: bool = True,
) -> Any:
    """A transformer with frozen layers to sample with; the full-precision one is left as it is.

    Every quantized transformer of a comparison comes from here. Under :func:`arithmetic` it yields the reference's
    integers, whatever computes them: they are exact in TF32, whose products have more bits than any two of them. The
    simulation is compiled, unless there are but a few passes; what is left to PyTorch between kernels is not worth it.
    """
    if computed == KERNELS:
        return _on_kernels(full, layers, adapter)
    model = reference.quantized_transformer(full, layers)
    frozen = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    replace_linears(model, {name: _WithoutAutocast(module) for name, module in frozen.items()})
    if compiled:
        compile_blocks(model, adapter)
    return model


def _on_kernels(full: torch.nn.Module, layers: tuple[Layer, ...], adapter: ModelAdapter) -> Any:
    from qvdit.runtimes import torch_transformer

    # Nothing of the linears is read: whatever is installed takes their places, or they are removed.
    model = copy_with(full, {layer.name: torch.nn.Identity() for layer in layers})
    torch_transformer.install(model, layers, adapter, next(full.parameters()).device, fuse=True)
    return model.eval()


class _WithoutAutocast(torch.nn.Module):
    """Runs a layer in its own precision: autocast would round the operands of its exact float32 products to bf16."""

    def __init__(self, layer: FrozenLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x)


def precision(device: str) -> str:
    """In which precision a device samples whatever is not quantized."""
    return "bf16" if device == "cuda" else "fp32"


def arithmetic(device: str) -> AbstractContextManager[Any]:
    """The context of every forward pass whose output is compared, full precision's too."""
    return fast_arithmetic(device)


def sample(pipeline: Any, trial: Trial, batch: int, device: str, progress: Progress) -> torch.Tensor:
    """Videos of a trial, float32 on the CPU; ``progress`` counts the forward passes, one for each batch and step."""
    passes = -(-len(trial.prompts) // batch) * trial.steps
    with arithmetic(device), _counted(pipeline.transformer, passes, progress):
        return sample_trial(pipeline, trial, batch)


@contextmanager
def _counted(transformer: torch.nn.Module, total: int, progress: Progress) -> Iterator[None]:
    """Report every forward pass as it begins, and all of them at the end."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        progress(min(done, total), total)
        done += 1

    handle = transformer.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
    progress(total, total)
