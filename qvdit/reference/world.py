"""The drawn video world: one coloured shape that moves over a plain background and bounces off the edges.

Every video follows from a :class:`Scene` and a start position, so its quality can be measured from pixels
(:mod:`qvdit.reference.measure`) with no learned judge. Symbols: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

FRAMES = 16  # T
SIZE = 32  # H = W, pixels
SPEED = 1.2  # pixels per frame
MARGIN = 9.5  # pixels between the shape's centre and the edge it bounces off: no shape ever touches the border
STRAIGHT_STEPS = 4  # the first steps never bounce, so that the direction named by the prompt can be seen

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.95, 0.15, 0.90),
    "cyan": (0.10, 0.90, 0.95),
    "orange": (1.00, 0.50, 0.00),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.04),
    "grey": (0.42, 0.42, 0.42),
    "brown": (0.32, 0.20, 0.10),
    "teal": (0.05, 0.28, 0.30),
}
# Unit steps in pixels, x to the right and y down.
DIRECTIONS = {
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}


@dataclass(frozen=True)
class Scene:
    """What a prompt names: a shape, its colour, where it first heads, and the background."""

    shape: str
    colour: str
    direction: str
    background: str

    @property
    def prompt(self) -> str:
        """The scene in words; :func:`parse_prompt` is the inverse."""
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


_PROMPT = re.compile(r"a (?P<colour>\S+) (?P<shape>\S+) moving (?P<direction>\S+) on a (?P<background>\S+) background")


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the form that :attr:`Scene.prompt` writes; ValueError says which word was not understood."""
    match = _PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r}: expected 'a <colour> <shape> moving <direction> on a <background> background'"
        )
    scene = Scene(**match.groupdict())
    tables = ((scene.shape, SHAPES), (scene.colour, COLOURS), (scene.direction, DIRECTIONS))
    for word, known in (*tables, (scene.background, BACKGROUNDS)):
        if word not in known:
            raise ValueError(f"prompt {prompt!r}: {word!r} is not one of {', '.join(known)}")
    return scene


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as indices into SHAPES, COLOURS, DIRECTIONS and BACKGROUNDS; int64 [B] each, on one device."""

    shape: torch.Tensor
    colour: torch.Tensor
    direction: torch.Tensor
    background: torch.Tensor

    @staticmethod
    def from_scenes(scenes: list[Scene], device: torch.device | str = "cpu") -> SceneBatch:
        """Index a list of scenes."""
        tables = (list(SHAPES), list(COLOURS), list(DIRECTIONS), list(BACKGROUNDS))
        names = zip(*((s.shape, s.colour, s.direction, s.background) for s in scenes), strict=True)
        columns = [
            torch.tensor([t.index(n) for n in column], device=device) for t, column in zip(tables, names, strict=True)
        ]
        return SceneBatch(*columns)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> SceneBatch:
        """Draw scenes uniformly; B = count, on the generator's device."""
        sizes = (len(SHAPES), len(COLOURS), len(DIRECTIONS), len(BACKGROUNDS))
        return SceneBatch(*(torch.randint(n, (count,), generator=generator, device=generator.device) for n in sizes))

    def scenes(self) -> list[Scene]:
        """The batch as scenes with names."""
        tables = (list(SHAPES), list(COLOURS), list(DIRECTIONS), list(BACKGROUNDS))
        columns = (self.shape, self.colour, self.direction, self.background)
        named = zip(*([t[i] for i in c.tolist()] for t, c in zip(tables, columns, strict=True)), strict=True)
        return [Scene(shape, colour, direction, background) for shape, colour, direction, background in named]

    def tokens(self) -> torch.Tensor:
        """Rows of the prompt table's codebook, int64 [B, 4]; row 0 of the codebook is the empty token."""
        offset = 1
        columns = []
        for column, table in (
            (self.shape, SHAPES),
            (self.colour, COLOURS),
            (self.direction, DIRECTIONS),
            (self.background, BACKGROUNDS),
        ):
            columns.append(column + offset)
            offset += len(table)
        return torch.stack(columns, dim=1)


