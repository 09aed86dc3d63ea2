"""Measurements of a video of the drawn world, read from its pixels alone.

Every pixel is taken apart into the background and the two colours that the prompt names; each thing's part is then
matched with the four ideal shapes at every place. The names of the columns are VBench's; each has an exact counterpart
here because the world is known. Everything is a number in 0 … 1, higher is better, one per video.
A thing's tensors come in the order (front, back).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d

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

_FAINT = 0.15  # of a colour's part of a pixel: noise in the background must not pull a centroid
_SOLID = 0.7  # part of a pixel from which its colour can be read
_MIN_AREA = 20  # pixels, of the visible part of a thing: a third of the smallest shape
_COLOUR_TOLERANCE = 0.20  # RMS over RGB within which a colour counts as the one named
_MIN_IOU = 0.5  # below this a blob is no shape at all
_MAX_MISFIT = 1.0  # pixels, RMS, of a path that circles
_REACH = 7  # pixels from a shape's centre to its furthest corner, rounded down: half the window that is matched
_CHUNK = 512  # frames matched at once, to bound memory


@dataclass(frozen=True)
class Observation:
    """What is seen in a batch of videos, frame by frame."""

    backgrounds: torch.Tensor  # [B, T, 3] float32 in 0 … 1: median of the frame's border
    alpha: torch.Tensor  # [B, 2, T, H, W] float32 in 0 … 1: each thing's part of every pixel
    visible: torch.Tensor  # [B, 2, T, H, W] float32 in 0 … 1: what the thing in front leaves of every pixel
    colours: torch.Tensor  # [B, 2, T, 3] float32 in 0 … 1: mean of the pixels that are all the thing's
    shapes: torch.Tensor  # [B, 2, T] int64: index of the ideal shape that fits best
    fit: torch.Tensor  # [B, 2, T] float32 in 0 … 1: soft IoU of that shape with what is visible
    centres: torch.Tensor  # [B, 2, T, 2] float32, pixels (x, y)
    present: torch.Tensor  # [B, 2, T] bool: enough of the thing is there to be judged


def observe(videos: torch.Tensor, scenes: world.SceneBatch) -> Observation:
    """Find the scenes' things in videos, float [B, 3, T, H, W] in -1 … 1, by their colours."""
    pixels = (videos.float().permute(0, 2, 3, 4, 1) + 1) / 2  # [B, T, H, W, 3]
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]], dim=2)
    backgrounds = border.median(dim=2).values  # [B, T, 3]
    named = world.palette(world.COLOURS, videos.device)[scenes.colour]  # [B, 2, 3]
    alpha = _unmix(pixels - backgrounds[:, :, None, None], named[:, :, None] - backgrounds[:, None])
    visible = torch.stack([torch.ones_like(alpha[:, 0]), 1 - alpha[:, 0]], dim=1)
    solid = (alpha > _SOLID).float()
    colours = torch.einsum("bnthw,bthwc->bntc", solid, pixels) / solid.sum((-1, -2)).clamp(min=1)[..., None]
    shapes, fit, centres = _match(alpha.flatten(0, 2), visible.flatten(0, 2))
    lead = alpha.shape[:3]
    return Observation(
        backgrounds,
        alpha,
        visible,
        colours,
        shapes.view(lead),
        fit.view(lead),
        centres.view(*lead, 2),
        solid.sum((-1, -2)) >= _MIN_AREA,
    )


def _unmix(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """The parts of two colours in every pixel, by least squares, neither negative and together at most 1.

    pixels: [B, T, H, W, 3], colours: [B, 2, T, 3], both as differences from the background → [B, 2, T, H, W].
    """
    gram = torch.einsum("bntc,bmtc->btnm", colours, colours)
    aa, bb, ab = (gram[:, :, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 1)))  # [B, T, 1, 1]
    pa, pb = torch.einsum("bthwc,bntc->nbthw", pixels, colours)
    determinant = (aa * bb - ab * ab).clamp(min=1e-6)
    a, b = (pa * bb - pb * ab) / determinant, (pb * aa - pa * ab) / determinant
    alone_a, alone_b = (pa / aa.clamp(min=1e-6)).clamp(min=0), (pb / bb.clamp(min=1e-6)).clamp(min=0)
    a, b = torch.where(b < 0, alone_a, a.clamp(min=0)), torch.where(a < 0, alone_b, b.clamp(min=0))
    a, b = torch.where(b > 0, a, alone_a), torch.where(a > 0, b, alone_b)
    parts = torch.stack([a, b], dim=1)
    parts = parts / parts.sum(1, keepdim=True).clamp(min=1)
    return torch.where(parts < _FAINT, 0, parts)


