"""A comparison on a tiny random pipeline, from the command line: really calibrated, trained, sampled and measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--videos", "2", "--seeds", "2", "--prompt-count", "3", "--steps", "2", "--records", "2", "--compute", "cpu")
TRAINED = ("--distill-steps", "2", "--distill-batch", "2", "--learning-rates", "1e-4,1e-3")
CELLS = 7  # full precision; rtn and qvdit at w3a6 in both regimes and at w2a6

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(cli: Cli, wan_folder: Path, tmp_path: Path) -> Cli:
    """``compare(option, …)`` into ``tmp_path / "out"``."""

    def call(*options: object) -> tuple[int, str, str]:
        chosen = ("--models", wan_folder, "--recipes", "rtn,qvdit", "--bits", "w3a6,w2a6", "--out", tmp_path / "out")
        return cli("qvdit", "compare", *chosen, *SMALL, *TRAINED, *options)

    return call


def test_several_processes_fill_one_table(compare: Cli, tmp_path: Path):
    code, said, problems = compare("--regimes", "uniform", "--recipes", "rtn,quarot", "--processes", "2")
    assert code == 0, said + problems
    cells = read(tmp_path / "out" / "quality.json")["cells"]
    assert len(cells) == 5  # full precision, and two recipes at two widths
    assert {line[:3] for line in problems.splitlines() if line.startswith("[")} == {"[0]", "[1]"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_comparison(compare: Cli, cli: Cli, tmp_path: Path):
    out = tmp_path / "out"
    code, said, _ = compare()
    assert code == 0, said
    quality = read(out / "quality.json")
    assert set(quality) == {"command", "versions", "device", "date", "cells"}
    assert quality["command"].startswith("qvdit compare")
    cells = {(c["recipe"], c["bits"], c["regime"]): c for c in quality["cells"]}
    assert len(cells) == len(quality["cells"]) == CELLS
    for (recipe, bits, regime), cell in cells.items():
        assert (cell["videos"], cell["seeds"], cell["model"]) == (4, 2, "tiny-wan")
        assert ("psnr_db" in cell["metrics"]) == (recipe != "fp")
        assert cell["nominal_weight_bits"] == pytest.approx(
            32 if recipe == "fp" else int(bits[1]) if regime == "uniform" else _mlp8_bits()
        )
    ours = cells["qvdit", "w3a6", "uniform"]
    errors = {float(rate): error for rate, error in ours["held_out_errors"].items()}
    assert ours["learning_rate"] == min(errors, key=lambda rate: errors[rate])
    assert ours["distillation_steps"] == 2
    assert cells["rtn", "w3a6", "uniform"]["distillation_steps"] == 0
    assert (out / "table.md").read_text().count("\n| w3a6") == 4
    assert "look at" in said

    # The same command finds everything done, and the cells alone make the same table elsewhere.
    before = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert compare()[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    shutil.copytree(out / "cells", tmp_path / "carried")
    code, said, _ = cli("qvdit", "compare", "--render", "--cells", tmp_path / "carried", "--out", tmp_path / "other")
    assert code == 0, said
    for name in ("quality.json", "table.md", "widths.png", "bits.png"):
        assert (tmp_path / "other" / name).read_bytes() == (out / name).read_bytes()


def _mlp8_bits() -> float:
    mlp, others = 2 * 32 * 48, 8 * 32 * 32
    return (8 * mlp + 3 * others) / (mlp + others)


def test_the_time_is_up_at_once(compare: Cli, tmp_path: Path):
    code, said, _ = compare("--minutes", "0", "--recipes", "rtn")
    assert code == 0
    assert "4 left, run the same command again" in said  # full precision, w3a6 and w2a6, w3a6 with mlp8
    assert said.count("rtn w3a6") == 2
    assert not (tmp_path / "out").exists()


def test_nothing_to_render(cli: Cli, tmp_path: Path):
    code, _, said = cli("qvdit", "compare", "--render", "--out", tmp_path)
    assert code == 2
    assert "no finished cells" in said


def test_interrupted(compare: Cli, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qvdit.method.calibration.record", interrupt)
    code, said, _ = compare()
    assert code == 130
    assert "run the same command again to go on" in said
