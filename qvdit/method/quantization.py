"""From a trained model, its statistics and a recipe to frozen layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qvdit.contract import Bits, FrameRows, QvditError
from qvdit.contract.layer import Layer, rotation_block
from qvdit.method import operator, tqe, weights
from qvdit.method.calibration import CalibrationData, Progress, no_progress
from qvdit.method.distillation import distil
from qvdit.method.recipe import GainStart, Recipe
from qvdit.method.smoothing import salience, smoothing_scale, weight_salience
from qvdit.method.started import StartedLayer, StartedLayers
from qvdit.method.statistics import InputStatistics, Statistics
from qvdit.method.training import TrainableLinear
from qvdit.models import TEMPORAL_ROLES, ModelAdapter, Site
from qvdit.models.copies import copy_with

_GAIN_STARTS: dict[GainStart, float] = {"one": 1.0, "authors": 2.0}
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
    started: StartedLayers | None = None,
) -> tuple[Layer, ...]:
    """Quantize a transformer's linears; the transformer itself is left as it is.

    ``progress`` counts layers first and then the steps of distillation. ``started``: where each layer is kept once it
    is rounded, and taken from if it is there already.
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
    smoothing = _smoothing(transformer, sites, statistics, job)
    generator = torch.Generator().manual_seed(job.seed)
    layers = []
    for index, site in enumerate(sites):
        progress(index, total)
        device = transformer.get_submodule(site.name).weight.device
        start = started.load(site.name, generator, device) if started else None
        if start is None:
            start = _start(transformer, site, statistics, smoothing.get(site.name), job, generator)
            if started:
                started.keep(site.name, start, generator)
        layers.append(_trainable(site, start, smoothing.get(site.name), job, frames))
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
    """What every site's input is divided by, [K], by name: the smoothing scale, with a rotation's random signs.

    Empty where the recipe neither smooths nor rotates.
    """
    scales = _smoothing_scales(transformer, sites, statistics, job)
    if not job.recipe.rotates(job.bits):
        return scales
    generator = torch.Generator().manual_seed(job.seed)
    signs: dict[str, torch.Tensor] = {}  # by input: one rotated x serves all the linears that read it
    signed = {}
    for site in sites:
        weight = transformer.get_submodule(site.name).weight
        if site.shared_input not in signs:
            drawn = torch.randint(2, (weight.shape[1],), generator=generator) * 2.0 - 1
            signs[site.shared_input] = drawn.to(weight.device)
        signed[site.name] = signs[site.shared_input] * scales.get(site.name, 1.0)
    return signed


