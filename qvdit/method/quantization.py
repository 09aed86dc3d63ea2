"""From a trained model, its statistics and a recipe to frozen layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from qvdit.contract import Bits, FrameRows, QvditError
from qvdit.contract.layer import Layer
from qvdit.method import tqe, weights
from qvdit.method.calibration import CalibrationData, Progress, no_progress
from qvdit.method.distillation import distil
from qvdit.method.lowbit import replace_linears
from qvdit.method.recipe import Recipe
from qvdit.method.smoothing import smoothing_scale
from qvdit.method.statistics import Statistics
from qvdit.method.training import TrainableLinear
from qvdit.models import TEMPORAL_ROLES, ModelAdapter, Site

_GAIN_BATCHES = 8  # recorded steps that the frame gains are fitted on, spread over the calibration data


@dataclass(frozen=True)
class QuantizationJob:
    """What to do to which model."""

    recipe: Recipe
    bits: Bits
    distillation_steps: int
    seed: int = 0


def quantize(
    transformer: Any,
    adapter: ModelAdapter,
    statistics: Statistics,
    data: CalibrationData,
    job: QuantizationJob,
    progress: Progress = no_progress,
) -> tuple[Layer, ...]:
    """Quantize a transformer's linears; the transformer itself is left as it is.

    ``progress`` counts layers first and then the steps of distillation.
    """
    if job.recipe.kind == "static":
        from qvdit.method.static import quantize_static

        check_bits(job.recipe, job.bits)
        return quantize_static(transformer, adapter, data, progress)
    sites = [s for s in adapter.sites(transformer) if job.recipe.weight_bits(s.name, job.bits.weight) != 16]
    if not sites:
        raise QvditError(
            "layer bits that keep every layer in full precision", "at least one quantized layer", "relax them"
        )
    total = len(sites) + job.distillation_steps
    frames = adapter.frames(dict(transformer.config), next(data.batches()))
    scales = _smoothing(transformer, sites, statistics, job)
    generator = torch.Generator().manual_seed(job.seed)
    layers = []
    for index, site in enumerate(sites):
        progress(index, total)
        layers.append(_start(transformer, site, statistics, scales.get(site.name), job, frames, generator))
    modules = {layer.name: layer for layer in layers}
    gained = [layer for layer in layers if layer.gain is not None]
    if gained and job.recipe.tqe.start == "closed_form":
        _fit_gains(transformer, gained, data, frames)
    if job.distillation_steps:
        _distil(transformer, adapter, layers, data, job, lambda done, _: progress(len(sites) + done, total))
    progress(total, total)
    return tuple(modules[site.name].fold() for site in sites)


def check_bits(recipe: Recipe, bits: Bits) -> None:
    """Refuse bits that a recipe's kind cannot have."""
    if recipe.kind == "static" and bits != Bits(8, 8):
        raise QvditError(f"--bits {bits} with recipe {recipe.name}", "w8a8", "the static recipe is INT8 only")


def _smoothing(
    transformer: Any, sites: list[Site], statistics: Statistics, job: QuantizationJob
) -> dict[str, torch.Tensor]:
    """The smoothing scale s [K] of every site, by name; empty where smoothing is off."""
    strength = job.recipe.smoothing_strength(job.bits)
    if strength == 0:
        return {}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.shared_input if job.recipe.smoothing.shared else site.name, []).append(site)
    scales = {}
    for members in groups.values():
        matrices = [transformer.get_submodule(site.name).weight.detach().float() for site in members]
        abs_max = statistics.of(members[0]).abs_max.to(matrices[0].device)
        scale = smoothing_scale(abs_max, matrices, strength)
        scales.update({site.name: scale for site in members})
    return scales