def _match(alpha: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best ideal shape and its centre for each mask: [F, H, W] twice → index [F], soft IoU [F], centre [F, 2]."""
    parts = zip(alpha.split(_CHUNK), visible.split(_CHUNK), strict=True)
    shapes, fits, centres = zip(*(_match_chunk(a, v) for a, v in parts), strict=True)
    return torch.cat(shapes), torch.cat(fits), torch.cat(centres)


def _match_chunk(alpha: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rough = _rough_centres(alpha, visible)  # [F, 4, 2]
    each = torch.arange(len(world.SHAPES), device=alpha.device)

    def ideal(at: torch.Tensor) -> torch.Tensor:
        """Every shape at its own centre, as far as it is visible: [F, 4, 2] → [F, 4, H, W]."""
        drawn = world.coverage(at)[:, each, each]
        return drawn * visible[:, None]

    # What is visible of a shape has the same centroid as what is seen, when it is that shape: half a pixel of the grid
    # that was searched becomes a small fraction of a pixel.
    centres = rough + _centroid(alpha)[:, None] - _centroid(ideal(rough))
    drawn, seen = ideal(centres), alpha[:, None]
    iou = torch.minimum(drawn, seen).sum((-1, -2)) / torch.maximum(drawn, seen).sum((-1, -2)).clamp(min=1e-6)
    best = iou.max(dim=1)
    return best.indices, best.values, centres[torch.arange(len(alpha), device=alpha.device), best.indices]


def _rough_centres(alpha: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Where each ideal shape fits a mask best, to half a pixel: [F, H, W] twice → float32 [F, 4, 2]."""
    shifts = torch.tensor([[x, y] for y in (-0.25, 0.25) for x in (-0.25, 0.25)], device=alpha.device)
    axis = torch.arange(-_REACH, _REACH + 1, device=alpha.device, dtype=torch.float32)
    x, y = axis[None, :] - shifts[:, 0, None, None], axis[:, None] - shifts[:, 1, None, None]
    kernels = world.shape_alpha(*torch.broadcast_tensors(x, y)).flatten(0, 1)[
        :, None
    ]  # [4 shifts · 4 shapes, 1, 15, 15]
    common = conv2d(alpha[:, None], kernels, padding=_REACH)  # [F, 16, H, W]
    union = alpha.sum((-1, -2))[:, None, None, None] + conv2d(visible[:, None], kernels, padding=_REACH) - common
    score = (common / union.clamp(min=1e-6)).unflatten(1, (len(shifts), -1)).transpose(1, 2)  # [F, 4, shifts, H, W]
    place = score.flatten(2).argmax(-1)  # [F, 4]
    shift, pixel = place // world.SIZE**2, place % world.SIZE**2
    return torch.stack([pixel % world.SIZE, pixel // world.SIZE], dim=-1) + 0.5 + shifts[shift]


def _centroid(mask: torch.Tensor) -> torch.Tensor:
    """[..., H, W] → [..., 2] as (x, y) in pixels; the middle of the picture for an empty mask."""
    axis = torch.arange(world.SIZE, device=mask.device, dtype=torch.float32) + 0.5
    mass = mask.sum((-1, -2))
    sums = torch.stack([(mask.sum(-2) * axis).sum(-1), (mask.sum(-1) * axis).sum(-1)], dim=-1)
    return torch.where(mass[..., None] > 1e-6, sums / mass.clamp(min=1e-6)[..., None], world.SIZE / 2)


def _named(colours: torch.Tensor, table: dict[str, tuple[float, float, float]], index: torch.Tensor) -> torch.Tensor:
    """Where a colour [..., T, 3] is nearest to the table's entry ``index`` [...] and close to it: bool [..., T]."""
    distance = (colours[..., None, :] - world.palette(table, colours.device)).square().mean(-1).sqrt()  # [..., T, n]
    best = distance.min(dim=-1)
    return (best.indices == index[..., None]) & (best.values < _COLOUR_TOLERANCE)


def _moves(centres: torch.Tensor) -> torch.Tensor:
    """Whether a path [B, 2, T, 2] has at least half of the world's speed, by its median step: bool [B, 2]."""
    return centres.diff(dim=2).norm(dim=-1).median(dim=-1).values > world.SPEED / 2


def _motion(centres: torch.Tensor) -> torch.Tensor:
    """Index into MOTIONS of each path [B, 2, T, 2], -1 for what stands still: int64 [B, 2]."""
    start = centres[:, :, world.STRAIGHT_STEPS] - centres[:, :, 0]
    straight = (start @ world.velocities(start.device).T).argmax(-1)
    misfit = _circle_misfit(centres).min(dim=-1)  # over the senses of the turn
    # Some paths with two bounces are nearly arcs: a circle must also be much nearer than the straight path is.
    circles = (misfit.values < _MAX_MISFIT) & (misfit.values < 0.5 * _straight_misfit(centres, straight))
    return torch.where(_moves(centres), torch.where(circles, len(world.DIRECTIONS) + misfit.indices, straight), -1)


def _straight_misfit(centres: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """RMS distance, in pixels, of paths [B, 2, T, 2] from the bouncing path in a direction [B, 2] that starts alike."""
    steps = torch.arange(world.FRAMES, device=centres.device, dtype=torch.float32)
    free = world.velocities(centres.device)[direction][:, :, None] * steps[:, None]  # [B, 2, T, 2], from 0
    early = slice(0, world.STRAIGHT_STEPS + 1)
    start = (centres[:, :, early] - free[:, :, early]).mean(2, keepdim=True)
    return (world.reflected(start + free) - centres).square().sum(-1).mean(-1).sqrt()


def _circle_misfit(centres: torch.Tensor) -> torch.Tensor:
    """RMS distance, in pixels, of paths [B, 2, T, 2] from the nearest circling at the world's pace: [B, 2, 2 senses].

    Fitted as a whole, c_t = m + R(ω t) u with m and u free, because steps of a pixel shake too much to see turns in.
    """
    steps = torch.arange(world.FRAMES, dtype=torch.float64)
    found = []
    for sign in world.CIRCLING.values():
        cos, sin = (sign * world.TURN * steps).cos(), (sign * world.TURN * steps).sin()
        one, none = torch.ones_like(cos), torch.zeros_like(cos)
        rows_x, rows_y = torch.stack([one, none, cos, -sin], 1), torch.stack([none, one, sin, cos], 1)
        design = torch.cat([rows_x, rows_y])  # [2T, 4]: x of all frames, then y; unknowns m_x, m_y, u_x, u_y
        left = torch.eye(len(design), dtype=torch.float64) - design @ torch.linalg.pinv(design)
        residual = centres.transpose(-1, -2).flatten(-2).double() @ left.to(centres.device)
        found.append((residual.square().sum(-1) / world.FRAMES).sqrt().float())
    return torch.stack(found, dim=-1)


def attributes(seen: Observation, scenes: world.SceneBatch) -> dict[str, torch.Tensor]:
    """Whether each frame shows what the prompt names, of both things: bool [B, T] for every name in ATTRIBUTES.

    The direction is judged once a video and holds for all its frames.
    """
    shape = (seen.shapes == scenes.shape[..., None]) & (seen.fit > _MIN_IOU)
    direction = (_motion(seen.centres) == scenes.motion)[..., None]
    return {
        "colour": (_named(seen.colours, world.COLOURS, scenes.colour) & seen.present).all(1),
        "background": _named(seen.backgrounds, world.BACKGROUNDS, scenes.background),
        "shape": (shape & seen.present).all(1),
        "direction": (direction & seen.present).all(1),
    }


def _subject(seen: Observation) -> torch.Tensor:
    """Consistency of the things, each as seen from its own centre, [B].

    VBench's: the mean cosine of a frame with the first and the previous one, here over the pixels visible in both.
    """
    reach = torch.arange(-_REACH, _REACH + 1, device=seen.alpha.device, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(reach, reach, indexing="ij")
    grid = torch.stack([grid_x, grid_y], -1) + seen.centres.flatten(0, 2)[:, None, None]  # [B·2·T, 15, 15, 2]
    layers = torch.cat(
        [seen.alpha[..., None, :, :] * seen.colours[..., None, None], seen.visible[..., None, :, :]], dim=3
    )
    crop = torch.nn.functional.grid_sample(layers.flatten(0, 2), grid / world.SIZE * 2 - 1, align_corners=False)
    picture, visible = crop.unflatten(0, seen.present.shape).split((3, 1), dim=3)  # [B, 2, T, 3 | 1, 15, 15]

    def cosine(now: slice, then: slice) -> torch.Tensor:
        both = torch.minimum(visible[:, :, now], visible[:, :, then])
        a, b = picture[:, :, now] * both, picture[:, :, then] * both
        norms = a.square().sum((3, 4, 5)).sqrt() * b.square().sum((3, 4, 5)).sqrt()
        return (a * b).sum((3, 4, 5)) / norms.clamp(min=1e-6)  # [B, 2, T-1]

    later, first, previous = slice(1, None), slice(0, 1), slice(0, -1)
    mean = ((cosine(later, first) + cosine(later, previous)) / 2).mean(-1).clamp(0, 1)
    return (mean * seen.present.float().mean(-1)).mean(-1)


def _background(videos: torch.Tensor, seen: Observation) -> torch.Tensor:
    """One minus the mean change of the pixels outside the things against the first and the previous frame, [B]."""
    pixels = (videos.float().permute(0, 2, 1, 3, 4) + 1) / 2  # [B, T, 3, H, W]
    empty = (seen.alpha.sum(1) < _FAINT).float()[:, :, None]

    def change(now: slice, then: slice) -> torch.Tensor:
        both = empty[:, now] * empty[:, then]
        difference = (pixels[:, now] - pixels[:, then]).abs() * both
        return difference.sum((2, 3, 4)) / (3 * both.sum((2, 3, 4))).clamp(min=1)

    later, first, previous = slice(1, None), slice(0, 1), slice(0, -1)
    return 1 - ((change(later, first) + change(later, previous)) / 2).mean(-1).clamp(0, 1)


def _imaging_quality(videos: torch.Tensor, seen: Observation) -> torch.Tensor:
    """Closeness of every frame to its own ideal redrawing: 1 - RMSE / 0.25, [B]."""
    ideal = seen.backgrounds[..., None, None].expand(-1, -1, -1, world.SIZE, world.SIZE)  # [B, T, 3, H, W]
    for thing in reversed(range(world.THINGS)):
        best = seen.shapes[:, thing, :, None, None, None].expand(-1, -1, 1, world.SIZE, world.SIZE)
        alpha = world.coverage(seen.centres[:, thing]).gather(2, best)  # [B, T, 1, H, W]
        alpha = alpha * seen.present[:, thing, :, None, None, None]
        ideal = ideal + (seen.colours[:, thing, :, :, None, None] - ideal) * alpha
    pixels = (videos.float().permute(0, 2, 1, 3, 4) + 1) / 2
    rmse = (pixels - ideal).square().mean((2, 3, 4)).sqrt()
    return (1 - rmse / 0.25).clamp(0, 1).mean(-1)


def _smoothness(centres: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """One minus the median change of velocity, in units of the speed, beyond the turn of the named motion, [B].

    The median forgives the bounces, of which a path of 16 frames has few.
    """
    velocity = centres.diff(dim=2)  # [B, 2, T-1, 2]
    turn = world.turns(motion)[..., None]
    x, y = velocity[..., 0], velocity[..., 1]
    expected = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], dim=-1)
    jerk = (velocity[:, :, 1:] - expected[:, :, :-1]).norm(dim=-1).median(dim=-1).values
    return (1 - jerk / world.SPEED).clamp(0, 1).mean(1)


def measure(videos: torch.Tensor, scenes: world.SceneBatch) -> dict[str, torch.Tensor]:
    """All measurements of a batch: float32 [B] for every name in METRICS and ATTRIBUTES.

    videos: float [B, 3, T, H, W] in -1 … 1; a video with NaN or Inf measures 0 throughout.
    """
    finite = videos.isfinite().flatten(1).all(1)
    videos = torch.where(finite[:, None, None, None, None], videos, 0)
    seen = observe(videos, scenes)
    named = attributes(seen, scenes)
    everything = torch.stack(list(named.values()))  # [4, B, T]
    result = {
        "scene_consistency": everything.all(0).float().mean(-1),
        "subject_consistency": _subject(seen),
        "background_consistency": _background(videos, seen),
        "motion_smoothness": _smoothness(seen.centres, scenes.motion),
        "dynamic_degree": (_moves(seen.centres).float() * seen.present.float().mean(-1)).mean(-1),
        "imaging_quality": _imaging_quality(videos, seen),
        "overall_consistency": everything.float().mean((0, 2)),
        **{name: value.float().mean(-1) for name, value in named.items()},
    }
    return {name: value * finite for name, value in result.items()}


def psnr(videos: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each video [B, 3, T, H, W] against its reference, clipped to -1 … 1: [B]."""
    error = (videos.float().clamp(-1, 1) - reference.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
