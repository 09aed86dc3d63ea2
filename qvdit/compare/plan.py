"""Which cells a comparison has, in the order of their importance, and what each of them depends on."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qvdit.contract import Bits, QvditError
from qvdit.contract.video import described
from qvdit.method import quantization
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationPlan
from qvdit.method.recipe import Recipe
from qvdit.models import Site
from qvdit.models.loading import WORLD_PIPELINE, SourceModel
from qvdit.quality import Trial

FULL, OURS, AUTHORS = "fp", "qvdit", "q-vdit-authors"
FULL_BITS = "fp32"
EARLIER = ("rtn", "q-dit", "ptq4dit", "smoothquant", "quarot", "efficientdm", "svdquant", "vidit-q")
"""The methods before Q-VDiT, as its paper lists them, and plain rounding."""

WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a6", "w3a8", "w3a6", "w2a8", "w2a6")
"""The paper's bit widths and ours below them, widest first."""

UNIFORM, MLP8 = "uniform", "mlp8"
REGIMES = (UNIFORM, MLP8)
"""All layers at the width's bits; or the Q-VDiT authors' configuration, every MLP weight at 8 bits."""

SWEEP_BITS = Bits(3, 6)
"""Where learning rates are tried."""

_IMPORTANCE = ("w3a6", "w2a6", "w4a8", "w4a6", "w2a8", "w3a8", "w6a6", "w8a8")  # first where methods part
_MLP8_WIDTHS = ("w4a6", "w3a8", "w3a6")
_UNTRAINED_WIDTHS = ("w8a8", "w6a6")  # plain rounding is as good there: training would only take time
_HELD_OUT = 8  # one prompt in so many is kept from training


@dataclass(frozen=True)
class Training:
    """The budget of every recipe that trains."""

    steps: int
    batch: int
    learning_rates: tuple[float, ...]  # those tried; the best by held-out error is used

    @property
    def sweeps(self) -> bool:
        """Whether there is a learning rate to choose."""
        return self.steps > 0 and len(self.learning_rates) > 1

    def applied(self, recipe: Recipe, rate: float) -> Recipe:
        """The recipe with this budget and learning rate; that of the weight scales keeps its ratio to it."""
        block = recipe.distillation
        ratio = block.scale_learning_rate / block.learning_rate
        fields = {"batch": self.batch, "learning_rate": rate, "scale_learning_rate": rate * ratio}
        return recipes.override(recipe, distillation=fields)


