"""Measurements of a video of the drawn world, read from its pixels alone.

The names of the columns are VBench's; each has an exact counterpart here because the world is known.
Everything is a number in 0 … 1, higher is better, one per video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qvdit.reference import world

METRICS = (
    "scene_consistency",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "imaging_quality",
    "overall_consistency",
)
ATTRIBUTES = ("colour", "background", "shape", "direction")

_CORE_PIXELS = 60  # the pixels furthest from the background: surely inside the shape, whose area is at least 110
_MIN_CONTRAST = 0.20  # RMS over RGB; the closest pair of a colour and a background differs by more than 0.35
_COLOUR_TOLERANCE = 0.20  # RMS over RGB within which a colour counts as the one named
_MIN_IOU = 0.5  # below this a blob is no shape at all


@dataclass(frozen=True)
class Observation:
    """What is seen in a batch of videos, frame by frame."""

    centres: torch.Tensor  # [B, T, 2] float32, pixels (x, y): centroid of what differs from the background
    colours: torch.Tensor  # [B, T, 3] float32 in 0 … 1: mean of the shape's core
    backgrounds: torch.Tensor  # [B, T, 3] float32 in 0 … 1: median of the frame's border
    alpha: torch.Tensor  # [B, T, H, W] float32 in 0 … 1: soft mask of the shape
    present: torch.Tensor  # [B, T] bool: something stands out from the background


def observe(videos: torch.Tensor) -> Observation:
    """Separate shape and background. videos: float [B, 3, T, H, W] in -1 … 1."""
    pixels = (videos.float().permute(0, 2, 3, 4, 1) + 1) / 2  # [B, T, H, W, 3]
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]], dim=2)
    backgrounds = border.median(dim=2).values  # [B, T, 3]
    contrast = (pixels - backgrounds[:, :, None, None]).square().mean(-1).sqrt()  # [B, T, H, W]
    core = contrast.flatten(2).topk(_CORE_PIXELS, dim=-1)
    reference = core.values.median(dim=-1).values  # [B, T]
    alpha = (contrast / reference.clamp(min=1e-6)[..., None, None]).clamp(0, 1)
    alpha = torch.where(alpha < 0.15, 0, alpha)  # noise in the background must not pull the centroid
    flat = pixels.flatten(2, 3)  # [B, T, H*W, 3]
    colours = flat.gather(2, core.indices[..., None].expand(-1, -1, -1, 3)).mean(2)
    axis = torch.arange(world.SIZE, device=videos.device, dtype=torch.float32) + 0.5
    mass = alpha.sum((-1, -2)).clamp(min=1e-6)
    centres = torch.stack([(alpha.sum(-2) * axis).sum(-1) / mass, (alpha.sum(-1) * axis).sum(-1) / mass], dim=-1)
    return Observation(centres, colours, backgrounds, alpha, reference > _MIN_CONTRAST)


def _named(colours: torch.Tensor, table: dict[str, tuple[float, float, float]], index: torch.Tensor) -> torch.Tensor:
    """Where a colour [B, T, 3] is nearest to the table's entry ``index`` [B] and close to it: bool [B, T]."""
    distance = (colours[:, :, None] - world.palette(table, colours.device)).square().mean(-1).sqrt()  # [B, T, n]
    best = distance.min(dim=-1)
    return (best.indices == index[:, None]) & (best.values < _COLOUR_TOLERANCE)


def _shape_fit(seen: Observation) -> torch.Tensor:
    """Soft IoU of the mask with each ideal shape drawn at its centroid: float32 [B, T, 4]."""
    ideal = world.coverage(seen.centres)  # [B, T, 4, H, W]
    alpha = seen.alpha[:, :, None]
    union = torch.maximum(alpha, ideal).sum((-1, -2))
    return torch.minimum(alpha, ideal).sum((-1, -2)) / union.clamp(min=1e-6)


def _direction(seen: Observation) -> torch.Tensor:
    """Index of the direction nearest to the path's first straight steps, int64 [B]."""
    steps = seen.centres[:, world.STRAIGHT_STEPS] - seen.centres[:, 0]  # [B, 2]
    return (steps @ world.velocities(steps.device).T).argmax(-1)


def attributes(seen: Observation, scenes: world.SceneBatch) -> dict[str, torch.Tensor]:
    """Whether each frame shows what the prompt names: bool [B, T] for every name in ATTRIBUTES.

    The direction is judged once a video and holds for all its frames.
    """
    fit = _shape_fit(seen).max(dim=-1)
    moving = (seen.centres[:, world.STRAIGHT_STEPS] - seen.centres[:, 0]).norm(dim=-1) > world.SPEED
    direction = (_direction(seen) == scenes.direction) & moving
    return {
        "colour": _named(seen.colours, world.COLOURS, scenes.colour) & seen.present,
        "background": _named(seen.backgrounds, world.BACKGROUNDS, scenes.background),
        "shape": (fit.indices == scenes.shape[:, None]) & (fit.values > _MIN_IOU) & seen.present,
        "direction": direction[:, None] & seen.present,
    }


