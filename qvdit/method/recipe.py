"""A method is a recipe: a YAML file that combines building blocks. To add a method, add a file to qvdit/recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from qvdit.contract import WEIGHT_BITS, Bits, QvditError

MAX_RANK = 64  # of TQE's run-time term: more costs more than it corrects
FOLDER = Path(__file__).parent.parent / "recipes"

ClipGrid = Literal["clean", "authors"]
"""Ratios that the clip search tries: 0.02 … 1.0, or those of Q-VDiT's code, {0, 0.02 … 0.98}, its division included."""

StepStatistic = Literal["mean", "spearman", "ema"]
"""How the time steps' salience becomes one: all alike, by PTQ4DiT's ρ, or the moving average of Q-VDiT's code."""

Relation = Literal["frames", "authors"]
"""What the distillation relates: frames, or what the code of Q-VDiT reshapes to, halves of channels."""

GainStart = Literal["one", "authors"]
"""Where frame gains start: at 1, or as in Q-VDiT's code, whose gain is 1 + m with m = 1 at first."""


@dataclass(frozen=True)
class WeightsBlock:
    """How weights are rounded."""

    symmetric_from: int = 9  # bits from which the grid is symmetric; 9: never, 2: always
    # What the clip search keeps: the weight, the layer's output, or its output after second-order rounding.
    clip_by: Literal["weight", "output", "rounded_output"] = "weight"
    clip_grid: ClipGrid = "clean"
    group: int = 0  # input features that share a scale, as near to it as K allows; 0: all of a row
    rounding: Literal["nearest", "second_order"] = "nearest"
    bias_correction: bool = False  # the mean of the output error goes into the bias


@dataclass(frozen=True)
class ActivationsBlock:
    """How activations are quantized, per token at run time."""

    symmetric_from: int = 2  # bits from which they are symmetric; 9: never, 2: always


@dataclass(frozen=True)
class SmoothingBlock:
    """SmoothQuant's scale s = a^p / wmax^(1-p), p by bits; 0 is off."""

    statistic: StepStatistic = "mean"  # a: the activations' salience over the time steps
    strength: float = 0.0
    by_bits: dict[str, float] = field(default_factory=dict)  # overrides strength, e.g. {w6a6: 0.5}
    shared: bool = True  # one scale for all the linears that read the same tensor


@dataclass(frozen=True)
class TqeBlock:
    """The run-time rank-R term and the training-time term inside the quantizer."""

    rank: int = 0  # R at run time; 0: no term
    # closed_form corrects the rounding error; zeros leaves the term to training; svd takes the term out of the weight
    # before what is left of it is rounded
    start: Literal["closed_form", "zeros", "svd"] = "closed_form"
    frame_gain: Literal["video", "temporal", "none"] = "none"  # which layers get a gain by frame
    gain_start: GainStart = "one"
    inner_rank: int = 32  # of the term that is folded into the integers while distilling


@dataclass(frozen=True)
class DistillationBlock:
    """Temporal maintenance distillation; the budget follows the device unless the user sets it."""

    steps: dict[str, int] = field(default_factory=dict)  # budget by device; empty: the method does not train
    batch: int = 32
    relation_weight: float = 100.0  # λ of the frame relations; 0: MSE alone
    relation: Relation = "frames"
    learning_rate: float = 5e-4  # of the low-rank terms and the gains
    scale_learning_rate: float = 1e-3  # of the logarithm of the weight scales
    quantize_activations: bool = True  # what is deployed is what is trained


