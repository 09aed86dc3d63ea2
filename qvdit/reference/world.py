"""The drawn video world: two coloured shapes, one in front of the other, that move over a plain background.

A shape goes straight and bounces off the edges, or circles from the top of its circle. Every video follows from a
:class:`Scene` and where its things start, so its quality can be measured from pixels (:mod:`qvdit.reference.measure`)
with no learned judge. Symbols: B batch, T frames, H height, W width. A scene's things come in the order (front, back).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

FRAMES = 16  # T
SIZE = 32  # H = W, pixels
THINGS = 2
SPEED = 1.2  # pixels per frame
MARGIN = 8.0  # pixels between a shape's centre and the edge it bounces off: no shape ever leaves the picture
STRAIGHT_STEPS = 4  # the first steps never bounce, so that the direction named by the prompt can be seen
RADIUS = 4.0  # pixels, of a circling shape's path
TURN = SPEED / RADIUS  # radians per frame
MIN_DISTANCE = 5.0  # pixels between the two centres: more than half of the shape behind stays visible
_STARTS = 32  # pairs of starts tried for each scene to keep that distance

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
CIRCLING = {"clockwise": 1, "counter-clockwise": -1}  # sign of the turn, as seen with y down
MOTIONS = (*(f"moving {name}" for name in DIRECTIONS), *(f"circling {name}" for name in CIRCLING))


@dataclass(frozen=True)
class Thing:
    """One of a scene's two shapes."""

    shape: str
    colour: str
    motion: str  # one of MOTIONS: where it first heads, or how it circles

    @property
    def words(self) -> str:
        """The thing as a prompt names it."""
        return f"a {self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """What a prompt names: a thing in front, a thing behind it, and the background."""

    front: Thing
    back: Thing
    background: str

    @property
    def prompt(self) -> str:
        """The scene in words; :func:`parse_prompt` is the inverse."""
        return f"{self.front.words} in front of {self.back.words} on a {self.background} background"


_THING = r"an? (?P<colour{0}>\S+) (?P<shape{0}>\S+) (?P<motion{0}>(?:moving|circling) \S+)"
_PROMPT = re.compile(
    f"{_THING.format(0)} in front of {_THING.format(1)} on an? (?P<background>\\S+) background".replace(" ", r"\s+")
)
EXAMPLE = "a red circle moving right in front of a blue square circling clockwise on a grey background"


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the form that :attr:`Scene.prompt` writes; ValueError says what was not understood."""
    match = _PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise ValueError(f"prompt {prompt!r}: expected the form of {EXAMPLE!r}")
    words = {name: " ".join(value.split()) for name, value in match.groupdict().items()}
    front, back = (Thing(*(words[f"{name}{i}"] for name in ("shape", "colour", "motion"))) for i in range(THINGS))
    known = [(thing, table) for pair in (front, back) for thing, table in _tables(pair)]
    for word, table in (*known, (words["background"], BACKGROUNDS)):
        if word not in table:
            raise ValueError(f"prompt {prompt!r}: {word!r} is not one of {', '.join(table)}")
    if front.colour == back.colour:
        raise ValueError(f"prompt {prompt!r}: two {front.colour} things cannot be told apart; give them two colours")
    return Scene(front, back, words["background"])


