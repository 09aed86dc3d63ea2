"""Temporal maintenance distillation (TMD): the quantized model keeps its teacher's output and how frames relate.

    L = MSE(student, teacher) + λ · KL( softmax(G_teacher) ‖ softmax(G_student) ),   G = F Fᵀ

F: [B, T, D], one L2-normalised feature a frame; G: [B, T, T]. Source: Q-VDiT (arXiv 2505.22167). Its authors' code
reshapes [B, C, T, H, W] to [B, T, -1] without a permutation, so that a "frame" is half of a channel; here it is one
unless the recipe asks for theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

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
_WEIGHT = "weight"  # how much a record counts


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


def guided(velocity: torch.Tensor, guidance: float) -> torch.Tensor:
    """What the sampler follows: pairs of an unconditional and a conditional velocity [2B, …] → [B, …]."""
    free, told = velocity.unflatten(0, (-1, 2)).unbind(1)
    return free + guidance * (told - free)


def stride_weights(timesteps: torch.Tensor, strength: float) -> torch.Tensor:
    """How much each record counts, float32 [n], 1 on average: (its stride)^``strength``.

    timesteps: [n], those of all records. A step's stride is how far it is to the next recorded one, or to 0: the
    sampler multiplies the velocity by it, and so the velocity's error.
    """
    known, place = timesteps.double().unique(return_inverse=True)  # ascending
    strides = known.diff(prepend=known.new_zeros(1)).clamp(min=1e-6)
    weights = strides[place].pow(strength)
    return (weights / weights.mean()).float()


def _parameter_groups(layers: Iterable[TrainableLinear], block: DistillationBlock) -> list[dict[str, object]]:
    rates = {"log_scale": block.scale_learning_rate, "shift": block.latent_learning_rate}
    by_rate: dict[float, list[torch.nn.Parameter]] = {block.learning_rate: []}
    for layer in layers:
        for name, parameter in layer.named_parameters():
            by_rate.setdefault(rates.get(name, block.learning_rate), []).append(parameter)
    return [{"params": members, "lr": rate, "peak": rate} for rate, members in by_rate.items() if members]


def learning_share(step: int, steps: int, warm_up: float) -> float:
    """The share of its peak that a learning rate has: it rises over ``warm_up`` of the steps, and falls as a cosine."""
    rising = warm_up * steps
    return min(1.0, (step + 1) / (rising + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


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
    guidance: float = 1.0,
) -> float:
    """Train the layers inside the student, in place; returns the last step's loss.

    groups: calibration records on the CPU, equal shapes together; in pairs (:meth:`CalibrationData.pairs`) where guided
    velocities are compared, which wants data sampled with a ``guidance`` above 1. Deterministic under the seed on a
    CPU; on a GPU the gradient of attention is not.
    """
    device = next(student.parameters()).device
    if guidance <= 1:
        block = dataclasses.replace(block, guided=0.0)
    groups = _weighted(groups, block.stepping)
    generator = torch.Generator().manual_seed(seed)
    batches = _draw_batches(groups, block.batch, steps, generator, 2 if block.guided else 1)
    used = [sorted({row for g, rows in batches if g == i for row in rows}) for i in range(len(groups))]
    sets = [_with_targets(teacher, *pair, block.batch, device) for pair in zip(groups, used, strict=True)]
    for layer in layers:
        layer.quantize_activations = block.quantize_activations
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(_parameter_groups(layers, block), weight_decay=0.0, fused=device.type == "cuda")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    compile_blocks(student, adapter)
    loss = torch.tensor(math.nan)
    for step, (i, rows) in enumerate(batches):
        progress(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_share(step, steps, block.warm_up)
        index = torch.tensor(rows, device=sets[i][_TARGET].device)
        batch = {name: tensor[index].to(device) for name, tensor in sets[i].items()}
        with fast_arithmetic(device):
            loss = _loss(student, batch.pop(_TARGET), batch.pop(_WEIGHT), adapter, config, batch, block, guidance)
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


def _draw_batches(
    groups: list[Records], batch: int, steps: int, generator: torch.Generator, together: int = 1
) -> list[tuple[int, list[int]]]:
    """For every step a group, drawn as often as it has records, and the rows of it to take.

    together: 2 draws pairs of neighbours, as many records in all.
    """
    counts = [len(group["hidden_states"]) // together for group in groups]
    sizes = torch.tensor(counts, dtype=torch.float64)
    size = max(1, batch // together)
    drawn = []
    for _ in range(steps):
        i = int(torch.multinomial(sizes, 1, generator=generator))
        places = torch.randint(counts[i], (min(size, counts[i]),), generator=generator).tolist()
        drawn.append((i, [together * place + row for place in places for row in range(together)]))
    return drawn


def _weighted(groups: list[Records], stepping: float) -> list[Records]:
    """The records with how much each counts."""
    weights = stride_weights(torch.cat([group["timestep"] for group in groups]), stepping)
    each = weights.split([len(group["timestep"]) for group in groups])
    return [{**group, _WEIGHT: weight} for group, weight in zip(groups, each, strict=True)]


@torch.no_grad()
def _with_targets(
    teacher: torch.nn.Module, records: Records, used: list[int], batch: int, device: torch.device
) -> Records:
    """The records with the teacher's output for those that are used: it is run once, not in every step."""
    if not used:
        return records
    outputs = []
    for start in range(0, len(used), batch):
        rows = used[start : start + batch]
        inputs = {name: tensor[rows].to(device) for name, tensor in records.items() if name != _WEIGHT}
        outputs.append(teacher(**inputs, return_dict=False)[0].float().cpu())
    seen = torch.cat(outputs)
    target = seen.new_zeros(len(records["hidden_states"]), *seen.shape[1:])
    target[used] = seen
    found = {**records, _TARGET: target}
    return {name: tensor.to(device) for name, tensor in found.items()} if _fits(found, device) else found


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
    weight: torch.Tensor,
    adapter: ModelAdapter,
    config: dict[str, Any],
    batch: Records,
    block: DistillationBlock,
    guidance: float,
) -> torch.Tensor:
    """The loss of one batch, a scalar. target: the teacher's output [B, C, T·p, H, W]. weight: [B].

    TMD's, of the records by themselves and of their guided pairs, each by its share.
    """
    output = student(**batch, return_dict=False)[0].float()
    frames = adapter.frames(config, batch)
    share = block.guided
    loss = torch.zeros((), device=output.device)
    if share < 1:
        loss = loss + (1 - share) * _compared(output, target, weight, adapter, frames, block)
    if share:
        # Errors that have nothing to do with each other are that much larger once guided.
        size = guidance**2 + (guidance - 1) ** 2
        followed, wanted = guided(output, guidance), guided(target, guidance)
        loss = loss + share * _compared(followed, wanted, weight[::2] / size, adapter, frames, block)
    return loss


def _compared(
    output: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    adapter: ModelAdapter,
    frames: int,
    block: DistillationBlock,
) -> torch.Tensor:
    """Weighted mean squared error of two outputs [B, C, T·p, H, W], and how far their frames relate differently."""
    loss = ((output - target).square().flatten(1).mean(1) * weight).mean()
    if not block.relation_weight:
        return loss
    related = [related_features(x, block.relation, adapter, frames) for x in (output, target)]
    return loss + block.relation_weight * relation_loss(*related)
