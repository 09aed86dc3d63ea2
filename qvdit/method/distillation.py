"""Temporal maintenance distillation (TMD): the quantized model keeps its teacher's output and how frames relate.

    L = MSE(student, teacher) + λ · KL( softmax(G_teacher) ‖ softmax(G_student) ),   G = F Fᵀ

F: [B, T, D], one L2-normalised feature a frame; G: [B, T, T]. Source: Q-VDiT (arXiv 2505.22167). Its authors' code
reshapes [B, C, T, H, W] to [B, T, -1] without a permutation, so that a "frame" is half of a channel; here it is one
unless the recipe asks for theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qvdit.contract import QvditError
from qvdit.method.calibration import Progress, no_progress
from qvdit.method.recipe import DistillationBlock, Relation
from qvdit.method.training import TrainableLinear
from qvdit.models import ModelAdapter


def frame_relations(features: torch.Tensor) -> torch.Tensor:
    """Log-softmax over frames of the Gram matrix of L2-normalised features: [B, T, D] → [B, T, T]."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return torch.log_softmax(unit @ unit.transpose(1, 2), dim=-1)


def relation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) of the frame relations, mean over batch and frames. Both [B, T, D]."""
    target = frame_relations(teacher)
    return (target.exp() * (target - frame_relations(student))).sum(-1).mean()


def related_features(output: torch.Tensor, relation: Relation, adapter: ModelAdapter, frames: int) -> torch.Tensor:
    """What is related of a model's output [B, C, T·p, H, W]: [B, T, D], by the adapter or as the authors reshape it."""
    if relation == "authors":
        return output.reshape(len(output), frames, -1)
    return adapter.output_frames(output, frames)


def _parameter_groups(layers: Iterable[TrainableLinear], block: DistillationBlock) -> list[dict[str, object]]:
    scales: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for layer in layers:
        for name, parameter in layer.named_parameters():
            (scales if name == "log_scale" else others).append(parameter)
    return [
        {"params": others, "lr": block.learning_rate, "peak": block.learning_rate},
        {"params": scales, "lr": block.scale_learning_rate, "peak": block.scale_learning_rate},
    ]


def distil(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    layers: list[TrainableLinear],
    adapter: ModelAdapter,
    config: dict[str, Any],
    groups: list[dict[str, torch.Tensor]],  # calibration records on the CPU, equal shapes together
    block: DistillationBlock,
    steps: int,
    seed: int,
    progress: Progress = no_progress,
) -> float:
    """Train the layers inside the student, in place; returns the last step's loss.

    Deterministic under the seed on a CPU; on a GPU the gradient of attention is not.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.quantize_activations = block.quantize_activations
        layer.requires_grad_(True)
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(_parameter_groups(layers, block), weight_decay=0.0)
    sizes = torch.tensor([len(group["hidden_states"]) for group in groups], dtype=torch.float64)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = torch.tensor(math.nan)
    with _tensor_float():
        for step in range(steps):
            progress(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            records = groups[int(torch.multinomial(sizes, 1, generator=generator))]
            count = len(records["hidden_states"])
            chosen = torch.randint(count, (min(block.batch, count),), generator=generator)
            batch = {name: tensor[chosen].to(device) for name, tensor in records.items()}
            loss = _loss(student, teacher, adapter, config, batch, block)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    progress(steps, steps)
    for layer in layers:
        layer.quantize_activations = True
        layer.requires_grad_(False)
    _check_finite(layers)
    return float(loss.detach())


def _check_finite(layers: list[TrainableLinear]) -> None:
    for layer in layers:
        if not all(parameter.isfinite().all() for parameter in layer.parameters()):
            raise QvditError(
                f"NaN or Inf in {layer.name} after distillation",
                "training that converges",
                "lower the recipe's learning_rate, or use --distill-steps 0",
            )


def _loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    adapter: ModelAdapter,
    config: dict[str, Any],
    batch: dict[str, torch.Tensor],
    block: DistillationBlock,
) -> torch.Tensor:
    """TMD's loss of one batch, a scalar."""
    with torch.no_grad():
        target = teacher(**batch, return_dict=False)[0]
    output = student(**batch, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(output, target)
    if not block.relation_weight:
        return loss
    frames = adapter.frames(config, batch)
    related = [related_features(x, block.relation, adapter, frames) for x in (output, target)]
    return loss + block.relation_weight * relation_loss(*related)


@contextmanager
def _tensor_float() -> Iterator[None]:
    """TF32 matrix products while training: three times as fast on a GPU; the folded result is exact all the same."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