def _start(
    transformer: Any,
    site: Site,
    statistics: Statistics,
    smooth: torch.Tensor | None,
    job: QuantizationJob,
    frames: int,
    generator: torch.Generator,
) -> TrainableLinear:
    """Round one linear and give it its closed-form correction."""
    recipe = job.recipe
    linear = transformer.get_submodule(site.name)
    weight = linear.weight.detach().float()
    bias = None if linear.bias is None else linear.bias.detach().float()
    stats = statistics.of(site)
    mean, moment = stats.mean.to(weight.device), stats.second_moment.to(weight.device)
    if smooth is not None:
        weight, mean, moment = weight * smooth, mean / smooth, moment / smooth[:, None] / smooth
    bits = recipe.weight_bits(site.name, job.bits.weight)
    importance = moment.diagonal() if recipe.weights.clip_by == "output" else None
    grid = weights.search_grid(weight, bits, bits >= recipe.weights.symmetric_from, importance)
    latent = weight
    if recipe.weights.rounding == "second_order":
        latent = near_integers(weight, weights.round_second_order(weight, grid, moment), grid)
    error = weight - grid.dequantize(grid.quantize(latent))
    alpha, beta = _rank_term(error, mean, moment, recipe, generator)
    if recipe.weights.bias_correction:
        # What the rank term leaves of the mean error; it is constant, so the bias can carry it.
        left = error if alpha is None or beta is None or recipe.tqe.start == "zeros" else error - (alpha @ beta).T
        bias = left @ mean if bias is None else bias + left @ mean
    gain = torch.ones(frames, device=weight.device) if alpha is not None and _has_gain(site, recipe) else None
    return TrainableLinear(
        site.name,
        latent,
        bias,
        grid,
        job.bits.act,
        recipe.activations.symmetric,
        site.rows,
        None if smooth is None else 1 / smooth,
        alpha,
        beta,
        gain,
    )


def near_integers(weight: torch.Tensor, weight_q: torch.Tensor, grid: weights.WeightGrid) -> torch.Tensor:
    """The weight nearest to W whose nearest rounding gives ``weight_q``: training starts at those integers, [N, K]."""
    centre = grid.dequantize(weight_q)
    reach = 0.4 * grid.scale[:, None]
    return centre + (weight - centre).clamp(-reach, reach)


def _rank_term(
    error: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rank = min(recipe.tqe.rank, *error.shape)
    if rank == 0:
        return None, None
    if recipe.tqe.start == "zeros":
        bound = error.shape[1] ** -0.5
        alpha = (torch.rand(error.shape[1], rank, generator=generator) * 2 - 1) * bound
        return alpha.to(error.device), torch.zeros(rank, error.shape[0], device=error.device)
    if recipe.weights.bias_correction:  # the mean is the bias' business, only the spread is left to correct
        moment = moment - torch.outer(mean, mean)
    return tqe.best_correction(error, moment, rank)


def _has_gain(site: Site, recipe: Recipe) -> bool:
    if site.rows is FrameRows.NONE or recipe.tqe.frame_gain == "none":
        return False
    return recipe.tqe.frame_gain == "video" or site.role in TEMPORAL_ROLES


@torch.no_grad()
def _fit_gains(transformer: Any, layers: list[TrainableLinear], data: CalibrationData, frames: int) -> None:
    """Least-squares frame gains, from the full-precision model's activations on a few recorded steps."""
    fits = {layer.name: tqe.GainFit(frames, layer.rows) for layer in layers}

    def gather(layer: TrainableLinear, x: torch.Tensor) -> None:
        assert layer.alpha is not None
        assert layer.beta is not None
        scaled = x.float() if layer.inv_smooth is None else x.float() * layer.inv_smooth
        linear = transformer.get_submodule(layer.name)
        exact = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias)
        rounded = torch.nn.functional.linear(scaled, layer.quantized_weight(), layer.bias)
        fits[layer.name].add(exact - rounded, scaled @ layer.alpha @ layer.beta)

    handles = [
        transformer.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, layer=layer: gather(layer, args[0])
        )
        for layer in layers
    ]
    batches = list(data.batches())
    device = next(transformer.parameters()).device
    try:
        for batch in batches[:: max(1, len(batches) // _GAIN_BATCHES)][:_GAIN_BATCHES]:
            transformer(**{name: tensor.to(device) for name, tensor in batch.items()}, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        layer.gain.data.copy_(fits[layer.name].gain())  # type: ignore[union-attr]


def _distil(
    transformer: Any,
    adapter: ModelAdapter,
    layers: list[TrainableLinear],
    data: CalibrationData,
    job: QuantizationJob,
    progress: Progress,
) -> None:
    """Refine the layers against the full-precision model."""
    device = next(transformer.parameters()).device
    student: Any = copy.deepcopy(transformer)
    generator = torch.Generator().manual_seed(job.seed)
    for layer in layers:
        layer.add_inner_term(min(job.recipe.tqe.inner_rank, layer.in_features, layer.out_features), generator)
    replace_linears(student, {layer.name: layer.to(device) for layer in layers})
    student.requires_grad_(False)
    distil(
        student,
        transformer,
        layers,
        adapter,
        dict(transformer.config),
        data.groups(),
        job.recipe.distillation,
        job.distillation_steps,
        job.seed,
        progress,
    )