def _smoothing_scales(
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
        peak = weight_salience([transformer.get_submodule(site.name).weight.detach().float() for site in members])
        by_step = statistics.of(members[0]).abs_max_by_step.to(peak.device)
        scale = smoothing_scale(salience(job.recipe.smoothing.statistic, by_step, peak), peak, strength)
        scales.update({site.name: scale for site in members})
    return scales


@dataclass(frozen=True)
class Prepared:
    """A linear and its input's statistics after smoothing and rotation, before rounding."""

    weight: torch.Tensor  # float32 [N, K]
    mean: torch.Tensor  # float32 [K]: E[x̃]
    second_moment: torch.Tensor  # float32 [K, K]: E[x̃ x̃ᵀ]

    @staticmethod
    def of(weight: torch.Tensor, statistics: InputStatistics, smooth: torch.Tensor | None, rotation: int) -> Prepared:
        """W (x) = W' x̃ with x̃ = H (x / s) and W' = (W s) H / B, H H being B · I."""
        mean, moment = statistics.mean.to(weight.device), statistics.second_moment.to(weight.device)
        if smooth is not None:
            weight, mean, moment = weight * smooth, mean / smooth, moment / smooth[:, None] / smooth
        if rotation:
            weight = operator.walsh_hadamard(weight, rotation) / rotation
            mean = operator.walsh_hadamard(mean, rotation)
            moment = operator.walsh_hadamard(operator.walsh_hadamard(moment, rotation).T, rotation)
        return Prepared(weight, mean, moment)

    def covariance(self) -> torch.Tensor:
        """E[x̃ x̃ᵀ] - E[x̃] E[x̃]ᵀ, [K, K]: what is left to correct where the bias carries the mean."""
        return self.second_moment - torch.outer(self.mean, self.mean)


def _start(
    transformer: Any,
    site: Site,
    statistics: Statistics,
    smooth: torch.Tensor | None,
    job: QuantizationJob,
    generator: torch.Generator,
) -> StartedLayer:
    """Round one linear, with its rank-R term, and let its bias carry what the recipe wants it to."""
    recipe = job.recipe
    linear = transformer.get_submodule(site.name)
    rotation = _rotation(linear.weight.shape[1], job)
    prepared = Prepared.of(linear.weight.detach().float(), statistics.of(site), smooth, rotation)
    rounded = _round(prepared, recipe.weight_bits(site.name, job.bits.weight), recipe, generator)
    bias = None if linear.bias is None else linear.bias.detach().float()
    if recipe.weights.bias_correction:  # the mean error is constant, so the bias can carry it
        bias = rounded.error @ prepared.mean if bias is None else bias + rounded.error @ prepared.mean
    grid = rounded.grid
    return StartedLayer(rounded.latent, grid.scale, grid.zero, bias, rounded.alpha, rounded.beta)


def _rotation(in_features: int, job: QuantizationJob) -> int:
    """Features a block of the rotation of a layer's input; 0: none."""
    return rotation_block(in_features) if job.recipe.rotates(job.bits) else 0


def _trainable(
    site: Site, start: StartedLayer, smooth: torch.Tensor | None, job: QuantizationJob, frames: int
) -> TrainableLinear:
    """A started layer with what the recipe alone decides."""
    recipe, device = job.recipe, start.latent.device
    gain = None
    if start.alpha is not None and _has_gain(site, recipe):
        gain = torch.full((frames,), _GAIN_STARTS[recipe.tqe.gain_start], device=device)
    return TrainableLinear(
        site.name,
        start.latent,
        start.bias,
        weights.WeightGrid(recipe.weight_bits(site.name, job.bits.weight), start.scale, start.zero),
        job.bits.act,
        job.bits.act >= recipe.activations.symmetric_from,
        site.rows,
        None if smooth is None else 1 / smooth,
        start.alpha,
        start.beta,
        gain,
        _rotation(start.latent.shape[1], job),
    )


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid, with its rank-R term."""

    grid: weights.WeightGrid
    latent: torch.Tensor  # float32 [N, K]: nearest rounding of it gives the integers to start from
    alpha: torch.Tensor | None  # float32 [K, R]
    beta: torch.Tensor | None  # float32 [R, N]
    error: torch.Tensor  # float32 [N, K]: what neither the integers nor the term give back of W


def _round(prepared: Prepared, bits: int, recipe: Recipe, generator: torch.Generator) -> Rounded:
    """Round a prepared weight; its term comes before (svd) or after the rounding."""
    weight, alpha, beta = prepared.weight, None, None
    rank = min(recipe.tqe.rank, *weight.shape)
    start = recipe.tqe.start if rank else None
    if start == "svd":
        alpha, beta = tqe.best_approximation(weight, rank)
        weight = weight - (alpha @ beta).T
    # Not the covariance, though the bias may carry the mean: every time step has a mean of its own, the bias carries
    # their mean alone. On wan-shapes the centred moment made the model's error 0.3 % (w3a6) and 3.6 % (w4a8) larger.
    grid, latent = _on_grid(weight, bits, prepared.second_moment, recipe)
    error = weight - grid.dequantize(grid.quantize(latent))
    if start == "zeros":
        alpha, beta = _zero_term(rank, error, generator)
    elif start == "closed_form":
        # The mean is the bias' business where the recipe corrects it: only the spread is left to the term.
        moment = prepared.covariance() if recipe.weights.bias_correction else prepared.second_moment
        alpha, beta = tqe.best_correction(error, moment, rank)
        error = error - (alpha @ beta).T
    return Rounded(grid, latent, alpha, beta, error)


def _on_grid(
    weight: torch.Tensor, bits: int, moment: torch.Tensor, recipe: Recipe
) -> tuple[weights.WeightGrid, torch.Tensor]:
    """The grid of a weight [N, K], and its latent weight."""
    block = recipe.weights
    importance = moment.diagonal() if block.clip_by != "weight" else None
    grid = weights.search_grid(weight, bits, bits >= block.symmetric_from, importance, block.group, block.clip_grid)
    if block.rounding == "nearest":
        return grid, weight
    if block.clip_by == "rounded_output":
        grid, weight_q = weights.search_second_order(weight, grid, moment)
    else:
        weight_q = weights.round_second_order(weight, grid, moment)
    return grid, near_integers(weight, weight_q, grid)


def near_integers(weight: torch.Tensor, weight_q: torch.Tensor, grid: weights.WeightGrid) -> torch.Tensor:
    """The weight nearest to W whose nearest rounding gives ``weight_q``: training starts at those integers, [N, K]."""
    centre = grid.dequantize(weight_q)
    reach = 0.4 * weights.per_feature(grid.scale, weight.shape[1])
    return centre + (weight - centre).clamp(-reach, reach)


def _zero_term(rank: int, error: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha [K, R] by kaiming_uniform with a = √5 and beta [R, N] zero, as Q-VDiT's code starts its term."""
    n, k = error.shape
    alpha = (torch.rand(k, rank, generator=generator) * 2 - 1) * k**-0.5
    return alpha.to(error.device), torch.zeros(rank, n, device=error.device)


def _has_gain(site: Site, recipe: Recipe) -> bool:
    if site.rows is FrameRows.NONE or recipe.tqe.frame_gain == "none":
        return False
    return recipe.tqe.frame_gain == "video" or site.role in TEMPORAL_ROLES


@torch.no_grad()
def _fit_gains(transformer: Any, layers: list[TrainableLinear], data: CalibrationData, frames: int) -> None:
    """Least-squares frame gains, from the full-precision model's activations on a few recorded steps."""
    fits = {layer.name: tqe.GainFit(frames, layer.rows) for layer in layers}

    def gather(layer: TrainableLinear, x: torch.Tensor) -> None:
        assert layer.beta is not None
        transformed = layer.transformed_input(x)
        linear = transformer.get_submodule(layer.name)
        exact = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias)
        rounded = torch.nn.functional.linear(transformed, layer.quantized_weight(), layer.bias)
        fits[layer.name].add(exact - rounded, transformed @ layer.operator_alpha @ layer.beta)

    handles = [
        transformer.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, layer=layer: gather(layer, args[0])
        )
        for layer in layers
    ]
    device = next(transformer.parameters()).device
    try:
        for batch in data.some(_GAIN_BATCHES):
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
    generator = torch.Generator().manual_seed(job.seed)
    for layer in layers:
        layer.add_inner_term(min(job.recipe.tqe.inner_rank, layer.in_features, layer.out_features), generator)
    student = copy_with(transformer, {layer.name: layer.to(device) for layer in layers})
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