def _tables(thing: Thing) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """A thing's words, each with the words it may be."""
    return ((thing.shape, SHAPES), (thing.colour, tuple(COLOURS)), (thing.motion, MOTIONS))


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as indices into SHAPES, COLOURS, MOTIONS and BACKGROUNDS; int64, on one device."""

    shape: torch.Tensor  # [B, 2]
    colour: torch.Tensor  # [B, 2]
    motion: torch.Tensor  # [B, 2]
    background: torch.Tensor  # [B]

    @staticmethod
    def from_scenes(scenes: list[Scene], device: torch.device | str = "cpu") -> SceneBatch:
        """Index a list of scenes."""
        things = [[[table.index(word) for word, table in _tables(t)] for t in (s.front, s.back)] for s in scenes]
        shape, colour, motion = torch.tensor(things, device=device).unbind(-1)
        grounds = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
        return SceneBatch(shape, colour, motion, torch.tensor(grounds, device=device))

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> SceneBatch:
        """Draw scenes uniformly, the two colours of each different; B = count, on the generator's device."""

        def integers(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, device=generator.device)

        first, other = integers(len(COLOURS), count), 1 + integers(len(COLOURS) - 1, count)
        colour = torch.stack([first, (first + other) % len(COLOURS)], dim=1)
        shape, motion = integers(len(SHAPES), count, THINGS), integers(len(MOTIONS), count, THINGS)
        return SceneBatch(shape, colour, motion, integers(len(BACKGROUNDS), count))

    def scenes(self) -> list[Scene]:
        """The batch as scenes with names."""
        colours, grounds = list(COLOURS), list(BACKGROUNDS)
        rows = torch.stack([self.shape, self.colour, self.motion], dim=-1).tolist()  # [B, 2, 3]
        named = [[Thing(SHAPES[s], colours[c], MOTIONS[m]) for s, c, m in things] for things in rows]
        return [Scene(f, b, grounds[g]) for (f, b), g in zip(named, self.background.tolist(), strict=True)]

    def tokens(self) -> torch.Tensor:
        """Rows of the prompt table's codebook, int64 [B, 7]; row 0 of the codebook is the empty token.

        Attention does not know a token's place, so the words of the front and the back thing have rows of their own.
        """
        sizes = (len(SHAPES), len(COLOURS), len(MOTIONS))
        columns, offset = [], 1
        for thing in range(THINGS):
            for column, size in zip((self.shape, self.colour, self.motion), sizes, strict=True):
                columns.append(column[:, thing] + offset)
                offset += size
        return torch.stack([*columns, self.background + offset], dim=1)


PROMPT_TOKENS = 3 * THINGS + 1
VOCABULARY = 1 + THINGS * (len(SHAPES) + len(COLOURS) + len(MOTIONS)) + len(BACKGROUNDS)


def palette(table: dict[str, tuple[float, float, float]], device: torch.device | str) -> torch.Tensor:
    """A colour table as float32 [n, 3] in 0 … 1."""
    return torch.tensor(list(table.values()), dtype=torch.float32, device=device)


def velocities(device: torch.device | str) -> torch.Tensor:
    """Pixels per frame for each direction, float32 [8, 2] as (x, y), all of length SPEED."""
    steps = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32, device=device)
    return SPEED * steps / steps.norm(dim=1, keepdim=True)


def turns(motion: torch.Tensor) -> torch.Tensor:
    """Radians per frame by which motions (indices into MOTIONS) turn, float32 of their shape; 0 for straight ones."""
    signs = torch.tensor([0] * len(DIRECTIONS) + list(CIRCLING.values()), dtype=torch.float32, device=motion.device)
    return TURN * signs[motion]


def coverage(centres: torch.Tensor) -> torch.Tensor:
    """How much of each pixel every ideal shape covers when centred at ``centres``.

    centres: float32 [..., 2] as (x, y) in pixels → float32 [..., 4, H, W] in 0 … 1, antialiased over one pixel.
    The four shapes have nearly equal areas (71 … 77 pixels) and their centroid at the centre.
    """
    axis = torch.arange(SIZE, device=centres.device, dtype=torch.float32) + 0.5
    x = axis[None, :] - centres[..., 0, None, None]  # [..., 1, W]
    y = axis[:, None] - centres[..., 1, None, None]  # [..., H, 1]
    return shape_alpha(*torch.broadcast_tensors(x, y))


