"""Temporal maintenance distillation (TMD): the quantized model keeps its teacher's output and how frames relate.

    L = MSE(student, teacher) + λ · KL( softmax(G_teacher) ‖ softmax(G_student) ),   G = F Fᵀ

F: [B, T, D], one L2-normalised feature a frame; G: [B, T, T]. Source: Q-VDiT (arXiv 2505.22167). Its authors' code
reshapes [B, C, T, H, W] to [B, T, -1] without a permutation, so that a "frame" is half of a channel; here it is one
unless the recipe asks for theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from qvdit.contract import QvditError
from qvdit.method.acceleration import compile_blocks, fast_arithmetic
from qvdit.method.calibration import Progress, no_progress
from qvdit.method.recipe import DistillationBlock, Relation
from qvdit.method.training import TrainableLinear
from qvdit.models import ModelAdapter

Records = dict[str, torch.Tensor]
"""Recorded inputs by name, the records first."""

_TARGET = "target"  # the teacher's output, beside the inputs

Result = TypeVar("Result")


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
    groups: list[Records],
    block: DistillationBlock,
    steps: int,
    seed: int,
    progress: Progress = no_progress,
) -> float:
    """Train the layers inside the student, in place; returns the last step's loss.

    groups: calibration records on the CPU, equal shapes together. A batch that a GPU does not hold is computed in
    pieces, at last with the blocks' inputs alone kept for the gradient; one record that does not fit raises QvditError.
    Deterministic under the seed on a CPU; on a GPU the gradient of attention is not.
    """
    device = next(student.parameters()).device
    batches = _draw_batches(groups, block.batch, steps, torch.Generator().manual_seed(seed))
    used = [sorted({row for g, rows in batches if g == i for row in rows}) for i in range(len(groups))]
    sets = [_with_targets(teacher, *pair, block.batch, device) for pair in zip(groups, used, strict=True)]
    for layer in layers:
        layer.quantize_activations = block.quantize_activations
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(_parameter_groups(layers, block), weight_decay=0.0, fused=device.type == "cuda")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    compile_blocks(student, adapter)
    loss, pieces, relieve = torch.tensor(math.nan), 1, _Checkpointing(student)
    for step, (i, rows) in enumerate(batches):
        progress(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.tensor(rows, device=sets[i][_TARGET].device)

        def gradients(pieces: int, records: Records = sets[i], index: torch.Tensor = index) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for part in index.chunk(pieces):
                batch = {name: tensor[part].to(device) for name, tensor in records.items()}
                with fast_arithmetic(device):
                    loss = _loss(student, batch.pop(_TARGET), adapter, config, batch, block)
                    loss = loss if len(part) == len(index) else loss * (len(part) / len(index))
                    loss.backward()
                total = total + loss.detach()
            return total

        loss, pieces = in_pieces(gradients, pieces, len(rows), relieve)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress(steps, steps)
    for layer in layers:
        layer.quantize_activations = True
        layer.requires_grad_(False)
    _check_finite(layers)
    return float(loss.detach())


def _draw_batches(
    groups: list[Records], batch: int, steps: int, generator: torch.Generator
) -> list[tuple[int, list[int]]]:
    """For every step a group, drawn as often as it has records, and the rows of it to take."""
    counts = [len(group["hidden_states"]) for group in groups]
    sizes = torch.tensor(counts, dtype=torch.float64)
    drawn = []
    for _ in range(steps):
        i = int(torch.multinomial(sizes, 1, generator=generator))
        drawn.append((i, torch.randint(counts[i], (min(batch, counts[i]),), generator=generator).tolist()))
    return drawn


@torch.no_grad()
def _with_targets(
    teacher: torch.nn.Module, records: Records, used: list[int], batch: int, device: torch.device
) -> Records:
    """The records with the teacher's output for those that are used: it is run once, not in every step."""
    if not used:
        return records

    def outputs(pieces: int) -> torch.Tensor:
        made, together = [], -(-batch // pieces)
        for start in range(0, len(used), together):
            inputs = {name: tensor[used[start : start + together]].to(device) for name, tensor in records.items()}
            made.append(teacher(**inputs, return_dict=False)[0].float().cpu())
        return torch.cat(made)

    seen, _ = in_pieces(outputs, 1, batch)
    target = seen.new_zeros(len(records["hidden_states"]), *seen.shape[1:])
    target[used] = seen
    found = {**records, _TARGET: target}
    return {name: tensor.to(device) for name, tensor in found.items()} if _fits(found, device) else found


def in_pieces(
    work: Callable[[int], Result], pieces: int, most: int, relieve: Callable[[], bool] = lambda: False
) -> tuple[Result, int]:
    """Do ``work(pieces)`` in twice as many pieces, ``most`` at last, while a GPU has no room; with the pieces it took.

    relieve: asked where there are no more pieces; whether it has made room, so that it is worth another try.
    """
    while True:
        try:
            return work(pieces), pieces
        except torch.OutOfMemoryError as error:
            if pieces >= most and not relieve():
                raise QvditError(
                    f"a GPU that cannot hold one record of the training ({str(error).splitlines()[0]})",
                    "room for a forward pass and its gradient",
                    "use a GPU with more memory, shorter or smaller calibration videos, or --distill-steps 0",
                ) from None
        torch.cuda.empty_cache()  # now that the error, which held what did not fit, is gone
        pieces = min(2 * pieces, most)


class _Checkpointing:
    """Lets a model's blocks keep their inputs alone for the gradient and compute the rest again, once."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __call__(self) -> bool:
        model: Any = self.model
        if not getattr(model, "_supports_gradient_checkpointing", False) or model.is_gradient_checkpointing:
            return False
        model.enable_gradient_checkpointing()
        return True


def _fits(records: Records, device: torch.device) -> bool:
    """Whether the records may stay on a GPU: in an eighth of what is free there."""
    if device.type != "cuda":
        return False
    size = sum(tensor.numel() * tensor.element_size() for tensor in records.values())
    return size < torch.cuda.mem_get_info(device)[0] // 8


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
    target: torch.Tensor,
    adapter: ModelAdapter,
    config: dict[str, Any],
    batch: Records,
    block: DistillationBlock,
) -> torch.Tensor:
    """TMD's loss of one batch, a scalar. target: the teacher's output [B, C, T·p, H, W]."""
    output = student(**batch, return_dict=False)[0].float()
    loss = torch.nn.functional.mse_loss(output, target)
    if not block.relation_weight:
        return loss
    frames = adapter.frames(config, batch)
    related = [related_features(x, block.relation, adapter, frames) for x in (output, target)]
    return loss + block.relation_weight * relation_loss(*related)
