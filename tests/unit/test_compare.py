"""Filling a comparison's table with a bench that measures nothing: cells, keys, order, resuming, learning rates."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qvdit.compare import plan, sampling
from qvdit.compare.bench import Bench, Quantized
from qvdit.compare.fill import Estimates, Filling, Outcome
from qvdit.compare.plan import SweepRun, Task, Terms, Training
from qvdit.compare.settings import CompareSettings
from qvdit.compare.store import Store
from qvdit.contract import Bits, FrameRows, LowBitLayer, QvditError
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationPlan, no_progress, read_prompts
from qvdit.method.recipe import Recipe
from qvdit.models import WanAdapter
from qvdit.models.loading import WORLD_PIPELINE, SourceModel
from qvdit.quality import Trial, means_and_errors, measurements, sample_trial
from qvdit.reference import measure, world
from qvdit.settings import shipped_prompts

RTN, OURS = recipes.load("rtn"), recipes.load("qvdit")
RATES = (2e-4, 5e-4, 1e-3)
W3A6, W2A6 = Bits(3, 6), Bits(2, 6)


def model(name: str = "tiny", fingerprint: str = "f", pipeline: str = WORLD_PIPELINE) -> SourceModel:
    return SourceModel(name, Path(name), WanAdapter(), {}, fingerprint, pipeline, "s")


def terms(**changes: Any) -> Terms:
    fields: dict[str, Any] = {
        "calibration": CalibrationPlan(tuple(f"prompt {i}" for i in range(16)), steps=4, records=2),
        "trial": Trial.pooled([Trial.fresh(3, seed, 4, 2.5) for seed in (1, 2)]),
        "seeds": 2,
        "precision": "fp32",
        "training": Training(5, 4, RATES),
    }
    return Terms(**{**fields, **changes})


def layer(name: str = "blocks.0.ffn.net.0.proj") -> LowBitLayer:
    generator = torch.Generator().manual_seed(0)
    return LowBitLayer(
        name=name,
        weight_bits=3,
        act_bits=6,
        act_symmetric=True,
        rows=FrameRows.NONE,
        weight_q=torch.randint(-3, 4, (8, 8), generator=generator, dtype=torch.int8).numpy(),
        weight_scale=torch.full((8,), 0.1).numpy(),
    )


class FakeBench:
    """Counts what it is asked for; the error of a learning rate is its distance from ``best``."""

    def __init__(self, source: SourceModel, settled: Terms, best: float = 5e-4):
        self.model, self.terms, self.best = source, settled, best
        self.asked: list[tuple[Any, ...]] = []
        self.stored: dict[str, Any] = {}
        self.rate: float | None = None
        self.device = "cpu"
        self.sites = [
            SimpleNamespace(name="blocks.0.ffn.net.2", role="mlp"),
            SimpleNamespace(name="blocks.0.attn1.to_q", role="self_attention"),
        ]

    @property
    def reference(self) -> torch.Tensor:
        scenes = world.SceneBatch.from_scenes([world.parse_prompt(p) for p in self.terms.trial.prompts])
        return world.render(scenes, world.paths(scenes, torch.Generator().manual_seed(0)))

    def quantize(self, recipe: Recipe, bits: Bits, steps: int) -> Quantized:
        self.asked.append((recipe, bits, steps))
        self.rate = recipe.distillation.learning_rate
        if self.rate > 0.5:
            raise QvditError("NaN", "training that converges", "lower it")
        return Quantized((layer(),), 2.0, None)

    def held_out_error(self, _: Sequence[Any]) -> float:
        assert self.rate is not None
        return abs(self.rate - self.best)

    def computed_by(self, _: Sequence[Any]) -> str:
        return sampling.SIMULATION

    def sample(self, _: Sequence[Any]) -> torch.Tensor:
        videos = self.reference
        return videos + 0.05 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(3))

    def measure(self, videos: torch.Tensor, reference: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return Bench.measure(cast(Bench, self), videos, reference)

    def keep(self, name: str, layers: Any, *_: Any) -> None:
        self.stored[name] = layers

    def kept(self, name: str) -> Any:
        return self.stored.get(name)


@dataclass
class Desk:
    """A comparison in a folder: fill it again and again."""

    folder: Path
    settled: Terms
    benches: dict[str, FakeBench] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    clock: Callable[[], float] = lambda: 0.0

    @property
    def store(self) -> Store:
        return Store(self.folder, self.said.append)

    def bench(self, source: SourceModel) -> Any:
        return self.benches.setdefault(source.name, FakeBench(source, self.settled))

    def fill(self, tasks: Sequence[Task], minutes: float | None = None) -> Outcome:
        watch = SimpleNamespace(items=lambda *_: None, stage=lambda *_: None, say=lambda _: None)
        origin = {"device": "here", "command": "c", "versions": {}}
        return Filling(self.settled, self.store, self.bench, watch, origin, self.clock).run(tasks, minutes)

    def cell(self, task: Task) -> dict[str, Any]:
        found = self.store.read(task, self.settled)
        assert found is not None
        return found


@pytest.fixture
def desk(tmp_path: Path, one_thread: None) -> Desk:
    return Desk(tmp_path / "cells", terms())


def texts(tasks: Sequence[Task]) -> list[str]:
    return [" ".join(task.label[1:]) for task in tasks]


# Several processes ----------------------------------------------------------------------------------------------------


def test_a_cell_that_another_process_has_is_left_to_it(desk):
    tasks = [Task(model(), RTN, Bits.parse(text)) for text in ("w3a6", "w2a6")]
    with desk.store.claimed(tasks[0], desk.settled) as other:
        assert other
        outcome = desk.fill(tasks)
    assert (outcome.elsewhere, outcome.computed) == ((str(tasks[0]),), (str(tasks[1]),))
    outcome = desk.fill(tasks)  # the other one died without a result
    assert (outcome.elsewhere, outcome.computed, outcome.measured) == ((), (str(tasks[0]),), 2)


def test_a_cell_that_another_process_finished_is_not_measured_again(desk):
    task = Task(model(), RTN, Bits.parse("w3a6"))
    desk.fill([task])
    with desk.store.claimed(task, desk.settled) as mine:
        assert not mine


def test_a_cell_waits_for_the_learning_rates_that_another_process_tries(desk):
    task = Task(model(), OURS, Bits.parse("w2a6"))
    [first, *_] = [plan.SweepRun(task.model, OURS, rate) for rate in desk.settled.training.learning_rates]
    claimed = threading.Event()

    def try_it() -> None:
        record = {"model": "m", "recipe": "qvdit", "learning_rate": first.rate, "held_out_error": 0.0, "seconds": 1.0}
        with desk.store.claimed(first, desk.settled):
            claimed.set()
            time.sleep(0.5)
            desk.store.write(first, desk.settled, record)

    other = threading.Thread(target=try_it)
    other.start()
    claimed.wait()
    outcome = desk.fill([task])
    other.join()
    assert outcome.elsewhere == (str(first),)
    assert desk.cell(task)["learning_rate"] == first.rate


# Which cells, in which order ------------------------------------------------------------------------------------------


def test_the_most_telling_cells_come_first_and_models_take_turns():
    widths = [Bits.parse(text) for text in plan.WIDTHS]
    found = plan.tasks([model("a"), model("b")], [RTN, OURS], widths, ["mlp8", "uniform"])
    assert [str(task) for task in found[:6]] == [
        "a fp fp32",
        "b fp fp32",
        "a rtn w3a6",
        "b rtn w3a6",
        "a qvdit w3a6",
        "b qvdit w3a6",
    ]
    of_rtn = [task for task in found if task.recipe is RTN and task.model.name == "a"]
    assert texts(of_rtn) == [
        *(f"rtn {w} uniform" for w in ("w3a6", "w2a6", "w4a8", "w4a6", "w2a8", "w3a8", "w6a6", "w8a8")),
        *(f"rtn {w} mlp8" for w in ("w3a6", "w4a6", "w3a8")),
    ]


def test_recipes_that_train_skip_wide_weights():
    widths = [Bits.parse(text) for text in ("w8a8", "w6a6", "w4a8")]
    assert texts(plan.tasks([model()], [RTN, OURS], widths, ["uniform"])) == [
        "fp fp32 uniform",
        "rtn w4a8 uniform",
        "qvdit w4a8 uniform",
        "rtn w6a6 uniform",
        "rtn w8a8 uniform",
    ]


def test_layer_bits_of_the_regimes(wan_model: Any):
    sites = WanAdapter().sites(wan_model)
    assert plan.layer_bits("uniform", sites) == {}
    found = plan.layer_bits("mlp8", sites)
    assert len(found) == 4
    recipe = dataclasses.replace(RTN, layer_bits=found)
    for site in sites:
        assert recipe.weight_bits(site.name, 3) == (8 if ".ffn." in site.name else 3)


def test_a_regime_reaches_the_quantizer(desk: Desk):
    own = dataclasses.replace(RTN, name="own", layer_bits={"*": 4})
    desk.fill([Task(model(), own, W3A6, "uniform"), Task(model(), own, W3A6, "mlp8")])
    asked = [recipe.layer_bits for recipe, _, _ in desk.benches["tiny"].asked]
    assert asked == [{}, {"blocks.0.ffn.net.2": 8}]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(QvditError, match="only videos of the drawn world"):
        plan.check_models([model(pipeline="WanPipeline")])
    with pytest.raises(QvditError, match="twice"):
        plan.check([model(), model(fingerprint="g")], [RTN], [W3A6], terms())
    with pytest.raises(QvditError, match="w8a8"):
        plan.check([model()], [recipes.load("int8-static")], [W3A6], terms())
    with pytest.raises(QvditError, match="a prompt to hold out"):
        plan.check([model()], [OURS], [W3A6], terms(calibration=CalibrationPlan(("one",))))
    with pytest.raises(QvditError, match="another name"):
        plan.check([model()], [dataclasses.replace(RTN, name="fp")], [W3A6], terms())


@pytest.mark.parametrize(("prompts", "held_out"), [(1, 0), (2, 1), (8, 1), (16, 2), (48, 6)])
def test_an_eighth_of_the_prompts_is_held_out(prompts: int, held_out: int):
    assert terms(calibration=CalibrationPlan(tuple(map(str, range(prompts))))).held_out == held_out


# Keys -----------------------------------------------------------------------------------------------------------------


def test_a_key_depends_on_every_ingredient():
    task, settled = Task(model(), OURS, W3A6), terms()
    calibration, trial, training = settled.calibration, settled.trial, settled.training
    others = [
        task.key(terms(calibration=dataclasses.replace(calibration, steps=5))),
        task.key(terms(calibration=dataclasses.replace(calibration, prompts=calibration.prompts[1:]))),
        task.key(terms(trial=dataclasses.replace(trial, seeds=(*trial.seeds[:-1], 7)))),
        task.key(terms(trial=dataclasses.replace(trial, guidance=1.0))),
        task.key(terms(seeds=3)),
        task.key(terms(precision="bf16")),
        task.key(terms(training=dataclasses.replace(training, steps=6))),
        task.key(terms(training=dataclasses.replace(training, batch=5))),
        task.key(terms(training=dataclasses.replace(training, learning_rates=(1e-4,)))),
        Task(model(fingerprint="g"), OURS, W3A6).key(settled),
        Task(model("other"), OURS, W3A6).key(settled),
        Task(model(), recipes.override(OURS, tqe={"rank": 2}), W3A6).key(settled),
        Task(model(), OURS, W2A6).key(settled),
        Task(model(), OURS, W3A6, "mlp8").key(settled),
        Task(model()).key(settled),
    ]
    assert len({task.key(settled), *others}) == 1 + len(others)
    assert Task(model(), recipes.load("qvdit"), Bits(3, 6)).key(terms()) == task.key(settled)


def test_a_key_depends_on_nothing_else():
    settled = terms()
    # What is compared besides, and in which order, is no matter.
    models, widths = [model("a"), model("b")], [W3A6, W2A6]
    one = {str(t): t.key(settled) for t in plan.tasks(models, [RTN, OURS], widths, plan.REGIMES)}
    other = {str(t): t.key(settled) for t in plan.tasks(models[::-1], [OURS, RTN], widths[::-1], plan.REGIMES[::-1])}
    assert one == other
    # A recipe that does not train has no budget, and its layer bits are the regime's.
    untrained = Task(model(), RTN, W3A6)
    assert untrained.key(settled) == untrained.key(terms(training=Training(9, 9, (1e-5,))))
    assert Task(model(), dataclasses.replace(RTN, layer_bits={"*": 8}), W3A6).key(settled) == untrained.key(settled)


def test_a_sweep_does_not_depend_on_the_trial():
    run = SweepRun(model(), OURS, 1e-3)
    assert run.key(terms()) == run.key(terms(seeds=9, trial=Trial.fresh(2, 8, 4, 2.5)))
    assert run.key(terms()) != SweepRun(model(), OURS, 2e-3).key(terms())
    assert run.key(terms()) != run.key(terms(training=Training(6, 4, RATES)))
    # nor on which other rates are tried
    assert run.key(terms()) == run.key(terms(training=Training(5, 4, (1e-3, 2e-3))))


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks() -> list[Task]:
    return plan.tasks([model()], [RTN], [W3A6, W2A6], ["uniform"])


def test_a_second_run_computes_nothing(desk: Desk, tasks: list[Task]):
    first = desk.fill(tasks)
    assert (len(first.computed), first.left, first.failed, first.measured) == (3, (), (), 3)
    desk.benches.clear()
    again = desk.fill(tasks)
    assert (again.computed, again.measured) == ((), 3)
    assert not desk.benches  # no model was even loaded
    assert not desk.said


def test_a_deleted_cell_alone_is_measured_again(desk: Desk, tasks: list[Task]):
    desk.fill(tasks)
    before = {path.name: path.read_bytes() for path in desk.folder.iterdir()}
    next(desk.folder.glob("cell-tiny-rtn-w2a6-*")).unlink()
    assert desk.fill(tasks).computed == ("tiny rtn w2a6",)
    assert {path.name for path in desk.folder.iterdir()} == set(before)


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda _: "{}", lambda _: "[]", lambda _: ""])
def test_a_damaged_cell_is_measured_again_and_said(desk: Desk, tasks: list[Task], damage: Callable[[str], str]):
    desk.fill(tasks)
    path = next(desk.folder.glob("cell-tiny-rtn-w3a6-*"))
    path.write_text(damage(path.read_text()))
    assert desk.fill(tasks).computed == ("tiny rtn w3a6",)
    assert len(desk.said) == 1
    assert path.name in desk.said[0]
    assert "measured again" in desk.said[0]
    assert json.loads(path.read_text())["recipe"] == "rtn"


def test_the_time_is_up(desk: Desk, tasks: list[Task]):
    now = iter(range(0, 10_000, 40))  # every look at the clock is 40 s later than the last
    desk.clock = lambda: float(next(now))
    stopped = desk.fill(tasks, minutes=1.5)
    assert (stopped.computed, stopped.left) == (("tiny fp fp32", "tiny rtn w3a6"), ("tiny rtn w2a6",))
    assert stopped.measured == 2
    desk.clock = lambda: 0.0
    assert desk.fill(tasks, minutes=1.5).computed == ("tiny rtn w2a6",)


def test_a_cell_that_would_take_too_long_is_not_started(desk: Desk, tasks: list[Task]):
    desk.fill(tasks[:2])
    path = next(desk.folder.glob("cell-tiny-rtn-*"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 50.0, "sampling_seconds": 20.0}))
    assert desk.fill(tasks, minutes=1).left == ("tiny rtn w2a6",)  # it would take 70 s
    assert desk.fill(tasks, minutes=2).left == ()


def test_estimates_are_of_what_is_most_alike():
    known = Estimates("here", terms())
    assert known.seconds(Task(model(), RTN, W3A6)) is None
    known.add({"device": "there", "model": "tiny", "recipe": "rtn", "seconds": 1e6, "sampling_seconds": 1e6})
    assert known.seconds(Task(model(), RTN, W3A6)) is None
    known.add({"device": "here", "model": "tiny", "recipe": "rtn", "seconds": 3.0, "sampling_seconds": 10.0})
    assert known.seconds(Task(model(), RTN, W3A6)) == 13.0
    assert known.seconds(Task(model("other"), dataclasses.replace(RTN, name="x"), W3A6)) == 13.0
    known.add({"device": "here", "model": "tiny", "recipe": "qvdit", "seconds": 100.0, "held_out_error": 0.1})
    assert known.seconds(SweepRun(model(), OURS, 1e-3)) == 100.0
    assert known.seconds(Task(model(), OURS, W3A6)) == 110.0
    assert known.total([Task(model(), OURS, W3A6), Task(model())]) == 120.0


def test_a_cell_that_fails_does_not_stop_the_others(desk: Desk):
    desk.settled = terms(training=Training(5, 4, (0.9,)))  # diverges
    found = desk.fill(plan.tasks([model()], [OURS, RTN], [W3A6], ["uniform"]))
    assert found.computed == ("tiny fp fp32", "tiny rtn w3a6")
    assert len(found.failed) == 1
    assert "converges" in found.failed[0]


# Learning rates -------------------------------------------------------------------------------------------------------


def test_the_sweep_chooses_the_lowest_error_and_its_model_is_used(desk: Desk):
    tasks = plan.tasks([model()], [OURS], [W3A6, W2A6], ["uniform", "mlp8"])
    found = desk.fill(tasks)
    assert [text.split(", ")[-1] for text in found.computed[1:4]] == [
        f"trying the learning rate {rate:g}" for rate in RATES
    ]
    asked = desk.benches["tiny"].asked
    # three rates at w3a6, whose best is that cell's model; then w2a6 and mlp8 with the chosen rate
    assert [(str(bits), recipe.distillation.learning_rate, steps) for recipe, bits, steps in asked] == [
        *(("w3a6", rate, 5) for rate in RATES),
        ("w2a6", 5e-4, 5),
        ("w3a6", 5e-4, 5),
    ]
    assert all(recipe.distillation.batch == 4 for recipe, _, _ in asked)
    ratio = OURS.distillation.scale_learning_rate / OURS.distillation.learning_rate
    assert all(
        r.distillation.scale_learning_rate / r.distillation.learning_rate == pytest.approx(ratio) for r, *_ in asked
    )
    for task in tasks[1:]:
        cell = desk.cell(task)
        assert (cell["learning_rate"], cell["distillation_steps"], cell["seconds"]) == (5e-4, 5, 2.0)
        assert cell["held_out_errors"] == {"0.0002": pytest.approx(3e-4), "0.0005": 0.0, "0.001": pytest.approx(5e-4)}


def test_a_sweep_goes_on(desk: Desk):
    tasks = plan.tasks([model()], [OURS], [W3A6], ["uniform"])
    desk.fill(tasks)
    next(desk.folder.glob("cell-tiny-qvdit-*")).unlink()
    next(desk.folder.glob("sweep-tiny-qvdit-0.0002-*")).unlink()
    desk.benches["tiny"].asked.clear()
    assert len(desk.fill(tasks).computed) == 2
    assert [recipe.distillation.learning_rate for recipe, *_ in desk.benches["tiny"].asked] == [2e-4]


def test_a_sweep_without_its_models_trains_the_chosen_one_again(desk: Desk):
    tasks = plan.tasks([model()], [OURS], [W3A6], ["uniform"])
    desk.fill(tasks)
    next(desk.folder.glob("cell-tiny-qvdit-*")).unlink()
    desk.benches.clear()  # another machine: the small files have come, the heavy ones have not
    desk.fill(tasks)
    assert [recipe.distillation.learning_rate for recipe, *_ in desk.benches["tiny"].asked] == [5e-4]


def test_a_rate_that_diverges_is_a_result(desk: Desk):
    desk.settled = terms(training=Training(5, 4, (1e-3, 0.9)))
    task = Task(model(), OURS, W3A6)
    desk.fill([task])
    assert desk.cell(task)["learning_rate"] == 1e-3
    assert desk.cell(task)["held_out_errors"]["0.9"] is None
    assert desk.fill([task]).computed == ()


def test_nothing_is_swept_without_a_budget_or_a_choice(desk: Desk):
    task = Task(model(), OURS, W3A6)
    desk.settled = terms(training=Training(0, 4, RATES))
    assert desk.fill([task]).computed == ("tiny qvdit w3a6",)
    assert desk.cell(task)["learning_rate"] is None
    assert desk.benches["tiny"].asked[-1][2] == 0
    desk.settled = terms(training=Training(5, 4, (3e-4,)))
    assert desk.fill([task]).computed == ("tiny qvdit w3a6",)
    assert desk.cell(task)["learning_rate"] == 3e-4


# What a cell says -----------------------------------------------------------------------------------------------------


def test_seeds_are_pooled(desk: Desk):
    full, task = Task(model()), Task(model(), RTN, W3A6)
    desk.fill([full, task])
    bench, trial = desk.benches["tiny"], desk.settled.trial
    assert len(trial.prompts) == 6
    videos = bench.sample(())
    direct = {**measurements(videos, trial), "psnr_db": measure.psnr(videos, bench.reference)}
    for name, value in desk.cell(task)["metrics"].items():
        assert value["mean"] == pytest.approx(direct[name].mean().item())
        assert value["sem"] == pytest.approx((direct[name].std() / 6**0.5).item())
    assert set(desk.cell(task)["metrics"]) == {*measure.METRICS, "psnr_db"}
    assert set(desk.cell(full)["metrics"]) == set(measure.METRICS)
    assert (desk.cell(task)["videos"], desk.cell(task)["seeds"]) == (6, 2)
    assert means_and_errors({"x": torch.tensor([1.0, 3.0])})["x"] == {"mean": 2.0, "sem": pytest.approx(1.0)}


def test_pooled_trials_keep_each_prompts_noise():
    one, two = Trial.fresh(2, 1, 4, 2.5), Trial.fresh(2, 2, 4, 2.5)
    assert Trial.pooled([one, two]) == Trial(one.prompts + two.prompts, one.seeds + two.seeds, 4, 2.5)


# Settings -------------------------------------------------------------------------------------------------------------


def test_all_recipes_but_the_static_one_in_the_tables_order():
    names = [recipe.name for recipe in CompareSettings(compute="cpu").chosen_recipes]
    assert set(names) == set(recipes.names()) - {"int8-static"}
    assert (names[0], names[-1]) == ("rtn", "qvdit")


def test_fresh_prompts_are_no_calibration_prompts():
    settings = CompareSettings(models="wan-shapes", compute="cpu", videos=8, seeds=3, prompt_count=4)
    found = settings.terms
    assert len(found.trial.prompts) == len(set(found.trial.seeds)) == 24
    assert not set(found.trial.prompts) & set(read_prompts(shipped_prompts()))
    assert not set(found.trial.seeds) & set(range(1000))
    assert found.calibration.source == ""


def test_defaults_follow_the_device(monkeypatch: pytest.MonkeyPatch):
    assert (CompareSettings(compute="cpu").training.steps, CompareSettings(compute="cpu").sampling_batch) == (0, 32)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = CompareSettings(compute="cuda")
    assert (on_gpu.training.steps, on_gpu.sampling_batch) == (1000, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ""}, "--recipes"),
        ({"recipes": "rtn,rtn"}, "--recipes"),
        ({"bits": "w5a8"}, "bits 'w5a8'"),
        ({"regimes": "mixed"}, "--regimes"),
        ({"learning_rates": "much"}, "--learning-rates"),
        ({"learning_rates": "0"}, "--learning-rates"),
        ({"learning_rates": "1e-3,0.001"}, "--learning-rates"),
        ({"models": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str):
    with pytest.raises(QvditError, match=message):
        CompareSettings(**{"models": "wan-shapes", "compute": "cpu", "videos": 2, **changes}).tasks()


# Sampling -------------------------------------------------------------------------------------------------------------


def test_quantized_layers_run_without_autocast(tiny_wan: Any, rtn_layers: Any):
    layers = rtn_layers(tiny_wan, world.FRAMES, bits=4)
    model_ = sampling.quantized_transformer(tiny_wan, layers, WanAdapter())
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    wrapped = model_.get_submodule(layers[0].name)
    expected = wrapped(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wrapped(x), expected)
        assert not torch.equal(wrapped.layer(x), expected)  # what would happen without
        low = wrapped(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert isinstance(tiny_wan.get_submodule(layers[0].name), torch.nn.Linear)


@pytest.fixture
def kernels_found(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """``kernels_found(reason)``: why there are none, or None where there are."""

    def answer(missing: str | None) -> None:
        monkeypatch.setattr(sampling, "kernels_missing", lambda: missing)

    return answer


def test_the_kernels_sample_what_they_serve(kernels_found: Callable[[str | None], None]):
    kernels_found(None)
    grouped = dataclasses.replace(layer(), weight_scale=torch.full((8, 2), 0.1).numpy())
    assert sampling.computed_by((layer(), layer()), "cuda") == sampling.KERNELS
    assert sampling.computed_by((layer(), grouped), "cuda") == sampling.SIMULATION
    assert sampling.computed_by((layer(),), "cpu") == sampling.SIMULATION
    kernels_found("not built")
    assert sampling.computed_by((layer(),), "cuda") == sampling.SIMULATION


def test_a_bench_can_be_told_to_simulate(kernels_found: Callable[[str | None], None], tmp_path: Path):
    kernels_found(None)
    benches = [Bench(model(), terms(), "cuda", 2, tmp_path, lambda *_: None, simulate) for simulate in (False, True)]
    assert [bench.computed_by((layer(),)) for bench in benches] == [sampling.KERNELS, sampling.SIMULATION]


def test_a_model_on_kernels_is_a_copy(tiny_wan: Any, rtn_layers: Any):
    from qvdit.runtimes.torch_linear import KernelLinear

    layers = rtn_layers(tiny_wan, world.FRAMES, bits=4)
    found = sampling.quantized_transformer(tiny_wan, layers, WanAdapter(), sampling.KERNELS)
    names = {name for module in found.modules() if isinstance(module, KernelLinear) for name in module.names}
    assert names == {one.name for one in layers}
    assert isinstance(tiny_wan.get_submodule(layers[0].name), torch.nn.Linear)


def test_sampling_counts_forward_passes(tiny_pipeline: Any):
    trial, seen = Trial.fresh(3, 1, 2, 2.5), []
    videos = sampling.sample(tiny_pipeline, trial, 2, "cpu", lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(5)]
    assert torch.equal(videos, sample_trial(tiny_pipeline, trial, 2, no_progress))
    assert not tiny_pipeline.transformer._forward_pre_hooks


def test_quantized_models_sample_in_bf16(tiny_pipeline: Any, rtn_layers: Any, monkeypatch: pytest.MonkeyPatch):
    full, trial = tiny_pipeline.transformer, Trial.fresh(2, 1, 2, 2.5)
    layers = rtn_layers(full, world.FRAMES, bits=8)
    found = {}
    for precision in ("fp32", "bf16"):
        enabled = precision == "bf16"
        monkeypatch.setattr(
            sampling, "arithmetic", lambda _, enabled=enabled: torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        )
        for name in ("full", "quantized"):
            tiny_pipeline.transformer = (
                full if name == "full" else sampling.quantized_transformer(full, layers, WanAdapter())
            )
            found[precision, name] = sampling.sample(tiny_pipeline, trial, 2, "cpu", no_progress)
    assert all(videos.dtype == torch.float32 and videos.isfinite().all() for videos in found.values())
    for name in ("full", "quantized"):
        assert not torch.equal(found["bf16", name], found["fp32", name])
        assert measure.psnr(found["bf16", name], found["fp32", name]).min() > 35


def test_the_published_cells_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch):
    """Else the command that goes on with them would measure them again."""
    monkeypatch.setattr(CompareSettings, "chosen_device", "cuda")
    said: list[str] = []
    store = Store(Path(__file__).parents[1] / "benchmarks" / "results" / "cells", said.append)
    published = store.cells()
    found = 0
    for name in ("wan-shapes", "latte-shapes"):
        settings = CompareSettings(models=name, distillation_steps=400)
        cells = [store.read(task, settings.terms) for task in settings.tasks()]
        assert all(cell is None or cell["model"] == name for cell in cells)
        found += sum(cell is not None for cell in cells)
    assert found == len(published) > 30
    assert not said


def test_a_new_field_of_recipes_changes_no_cell():
    content = plan._content(RTN)
    assert content == {"name": "rtn", "source": ""}
    assert plan._content(dataclasses.replace(RTN, rotation_below=9)) == content
    assert plan._content(dataclasses.replace(RTN, rotation_below=4)) != content
    assert plan._content(recipes.override(RTN, weights={"group": 8}))["weights"] == {"group": 8}


def test_the_committed_cells_stay_valid(monkeypatch: pytest.MonkeyPatch):
    """They keep their keys whatever is added to recipes, and so does a command with the steps they were trained for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "cells"
    committed = {cell["key"]: cell for cell in (json.loads(path.read_text()) for path in folder.glob("cell-*.json"))}
    trained = {key for key, cell in committed.items() if cell["distillation_steps"]}
    assert trained < set(committed)
    for steps, expected in ((400, set(committed)), (1000, set(committed) - trained)):
        settled = CompareSettings(compute="cuda", distillation_steps=steps)
        assert {task.key(settled.terms) for task in settled.tasks()} & set(committed) == expected