@dataclass(frozen=True)
class Terms:
    """What is the same for every cell, whatever the model."""

    calibration: CalibrationPlan  # without a source: that is the model's
    trial: Trial  # the prompts of all seeds, one after the other
    seeds: int
    precision: str  # in which videos are sampled: fp32 or bf16
    training: Training

    @property
    def held_out(self) -> int:
        """How many calibration prompts, the last ones, neither statistics nor training see."""
        prompts = len(self.calibration.prompts)
        return max(1, prompts // _HELD_OUT) if prompts > 1 else 0

    def digest(self) -> str:
        """A digest of what cells that train and cells that do not have in common."""
        fields = described(self)
        del fields["training"]
        return _digest(fields)

    def budget_digest(self) -> str:
        """A digest of the training budget."""
        return _digest(dataclasses.asdict(self.training) if self.training.steps else 0)


@dataclass(frozen=True)
class Task:
    """One cell to measure; without a recipe it is the full-precision model."""

    model: SourceModel
    recipe: Recipe | None = None
    bits: Bits | None = None
    regime: str = UNIFORM

    @property
    def label(self) -> tuple[str, str, str, str]:
        """Model, recipe, bits and regime: the place in the table."""
        return self.model.name, self.recipe_name, FULL_BITS if self.bits is None else str(self.bits), self.regime

    @property
    def recipe_name(self) -> str:
        """The row's name."""
        return FULL if self.recipe is None else self.recipe.name

    @property
    def trains(self) -> bool:
        """Whether the budget matters to it."""
        return self.recipe is not None and trains(self.recipe)

    def key(self, terms: Terms) -> str:
        """A digest of everything that the cell depends on."""
        budget = terms.budget_digest() if self.trains else None
        return _digest([self.model.fingerprint, terms.digest(), _content(self.recipe), budget, self.label])

    def __str__(self) -> str:
        model, recipe, bits, regime = self.label
        return " ".join([model, recipe, bits] + [regime] * (regime != UNIFORM))


@dataclass(frozen=True)
class SweepRun:
    """One learning rate tried with one recipe on one model."""

    model: SourceModel
    recipe: Recipe
    rate: float

    def key(self, terms: Terms) -> str:
        """A digest of everything that the result depends on: no trial, for none is sampled."""
        plan = described(terms.calibration)
        budget = [terms.training.steps, terms.training.batch, self.rate, terms.precision]
        return _digest([self.model.fingerprint, plan, _content(self.recipe), budget, str(SWEEP_BITS)])

    def __str__(self) -> str:
        return f"{self.model.name} {self.recipe.name}, trying the learning rate {self.rate:g}"


def trains(recipe: Recipe) -> bool:
    """Whether a recipe distils at all."""
    return bool(recipe.distillation.steps)


def tasks(
    models: Sequence[SourceModel], chosen: Sequence[Recipe], widths: Sequence[Bits], regimes: Sequence[str]
) -> list[Task]:
    """All cells, the most important first; within a width models take turns, so that a cut-off leaves whole rows."""
    found = [Task(model) for model in models]
    for regime in sorted(regimes, key=REGIMES.index):
        for bits in sorted(widths, key=_importance):
            if regime == MLP8 and str(bits) not in _MLP8_WIDTHS:
                continue
            for recipe in chosen:
                if not (trains(recipe) and str(bits) in _UNTRAINED_WIDTHS):
                    found += [Task(model, recipe, bits, regime) for model in models]
    return found


def check_models(models: Sequence[SourceModel]) -> None:
    """Refuse models whose videos cannot be measured."""
    for model in models:
        if model.pipeline != WORLD_PIPELINE:
            raise QvditError(
                f"{model.path}, a {model.pipeline}",
                f"a {WORLD_PIPELINE}: only videos of the drawn world can be measured",
                "check --models",
            )


def check(models: Sequence[SourceModel], chosen: Sequence[Recipe], widths: Sequence[Bits], terms: Terms) -> None:
    """Refuse what cannot be compared, before anything is measured."""
    for names, option in (([m.name for m in models], "--models"), ([r.name for r in chosen], "--recipes")):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise QvditError(f"{option} with {twice!r} twice", "names that differ", f"check {option}")
    for recipe in chosen:
        if recipe.name == FULL:
            raise QvditError(f"a recipe named {FULL!r}", "another name: that is full precision's", "rename it")
        for bits in widths:
            quantization.check_bits(recipe, bits)
    if terms.training.sweeps and not terms.held_out and any(trains(recipe) for recipe in chosen):
        raise QvditError(
            "one calibration prompt and several learning rates",
            "a prompt to hold out",
            "raise --prompt-count, or give one --learning-rates",
        )


def layer_bits(regime: str, sites: Sequence[Site]) -> dict[str, int]:
    """A regime as a recipe's layer bits: pattern → weight bits."""
    if regime == UNIFORM:
        return {}
    return {glob.escape(site.name): 8 for site in sites if site.role == "mlp"}


def _importance(bits: Bits) -> tuple[int, int, int]:
    known = str(bits) in _IMPORTANCE
    return _IMPORTANCE.index(str(bits)) if known else len(_IMPORTANCE), bits.weight, bits.act


def _content(recipe: Recipe | None) -> dict[str, Any] | None:
    """What a recipe says; its layer bits give way to the regime's, and the training budget is the comparison's."""
    return None if recipe is None else _stated(dataclasses.replace(recipe, layer_bits={}, source=""))


def _stated(block: Any) -> dict[str, Any]:
    """A dataclass's fields where they differ from the defaults: what is new in recipes leaves old cells as they are."""
    stated = {}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if dataclasses.is_dataclass(value):
            value = _stated(value)
            if value:
                stated[field.name] = value
        elif value != (field.default if field.default_factory is dataclasses.MISSING else field.default_factory()):
            stated[field.name] = value
    return stated


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