def _against_first_and_previous(features: torch.Tensor) -> torch.Tensor:
    """VBench's consistency: mean cosine of a frame's feature with the first and the previous one's, [B, T, D] → [B]."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    first = (unit[:, 1:] * unit[:, :1]).sum(-1)
    previous = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    return ((first + previous) / 2).mean(-1).clamp(0, 1)


def _subject(videos: torch.Tensor, seen: Observation) -> torch.Tensor:
    """Consistency of the shape as seen from its own centre: a crop of mask times colour, [B]."""
    offsets = torch.arange(-8, 9, device=videos.device, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(offsets, offsets, indexing="ij")
    grid = torch.stack([grid_x, grid_y], -1) + seen.centres.flatten(0, 1)[:, None, None]  # [B*T, 17, 17, 2]
    shape = (seen.alpha[:, :, None] * seen.colours[..., None, None]).flatten(0, 1)  # [B*T, 3, H, W]
    crop = torch.nn.functional.grid_sample(shape, grid / world.SIZE * 2 - 1, align_corners=False)
    return _against_first_and_previous(crop.reshape(*seen.present.shape, -1)) * seen.present.float().mean(-1)


def _background(videos: torch.Tensor, seen: Observation) -> torch.Tensor:
    """One minus the mean change of the pixels outside the shape against the first and the previous frame, [B]."""
    pixels = (videos.float().permute(0, 2, 1, 3, 4) + 1) / 2  # [B, T, 3, H, W]
    empty = (seen.alpha < 0.15).float()[:, :, None]

    def change(now: slice, then: slice) -> torch.Tensor:
        both = empty[:, now] * empty[:, then]
        difference = (pixels[:, now] - pixels[:, then]).abs() * both
        return difference.sum((2, 3, 4)) / (3 * both.sum((2, 3, 4))).clamp(min=1)

    later, first, previous = slice(1, None), slice(0, 1), slice(0, -1)
    return 1 - ((change(later, first) + change(later, previous)) / 2).mean(-1).clamp(0, 1)


def _imaging_quality(videos: torch.Tensor, seen: Observation) -> torch.Tensor:
    """Closeness of every frame to its own ideal redrawing: 1 - RMSE / 0.25, [B]."""
    best = _shape_fit(seen).argmax(-1)[..., None, None, None].expand(-1, -1, 1, world.SIZE, world.SIZE)
    alpha = world.coverage(seen.centres).gather(2, best)  # [B, T, 1, H, W]
    ground, colour = seen.backgrounds[..., None, None], seen.colours[..., None, None]
    ideal = ground + (colour - ground) * alpha  # [B, T, 3, H, W]
    pixels = (videos.float().permute(0, 2, 1, 3, 4) + 1) / 2
    rmse = (pixels - ideal).square().mean((2, 3, 4)).sqrt()
    return (1 - rmse / 0.25).clamp(0, 1).mean(-1)


def measure(videos: torch.Tensor, scenes: world.SceneBatch) -> dict[str, torch.Tensor]:
    """All measurements of a batch: float32 [B] for every name in METRICS and ATTRIBUTES.

    videos: float [B, 3, T, H, W] in -1 … 1; a video with NaN or Inf measures 0 throughout.
    """
    finite = videos.isfinite().flatten(1).all(1)
    videos = torch.where(finite[:, None, None, None, None], videos, 0)
    seen = observe(videos)
    named = attributes(seen, scenes)
    velocity = seen.centres.diff(dim=1)  # [B, T-1, 2]
    # The median forgives the bounces, of which a path of 16 frames has few.
    jerk = velocity.diff(dim=1).norm(dim=-1).median(dim=-1).values
    speed = velocity.norm(dim=-1).median(dim=-1).values
    everything = torch.stack(list(named.values()))  # [4, B, T]
    result = {
        "scene_consistency": everything.all(0).float().mean(-1),
        "subject_consistency": _subject(videos, seen),
        "background_consistency": _background(videos, seen),
        "motion_smoothness": (1 - jerk / world.SPEED).clamp(0, 1),
        "dynamic_degree": (speed > world.SPEED / 2).float() * seen.present.float().mean(-1),
        "imaging_quality": _imaging_quality(videos, seen),
        "overall_consistency": everything.float().mean((0, 2)),
        **{name: value.float().mean(-1) for name, value in named.items()},
    }
    return {name: value * finite for name, value in result.items()}


def psnr(videos: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each video [B, 3, T, H, W] against its reference, clipped to -1 … 1: [B]."""
    error = (videos.float().clamp(-1, 1) - reference.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
