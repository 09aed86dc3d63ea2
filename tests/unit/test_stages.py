"""Stages: done once, done again when what they depend on or what they wrote has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qvdit.stages
from qvdit.stages import StageCost, Stages


class Work:
    """A stage's work: writes a file and counts how often."""

    def __init__(self, path: Path, text: str = "content"):
        self.path, self.text, self.times = path, text, 0

    def __call__(self) -> None:
        self.times += 1
        self.path.write_text(self.text)

    def files(self) -> list[Path]:
        return [self.path]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "result.txt")


def run(root: Path, work: Work, depends: Any = "same") -> Stages:
    """Run one stage as a new process would."""
    stages = Stages(root / "stages", root)
    stages.run("stage", depends, work.files, work)
    return stages


def test_done_once(tmp_path: Path, work: Work) -> None:
    first, second = Stages(tmp_path / "stages", tmp_path), Stages(tmp_path / "stages", tmp_path)
    assert first.run("stage", {"a": 1}, work.files, work) is True
    assert second.run("stage", {"a": 1}, work.files, work) is False
    assert work.times == 1
    assert first.result("stage") == second.result("stage")
    assert (first.costs["stage"].reused, second.costs["stage"].reused) == (False, True)


@pytest.mark.parametrize("change", [{"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {}, {"a": "1"}, [1], None], ids=str)
def test_again_when_a_dependency_changes(change: Any, tmp_path: Path, work: Work) -> None:
    run(tmp_path, work, {"a": 1})
    run(tmp_path, work, change)
    assert work.times == 2
    run(tmp_path, work, change)
    assert work.times == 2


def test_order_of_keys_is_no_change(tmp_path: Path, work: Work) -> None:
    run(tmp_path, work, {"a": 1, "b": 2})
    run(tmp_path, work, {"b": 2, "a": 1})
    assert work.times == 1


def test_again_when_a_tool_changes(tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, work)
    monkeypatch.setattr(qvdit.stages, "tool_versions", lambda: {"torch": "0.1"})
    run(tmp_path, work)
    assert work.times == 2


def test_again_when_a_file_changes(tmp_path: Path, work: Work) -> None:
    run(tmp_path, work)
    work.path.write_text("another")
    run(tmp_path, work)
    assert (work.times, work.path.read_text()) == (2, "content")


def test_again_when_a_file_is_gone(tmp_path: Path, work: Work) -> None:
    run(tmp_path, work)
    work.path.unlink()
    run(tmp_path, work)
    assert (work.times, work.path.read_text()) == (2, "content")


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"{}", b"[]", b"null", b'{"key": 1}'], ids=str)
def test_again_when_the_marker_is_damaged(damage: bytes, tmp_path: Path, work: Work) -> None:
    run(tmp_path, work)
    (tmp_path / "stages" / "stage.json").write_bytes(damage)
    run(tmp_path, work)
    assert work.times == 2


def test_again_after_failure(tmp_path: Path, work: Work) -> None:
    """Work that ends in the middle leaves no marker, not even that of an earlier, whole run."""
    run(tmp_path, work)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path / "stages", tmp_path).run("stage", "other", work.files, fail)
    run(tmp_path, work)
    assert work.times == 2


def test_later_stages_depend_on_what_was_written(tmp_path: Path) -> None:
    """A stage that runs again but writes the same bytes does not disturb those after it."""
    first, second = Work(tmp_path / "first.txt"), Work(tmp_path / "second.txt")

    def run_both(depends: str) -> None:
        stages = Stages(tmp_path / "stages", tmp_path)
        stages.run("first", depends, first.files, first)
        stages.run("second", stages.result("first"), second.files, second)

    run_both("a")
    run_both("b")
    assert (first.times, second.times) == (2, 1)
    first.text = "new"
    run_both("c")
    assert (first.times, second.times) == (3, 2)
    run_both("c")
    assert (first.times, second.times) == (3, 2)


def test_stages_of_other_names_are_others(tmp_path: Path, work: Work) -> None:
    stages = Stages(tmp_path / "stages", tmp_path)
    stages.run("one", "same", work.files, work)
    stages.run("two", "same", work.files, work)
    assert work.times == 2


def test_folder_may_move(tmp_path: Path) -> None:
    work = Work(tmp_path / "before" / "result.txt")
    work.path.parent.mkdir()
    run(tmp_path / "before", work)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = Work(tmp_path / "after" / "result.txt")
    run(tmp_path / "after", moved)
    assert moved.times == 0


def test_cost_is_recorded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.345, 99.0, 99.0])
    monkeypatch.setattr(qvdit.stages.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(qvdit.stages, "peak_memory", lambda: 123_456_789)
    work = Work(tmp_path / "result.txt")
    assert run(tmp_path, work).costs == {"stage": StageCost(2.35, 123_456_789, False)}
    marker = json.loads((tmp_path / "stages" / "stage.json").read_text())
    assert (marker["seconds"], marker["peak_memory_bytes"]) == (2.35, 123_456_789)
    assert run(tmp_path, work).costs == {"stage": StageCost(2.35, 123_456_789, True)}


def test_peak_memory_counts_what_a_stage_took(tmp_path: Path) -> None:
    size = 200 << 20

    def work() -> None:
        np.ones(size, np.uint8).sum()
        (tmp_path / "result.txt").touch()

    before = qvdit.stages.peak_memory()
    stages = Stages(tmp_path / "stages", tmp_path)
    stages.run("large", None, lambda: [tmp_path / "result.txt"], work)
    assert before * 0.2 + size * 0.9 < stages.costs["large"].peak_memory_bytes < before + size * 1.5
