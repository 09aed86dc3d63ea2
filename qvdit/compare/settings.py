"""What a user may choose of a comparison, and the models, recipes and terms that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qvdit.compare import plan, sampling
from qvdit.compare.plan import Task, Terms, Training
from qvdit.compare.table import recipe_order
from qvdit.contract import Bits, QvditError
from qvdit.method import recipe as recipes
from qvdit.method.calibration import read_prompts
from qvdit.method.recipe import Recipe
from qvdit.models.loading import SHIPPED, SourceModel, find_model
from qvdit.quality import Trial
from qvdit.settings import JobSettings, calibration_plan, choose_compute, shipped_prompts

ALL = "all"
_TRIAL_SEED = 2026  # of the first seed's prompts and noise; calibration draws with other seeds
_BUDGET = {"cpu": 0, "cuda": 1000}  # distillation steps when the user does not say
_BATCH = {"cpu": 32, "cuda": 256}  # videos sampled at once when the user does not say


@dataclass(frozen=True)
class CompareSettings:
    """Everything a user may choose; lists are separated by commas. The defaults are the whole table."""

    models: str = ALL
    recipes: str = ALL
    bits: str = ",".join(plan.WIDTHS)
    regimes: str = ",".join(plan.REGIMES)
    videos: int = 256  # a seed
    seeds: int = 3
    prompt_count: int | None = None
    steps: int = 20
    records: int = 10
    guidance: float = 2.5
    compute: str = "auto"
    distillation_steps: int | None = None
    distillation_batch: int = 32
    learning_rates: str = "2e-4,5e-4,1e-3"
    batch: int | None = None
    simulate: bool = False

    @cached_property
    def chosen_device(self) -> str:
        """cpu or cuda."""
        return choose_compute(self.compute)

    @cached_property
    def chosen_models(self) -> list[SourceModel]:
        """The models, found and looked at."""
        names = list(SHIPPED) if self.models == ALL else split(self.models, "--models")
        return [find_model(name) for name in names]

    @cached_property
    def chosen_recipes(self) -> list[Recipe]:
        """The recipes; ``all`` of them are the shipped ones that work at every width, as the table lists them."""
        if self.recipes != ALL:
            return [recipes.load(name) for name in split(self.recipes, "--recipes")]
        shipped = [recipe for recipe in map(recipes.load, recipes.names()) if recipe.kind == "dynamic"]
        return sorted(shipped, key=lambda recipe: recipe_order(recipe.name))

    @property
    def chosen_bits(self) -> list[Bits]:
        """The widths."""
        return [Bits.parse(text) for text in split(self.bits, "--bits")]

    @property
    def chosen_regimes(self) -> list[str]:
        """The regimes."""
        regimes = split(self.regimes, "--regimes")
        wrong = next((name for name in regimes if name not in plan.REGIMES), None)
        if wrong is not None:
            raise QvditError(f"--regimes {wrong!r}", f"some of {', '.join(plan.REGIMES)}", "check --regimes")
        return regimes

    @property
    def sampling_batch(self) -> int:
        """Videos sampled at once."""
        return self.batch or _BATCH[self.chosen_device]

    @cached_property
    def training(self) -> Training:
        """The budget of recipes that train."""
        steps = _BUDGET[self.chosen_device] if self.distillation_steps is None else self.distillation_steps
        return Training(steps, self.distillation_batch, _rates(self.learning_rates))

    @cached_property
    def terms(self) -> Terms:
        """What is the same for every cell."""
        settings = JobSettings(
            prompt_count=self.prompt_count, steps=self.steps, records=self.records, guidance=self.guidance
        )
        calibration = calibration_plan(settings, self.chosen_models[0], self.chosen_device)
        known = read_prompts(shipped_prompts())
        trials = [
            Trial.fresh(self.videos, _TRIAL_SEED + seed, self.steps, self.guidance, known) for seed in range(self.seeds)
        ]
        return Terms(
            replace(calibration, source=""),
            Trial.pooled(trials),
            self.seeds,
            sampling.precision(self.chosen_device),
            self.training,
        )

    def tasks(self) -> list[Task]:
        """The cells to measure, checked."""
        plan.check_models(self.chosen_models)
        plan.check(self.chosen_models, self.chosen_recipes, self.chosen_bits, self.terms)
        return plan.tasks(self.chosen_models, self.chosen_recipes, self.chosen_bits, self.chosen_regimes)


def split(text: str, option: str) -> list[str]:
    """A list as the user writes it, ``a,b``: something, and nothing twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise QvditError(f"{option} {text!r}", "different values, separated by commas", f"check {option}")
    return names


def _rates(text: str) -> tuple[float, ...]:
    names = split(text, "--learning-rates")
    try:
        rates = tuple(float(name) for name in names)
    except ValueError:
        rates = ()
    if not rates or not all(1e-12 <= rate <= 1 for rate in rates) or len(set(rates)) < len(rates):
        raise QvditError(f"--learning-rates {text!r}", "different numbers in 1e-12 … 1", "check --learning-rates")
    return rates


def recipes_with_layer_bits(chosen: Sequence[Recipe]) -> list[str]:
    """Recipes whose own layer bits a comparison does not follow: the regime says what every layer has."""
    return [recipe.name for recipe in chosen if recipe.layer_bits]
