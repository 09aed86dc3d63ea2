"""Benchmarks of the method run on a tiny random pipeline: what they need of the project is still there."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvdit.bench import results as kernel_results
from qvdit.bench.tensorrt import results as tensorrt_results

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("names", "load"), [("tensorrt-h?00.json", tensorrt_results.load), ("kernels-h?00.json", kernel_results.load)]
)
def test_committed_results_are_the_tools(names: str, load: Callable[[Path], Any]):
    paths = sorted((FOLDER / "results").glob(names))
    assert len(paths) == 2
    for path in paths:
        assert load(path).rows, path


def test_distillation(wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(FOLDER / "distillation.py"))["main"]
    names = "no relations 5e-4;untrained qvdit"
    fixed = {"out": tmp_path, "models": str(wan_folder), "bits": "w2a6", "steps": 2, "videos": 2, "prompt_count": 2}
    for render in (False, True):
        main(**fixed, names=names, minutes=None, render=render)
    rows = {row["variant"]: row for row in json.loads((tmp_path / "distillation.json").read_text())["rows"]}
    assert set(rows) == set(names.split(";"))
    assert [rows[name]["steps"] for name in names.split(";")] == [2, 0]
    for row in rows.values():
        assert len(row["held_out_error"]) == len(row["held_out_error_guided"]) == 10
        assert row["metrics"]["psnr_db"]["mean"] > 0
    assert capsys.readouterr().out.count("untrained qvdit") == 2
