"""How far a build is, from TensorRT's phases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qvdit.runtimes.tensorrt import versions
from qvdit.runtimes.tensorrt.progress import Phases, shown


class IProgressMonitor:
    """TensorRT's base."""

    def __init__(self) -> None:
        self.made = True


def test_steps_of_a_phase_are_part_of_its_parents_step() -> None:
    told: list[float] = []
    phases = Phases(told.append)
    phases.start("engine", None, 2)
    phases.start("tactics", "engine", 4)
    for step in range(4):
        phases.step("tactics", step)
    phases.finish("tactics")
    phases.step("engine", 0)
    phases.start("plan", "engine", 2)
    phases.step("plan", 0)
    phases.finish("plan")
    phases.step("engine", 1)
    phases.finish("engine")
    phases.step("unknown", 0)
    assert told == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]


def test_it_never_goes_back() -> None:
    told: list[float] = []
    phases = Phases(told.append)
    for root in ("first", "second"):
        phases.start(root, None, 2)
        phases.step(root, 0)
        phases.finish(root)
    assert told == [0.5]


def test_tensorrt_reports_from_10_on(capsys: pytest.CaptureFixture[str]) -> None:
    trt = SimpleNamespace(IProgressMonitor=IProgressMonitor)
    config = SimpleNamespace(progress_monitor=None)
    with shown() as (say, report):
        say("building")
        made: Any = versions.watch(trt, config, report)
        assert config.progress_monitor is made
        assert made.made
        made.phase_start("engine", None, 4)
        assert [made.step_complete("engine", step) for step in range(4)] == [True] * 4
        made.phase_finish("engine")
    assert capsys.readouterr().out.splitlines() == ["building", *(f"building: {part} %" for part in (20, 50, 70, 100))]
    assert versions.watch(trt, object(), report) is None  # 8.6's