@dataclass(frozen=True)
class Recipe:
    """A quantization method."""

    name: str
    source: str  # where it comes from, one line
    kind: Literal["dynamic", "static"] = "dynamic"  # static: calibrated per-tensor INT8 through ModelOpt
    weights: WeightsBlock = field(default_factory=WeightsBlock)
    activations: ActivationsBlock = field(default_factory=ActivationsBlock)
    smoothing: SmoothingBlock = field(default_factory=SmoothingBlock)
    rotation: Literal["none", "hadamard"] = "none"  # of every layer's input features, with random signs from the seed
    rotation_below: int = 9  # the rotation is for widths of fewer weight bits than this; 9: for all
    tqe: TqeBlock = field(default_factory=TqeBlock)
    distillation: DistillationBlock = field(default_factory=DistillationBlock)
    layer_bits: dict[str, int] = field(
        default_factory=dict
    )  # glob over layer names → weight bits, 16 keeps it; first match

    def weight_bits(self, layer: str, default: int) -> int:
        """Weight bits of a layer: the first pattern that matches, else the default."""
        return next((bits for glob, bits in self.layer_bits.items() if fnmatch.fnmatchcase(layer, glob)), default)

    def rotates(self, bits: Bits) -> bool:
        """Whether inputs are rotated at a bit width: in all layers or none, since layers may share an input."""
        return self.rotation == "hadamard" and bits.weight < self.rotation_below

    def smoothing_strength(self, bits: Bits) -> float:
        """p for a bit width."""
        return self.smoothing.by_bits.get(str(bits), self.smoothing.strength)

    def distillation_steps(self, device: str, asked: int | None = None) -> int:
        """The budget on a device ("cpu" or "cuda"): what was asked for, or the recipe's; 0 if it does not train."""
        if not self.distillation.steps:
            return 0
        return self.distillation.steps.get(device, 0) if asked is None else asked


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str) -> Recipe:
    """A recipe by name, or from a YAML file."""
    path = FOLDER / f"{name_or_path}.yaml"
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
    if not path.is_file():
        where = "" if path.parent == FOLDER else ", a file that is not there"
        raise QvditError(
            f"recipe {name_or_path!r}{where}", f"one of {', '.join(names())}, or a YAML file", "check --recipe"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QvditError(f"{path}, which is not YAML ({' '.join(str(error).split())})", "a recipe", "mend it") from None
    recipe = _build(Recipe, content, str(path))
    _check_ranges(recipe, str(path))
    return recipe


def _check_ranges(recipe: Recipe, where: str) -> None:
    """Refuse values that no building block can work with."""
    for glob, bits in recipe.layer_bits.items():
        check_layer_bits(glob, bits)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", recipe.name):
        raise QvditError(f"name: {recipe.name!r} in {where}", "letters, digits, '.', '_' and '-'", "mend it")
    for bits_name in recipe.smoothing.by_bits:
        Bits.parse(bits_name)
    if recipe.weights.clip_by == "rounded_output" and recipe.weights.rounding != "second_order":
        wanted = "weights.rounding: second_order beside it"
        raise QvditError(f"weights.clip_by: rounded_output in {where}", wanted, "mend it, or use clip_by: output")
    tqe, distillation = recipe.tqe, recipe.distillation
    numbers: dict[str, tuple[float, float, float]] = {
        "tqe.rank": (tqe.rank, 0, MAX_RANK),
        "tqe.inner_rank": (tqe.inner_rank, 1, 4096),
    }
    numbers |= {"distillation.batch": (distillation.batch, 1, 1 << 20)}
    numbers |= {f"distillation.steps.{name}": (steps, 0, 1 << 30) for name, steps in distillation.steps.items()}
    numbers |= {"weights.symmetric_from": (recipe.weights.symmetric_from, 2, 9)}
    numbers |= {"activations.symmetric_from": (recipe.activations.symmetric_from, 2, 9)}
    numbers |= {"rotation_below": (recipe.rotation_below, 2, 9)}
    numbers |= {"weights.group": (recipe.weights.group, 0, 1 << 20)}
    strengths = {"smoothing.strength": recipe.smoothing.strength, **recipe.smoothing.by_bits}
    numbers |= {name: (value, 0, 1) for name, value in strengths.items()}
    numbers |= {"distillation.relation_weight": (distillation.relation_weight, 0, 1e6)}
    for name in ("learning_rate", "scale_learning_rate"):
        numbers |= {f"distillation.{name}": (getattr(distillation, name), 1e-12, 1)}
    for name, (value, low, high) in numbers.items():
        if not low <= value <= high:
            raise QvditError(f"{name}: {value} in {where}", f"{low} … {high}", "mend it")
    for device in distillation.steps:
        if device not in ("cpu", "cuda"):
            raise QvditError(f"distillation.steps of {device!r} in {where}", "cpu or cuda", "mend it")


def check_layer_bits(glob: str, bits: int) -> None:
    """Refuse weight bits that no layer can have."""
    if bits not in (*WEIGHT_BITS, 16):
        expected = f"{', '.join(map(str, WEIGHT_BITS))}, or 16 to keep it in full precision"
        raise QvditError(f"{bits} weight bits for layers {glob!r}", expected, "check the layer bits")


def override(recipe: Recipe, **blocks: dict[str, Any]) -> Recipe:
    """A recipe with some fields of its blocks replaced, e.g. ``override(recipe, tqe={"rank": 4})``."""
    changes = {name: dataclasses.replace(getattr(recipe, name), **fields) for name, fields in blocks.items() if fields}
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


T = TypeVar("T")


def _build(cls: type[T], content: Any, where: str) -> T:
    """A dataclass from parsed YAML, checked field by field."""
    if not isinstance(content, dict):
        raise QvditError(f"{content!r} in {where}", f"a mapping of {cls.__name__}'s fields", "mend it")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(content) - set(hints), key=str)
    if unknown:
        raise QvditError(f"the key {unknown[0]!r} in {where}", f"one of {', '.join(hints)}", "mend it")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in content
    ]
    if missing:
        raise QvditError(f"{where} without {missing[0]!r}", f"a value for {missing[0]!r}", "add it")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if typing.get_origin(hint) is Literal:
        accepted, expected = value in typing.get_args(hint), f"one of {', '.join(map(str, typing.get_args(hint)))}"
    elif typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        accepted = isinstance(value, dict) and all(isinstance(k, str) and _is(kind, v) for k, v in value.items())
        expected = f"a mapping to {kind.__name__}"
    else:
        accepted, expected = _is(hint, value), f"a value of type {hint.__name__}"
    if not accepted:
        raise QvditError(f"{value!r} in {where}", expected, "mend it")
    return float(value) if hint is float else value


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
