"""Several processes behind one display: which GPU each gets, and one outcome of them all."""

from __future__ import annotations

import os
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvdit.compare import job, sampling, workers
from qvdit.compare.fill import Outcome
from qvdit.compare.job import Places
from qvdit.compare.settings import CompareSettings


def test_what_one_leaves_another_may_have_done():
    first = Outcome(("a",), ("c", "d"), ("e: broken",), 1, ("b",))
    second = Outcome(("b", "c"), ("d",), (), 3, ("a",))
    found = workers.together([first, second], ["process 2 ended with status -9"], 3)
    assert found == Outcome(("a", "b", "c"), ("d",), ("e: broken", "process 2 ended with status -9"), 3)


def test_processes_take_turns_over_the_visible_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers._devices("cuda") == ["0", "1", "2"]
    assert workers._devices("cpu") == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1")
    assert workers._devices("cuda") == ["3", "GPU-1"]
    with workers._visible("GPU-1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-1"
    with workers._visible(None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-1"


def test_what_holds_for_all_processes_is_said_once():
    news: Any = queue.Queue()
    for worker in range(3):
        news.put((worker, workers._REMARK, "no kernels" if worker < 2 else "another GPU"))
        news.put((worker, workers._SAY, "wan rtn w3a6"))
        news.put((worker, workers._OUTCOME, Outcome((), (), (), 0)))
    told: list[str] = []
    watch: Any = SimpleNamespace(items=lambda *_: None, say=told.append)
    workers._listen([None] * 3, news, watch, lambda: (0, 1))
    cells = [f"[{worker}] wan rtn w3a6" for worker in range(3)]
    assert told == ["no kernels", *cells[:2], "another GPU", cells[2]]


def test_a_machine_without_kernels_is_remarked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(sampling, "kernels_missing", lambda: "not built")
    slower = "videos are sampled in PyTorch's simulation, several times slower: not built"
    assert job.remarks(CompareSettings(recipes="rtn", compute="cuda")) == [slower]
    assert job.remarks(CompareSettings(recipes="rtn", compute="cuda", simulate=True)) == []
    assert job.remarks(CompareSettings(recipes="rtn", compute="cpu")) == []


def test_a_process_that_dies_is_told(tmp_path: Path):
    """Its orders cannot be followed: the child raises, and the others' outcomes count."""
    told: list[str] = []
    watch: Any = SimpleNamespace(items=lambda *_: None, say=told.append)
    order = workers.Order(
        CompareSettings(models=str(tmp_path), compute="cpu"), Places(tmp_path), "qvdit compare", None, 1
    )
    with workers._started(order, 1, [None]) as (processes, news):
        outcomes, errors = workers._listen(processes, news, watch, lambda: (0, 1))
    assert outcomes == []
    (error,) = errors
    assert error.startswith("process 0: got")
    with workers._started(order, 1, [None]) as (processes, news):
        processes[0].kill()
        outcomes, errors = workers._listen(processes, news, watch, lambda: (0, 1))
    assert errors == ["process 0 ended with status -9"]