VOCABULARY = 1 + len(SHAPES) + len(COLOURS) + len(DIRECTIONS) + len(BACKGROUNDS)


def palette(table: dict[str, tuple[float, float, float]], device: torch.device | str) -> torch.Tensor:
    """A colour table as float32 [n, 3] in 0 … 1."""
    return torch.tensor(list(table.values()), dtype=torch.float32, device=device)


def velocities(device: torch.device | str) -> torch.Tensor:
    """Pixels per frame for each direction, float32 [8, 2] as (x, y), all of length SPEED."""
    steps = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32, device=device)
    return SPEED * steps / steps.norm(dim=1, keepdim=True)


def coverage(centres: torch.Tensor) -> torch.Tensor:
    """How much of each pixel every ideal shape covers when centred at ``centres``.

    centres: float32 [..., 2] as (x, y) in pixels → float32 [..., 4, H, W] in 0 … 1, antialiased over one pixel.
    The four shapes have nearly equal areas (110 … 118 pixels) and their centroid at the centre.
    """
    axis = torch.arange(SIZE, device=centres.device, dtype=torch.float32) + 0.5
    x = axis[None, :] - centres[..., 0, None, None]  # [..., 1, W]
    y = axis[:, None] - centres[..., 1, None, None]  # [..., H, 1]
    x, y = torch.broadcast_tensors(x, y)
    circle = torch.sqrt(x * x + y * y) - 6.0
    square = torch.maximum(x.abs(), y.abs()) - 5.3
    inradius = 4.6  # of the upward equilateral triangle
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(y, torch.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y)) - inradius
    bar = torch.maximum(x.abs() - 7.0, y.abs() - 2.6)
    post = torch.maximum(x.abs() - 2.6, y.abs() - 7.0)
    distance = torch.stack([circle, square, triangle, torch.minimum(bar, post)], dim=-3)
    return (0.5 - distance).clamp(0, 1)


def paths(scenes: SceneBatch, generator: torch.Generator) -> torch.Tensor:
    """Draw a start for each scene and follow it: centres of the shape, float32 [B, T, 2] in pixels.

    The start leaves room for STRAIGHT_STEPS steps in the named direction; later steps reflect at MARGIN.
    """
    velocity = velocities(scenes.shape.device)[scenes.direction]  # [B, 2]
    span = SIZE - 2 * MARGIN
    straight = velocity * STRAIGHT_STEPS
    low = (-straight).clamp(min=0)
    high = span - straight.clamp(min=0)
    unit = torch.rand(velocity.shape, generator=generator, device=velocity.device)
    start = low + unit * (high - low)
    steps = torch.arange(FRAMES, device=velocity.device, dtype=torch.float32)
    free = start[:, None] + velocity[:, None] * steps[None, :, None]
    folded = torch.remainder(free, 2 * span)
    return MARGIN + torch.where(folded > span, 2 * span - folded, folded)


def render(scenes: SceneBatch, centres: torch.Tensor) -> torch.Tensor:
    """Draw the videos. centres: float32 [B, T, 2] → float32 [B, 3, T, H, W] in -1 … 1."""
    device = centres.device
    index = scenes.shape[:, None, None, None, None].expand(-1, FRAMES, 1, SIZE, SIZE)
    alpha = coverage(centres).gather(2, index).squeeze(2)  # [B, T, H, W]
    colour = palette(COLOURS, device)[scenes.colour]  # [B, 3]
    background = palette(BACKGROUNDS, device)[scenes.background]
    video = background[:, :, None, None, None] + (colour - background)[:, :, None, None, None] * alpha[:, None]
    return video * 2 - 1


def draw_videos(count: int, generator: torch.Generator) -> tuple[torch.Tensor, SceneBatch]:
    """Draw ``count`` scenes and their videos, float32 [B, 3, T, H, W] in -1 … 1."""
    scenes = SceneBatch.draw(count, generator)
    return render(scenes, paths(scenes, generator)), scenes