def shape_alpha(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Coverage of pixels at offsets x, y [..., H, W] from the centre by every shape: float32 [..., 4, H, W]."""
    circle = torch.sqrt(x * x + y * y) - 4.8
    square = torch.maximum(x.abs(), y.abs()) - 4.25
    inradius = 3.7  # of the upward equilateral triangle
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(y, torch.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y)) - inradius
    bar = torch.maximum(x.abs() - 5.8, y.abs() - 2.0)
    post = torch.maximum(x.abs() - 2.0, y.abs() - 5.8)
    distance = torch.stack([circle, square, triangle, torch.minimum(bar, post)], dim=-3)
    return (0.5 - distance).clamp(0, 1)


def paths(scenes: SceneBatch, generator: torch.Generator) -> torch.Tensor:
    """Draw starts for each scene and follow them: centres of its things, float32 [B, 2, T, 2] in pixels.

    Of _STARTS pairs, the first that keeps MIN_DISTANCE throughout; if none does, the one that keeps the most.
    """
    motion = scenes.motion[:, None].expand(-1, _STARTS, -1)  # [B, S, 2]
    unit = torch.rand(*motion.shape, 2, generator=generator, device=motion.device)
    centres = torch.where((motion < len(DIRECTIONS))[..., None, None], _straight(motion, unit), _circle(motion, unit))
    nearest = (centres[:, :, 0] - centres[:, :, 1]).norm(dim=-1).amin(-1)  # [B, S]
    order = torch.arange(_STARTS, device=motion.device)
    chosen = torch.where(nearest >= MIN_DISTANCE, 1e3 - order, nearest).argmax(1)  # [B]
    return centres[torch.arange(len(centres), device=motion.device), chosen]


def _straight(motion: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Straight paths [..., T, 2] that reflect at MARGIN, from random numbers unit [..., 2] in 0 … 1.

    The start leaves room for STRAIGHT_STEPS steps in the named direction.
    """
    velocity = velocities(motion.device)[motion.clamp(max=len(DIRECTIONS) - 1)]  # [..., 2]
    span = SIZE - 2 * MARGIN
    straight = velocity * STRAIGHT_STEPS
    low = (-straight).clamp(min=0)
    high = span - straight.clamp(min=0)
    start = low + unit * (high - low)
    steps = torch.arange(FRAMES, device=motion.device, dtype=torch.float32)
    return reflected(MARGIN + start[..., None, :] + velocity[..., None, :] * steps[:, None])


def reflected(free: torch.Tensor) -> torch.Tensor:
    """Coordinates in pixels, of any shape, folded back at MARGIN from either edge as often as it takes."""
    span = SIZE - 2 * MARGIN
    folded = torch.remainder(free - MARGIN, 2 * span)
    return MARGIN + torch.where(folded > span, 2 * span - folded, folded)


def _circle(motion: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Circular paths [..., T, 2] of RADIUS around a random middle, unit [..., 2] in 0 … 1, from the top of the circle.

    From a random phase the two senses would look alike on average, and a model of this size would not tell them apart.
    """
    low = MARGIN + RADIUS
    middle = low + unit * (SIZE - 2 * low)
    steps = torch.arange(FRAMES, device=motion.device, dtype=torch.float32)
    angle = turns(motion)[..., None] * steps - math.pi / 2  # the chord of a step is SPEED to within half a percent
    return middle[..., None, :] + RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)


def render(scenes: SceneBatch, centres: torch.Tensor) -> torch.Tensor:
    """Draw the videos. centres: float32 [B, 2, T, 2] → float32 [B, 3, T, H, W] in -1 … 1."""
    device = centres.device
    colour = palette(COLOURS, device)[scenes.colour]  # [B, 2, 3]
    video = palette(BACKGROUNDS, device)[scenes.background][:, :, None, None, None].expand(-1, -1, FRAMES, SIZE, SIZE)
    for thing in reversed(range(THINGS)):  # the back one first
        index = scenes.shape[:, thing, None, None, None, None].expand(-1, FRAMES, 1, SIZE, SIZE)
        alpha = coverage(centres[:, thing]).gather(2, index).squeeze(2)  # [B, T, H, W]
        video = torch.lerp(video, colour[:, thing, :, None, None, None].expand_as(video), alpha[:, None])
    return video * 2 - 1


def draw_videos(count: int, generator: torch.Generator) -> tuple[torch.Tensor, SceneBatch]:
    """Draw ``count`` scenes and their videos, float32 [B, 3, T, H, W] in -1 … 1."""
    scenes = SceneBatch.draw(count, generator)
    return render(scenes, paths(scenes, generator)), scenes
