"""Tables from fixed cells: which belong together, their order, what is bold, where methods part, and the pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from qvdit.compare import plots, results, table
from qvdit.compare.store import Store
from qvdit.contract import QvditError

METRICS = [name for name in table.COLUMNS if name != "psnr_db"]


def cell(recipe: str, bits: str = "fp32", scene: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: {"mean": scene, "sem": 0.01} for name in METRICS}
    if recipe != "fp":
        metrics["psnr_db"] = {"mean": None if scene is None else 20 * scene, "sem": 0.25}
    nominal = 32.0 if recipe == "fp" else float(bits[1])
    fields = {
        "model": "m",
        "recipe": recipe,
        "bits": bits,
        "regime": "uniform",
        "nominal_weight_bits": nominal,
        "effective_weight_bits": nominal + 0.25,
        "seconds": 1.5,
        "metrics": metrics,
        "videos": 6,
        "seeds": 3,
        "terms": "t",
        "budget": None,
        "device": "H200",
        "date": "2026-11-22T10:00:00+00:00",
        "command": "qvdit compare",
        "versions": {"torch": "2.11"},
        **changes,
    }
    return {"key": "-".join(map(str, (recipe, bits, fields["regime"]))), **fields}


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its head."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] != "width"]


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    """Full precision, w4a8 and w3a6, one of them in both regimes; in no order."""
    return [
        cell("qvdit", "w3a6", 0.8, budget="b"),
        cell("rtn", "w3a6", 0.3),
        cell("mine", "w3a6", 0.35),
        cell("vidit-q", "w3a6", 0.4),
        cell("rtn", "w3a6", 0.6, regime="mlp8"),
        cell("q-vdit-authors", "w3a6", 0.7, budget="b"),
        cell("rtn", "w4a8", 0.85),
        cell("smoothquant", "w4a8", 0.85),
        cell("fp", scene=0.9),
    ]


def test_rows_stand_as_in_the_paper(cells):
    found = [(c["bits"], c["regime"], c["recipe"]) for c in table.select(cells)]
    assert found == [
        ("fp32", "uniform", "fp"),
        ("w4a8", "uniform", "rtn"),
        ("w4a8", "uniform", "smoothquant"),
        ("w3a6", "uniform", "rtn"),
        ("w3a6", "uniform", "vidit-q"),
        ("w3a6", "uniform", "mine"),
        ("w3a6", "uniform", "q-vdit-authors"),
        ("w3a6", "uniform", "qvdit"),
        ("w3a6", "mlp8", "rtn"),
    ]


def test_widths_fall_by_weights_and_then_activations():
    widths = ["w2a6", "w8a8", "w3a8", "w4a6", "w2a8", "w4a8", "w6a6", "w3a6"]
    assert sorted(widths, key=table.width_order) == ["w8a8", "w6a6", "w4a8", "w4a6", "w3a8", "w3a6", "w2a8", "w2a6"]


def test_no_cell_twice_and_the_newer_wins(cells):
    newer = cell("rtn", "w3a6", 0.31, date="2026-11-23T09:00:00+00:00", key="newer")
    found = table.select([newer, *cells])
    assert len(found) == len(cells)
    assert table.mean_of(next(c for c in found if c["key"] == "newer"), "scene_consistency") == 0.31
    # what was asked for wins over what is newer
    asked = table.select([newer, *cells], asked=frozenset({"rtn-w3a6-uniform"}))
    assert all(c["key"] != "newer" for c in asked)


def test_cells_of_other_terms_do_not_mix(cells):
    other = [cell("rtn", "w2a6", terms="u"), cell("qvdit", "w2a6", budget="c")]
    assert len(table.select([*cells, *other])) == len(cells)
    assert [c["bits"] for c in table.select([*cells, *other], terms="u")] == ["w2a6"]
    found = table.select([*cells, *other], terms="t", budget="c")
    assert {c["budget"] for c in found} == {None, "c"}


def test_table_layout(cells):
    text = table.markdown(table.select(cells))
    assert "6 videos of 3 seeds" in text
    assert "## m\n" in text
    found = rows(text)
    assert len(found) == len(cells)
    assert all(len(row) == 4 + len(table.COLUMNS) for row in found)
    assert found[0][:5] == ["fp32", "fp", "32.00", "32.25", "0.900 ± 0.010"]
    assert found[0][-1] == "—"
    assert found[3][:4] == ["w3a6", "rtn", "3.00", "3.25"]
    assert found[-1][:2] == ["w3a6, mlp8", "rtn"]


def test_the_best_of_a_width_is_bold(cells):
    found = {(row[0], row[1]): row for row in rows(table.markdown(table.select(cells)))}
    assert found["w3a6", "qvdit"][4:] == ["**0.800 ± 0.010**"] * 7 + ["**16.00 ± 0.25**"]
    assert found["w4a8", "rtn"][4] == found["w4a8", "smoothquant"][4] == "**0.850 ± 0.010**"  # both are the best
    for place in (("fp32", "fp"), ("w3a6", "rtn"), ("w3a6, mlp8", "rtn")):  # one alone is not the best of anything
        assert not any("**" in value for value in found[place])


def test_each_column_has_its_own_best(cells):
    cells[1]["metrics"]["dynamic_degree"] = {"mean": 0.95, "sem": 0.02}
    found = {(row[0], row[1]): row for row in rows(table.markdown(table.select(cells)))}
    column = 4 + list(table.COLUMNS).index("dynamic_degree")
    assert found["w3a6", "rtn"][column] == "**0.950 ± 0.020**"
    assert found["w3a6", "qvdit"][column] == "0.800 ± 0.010"


def test_a_mean_that_is_not_finite():
    found = rows(table.markdown(table.select([cell("rtn", "w2a6", None), cell("qvdit", "w2a6", 0.2)])))
    assert found[0][4:] == ["—"] * len(table.COLUMNS)


def test_where_methods_part(cells):
    found = table.parting(table.select(cells))
    assert found is not None
    assert (found.bits, found.earlier["recipe"], found.measured) == ("w3a6", "vidit-q", 2)
    assert found.ratio() == pytest.approx(0.8 / 0.4)
    assert found.lead() == pytest.approx((0.8 - 0.7) / (0.01**2 + 0.01**2) ** 0.5)
    text = table.parting_text(table.select(cells))
    assert "at w3a6 the best of 2 earlier methods measured, vidit-q" in text
    assert "**2.00 times**" in text
    assert "**+7.1 standard errors**" in text


def test_methods_part_at_the_widest_width_that_qualifies(cells):
    lower = [cell(name, "w2a6", 0.1) for name in ("rtn", "qvdit")]
    assert table.parting([*cells, *lower]).bits == "w3a6"
    # a recipe of the user's is no earlier method
    assert table.parting([*cells, cell("mine", "w4a6", 0.1)]).bits == "w3a6"
    assert table.parting([*cells, cell("rtn", "w4a6", 0.1)]).bits == "w4a6"
    # nor does the mlp8 regime count
    assert table.parting([*cells, cell("rtn", "w4a6", 0.1, regime="mlp8")]).bits == "w3a6"


def test_half_is_kept():
    cells = [cell("fp", scene=0.8), cell("rtn", "w2a6", 0.4)]
    assert table.parting(cells) is None
    assert "nowhere" in table.parting_text(cells)


def test_parting_needs_full_precision(cells):
    without = [c for c in cells if c["recipe"] != "fp"]
    assert table.parting(without) is None
    assert "full precision has not been measured" in table.parting_text(without)


def test_parting_without_ours_or_the_authors():
    cells = [cell("fp", scene=0.9), cell("rtn", "w2a6", 0.0)]
    assert "qvdit has not been measured there" in table.parting_text(cells)
    text = table.parting_text([*cells, cell("qvdit", "w2a6", 0.5)])
    assert "no ratio" in text  # the earlier method has nothing at all
    assert "q-vdit-authors has not been measured there" in text


def test_quality_json(cells, tmp_path):
    store = Store(tmp_path / "cells", pytest.fail)
    for index, one in enumerate(cells):
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / f"cell-{index}.json").write_text(json.dumps(one))
    results.write(store, tmp_path)
    found = json.loads((tmp_path / "quality.json").read_text())
    assert set(found) == {"command", "versions", "device", "date", "cells"}
    assert (found["device"], found["date"], found["versions"]) == ("H200", "2026-11-22", {"torch": "2.11"})
    assert len(found["cells"]) == len(cells)
    for one in found["cells"]:
        needed = {"model", "recipe", "bits", "regime", "effective_weight_bits", "seconds", "metrics"}
        assert needed <= set(one)
        assert set(one["metrics"]) == set(table.COLUMNS) - ({"psnr_db"} if one["recipe"] == "fp" else set())
        assert all(set(value) == {"mean", "sem"} for value in one["metrics"].values())
    for name in ("widths.png", "bits.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_cells_give_the_same_files(cells, tmp_path):
    for name in ("a", "b"):
        plots.write(table.select(cells), tmp_path / name)
    for name in ("widths.png", "bits.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cells_of_two_machines(cells):
    cells[0] = {**cells[0], "device": "A100", "versions": {"torch": "2.12"}, "date": "2026-11-24T00:00:00+00:00"}
    found = table.quality(table.select(cells))
    assert (found["device"], found["versions"]["torch"]) == ("A100, H200", "2.11, 2.12")
    assert found["date"] == "2026-11-24"


def test_no_cells_at_all(tmp_path):
    with pytest.raises(QvditError, match="no finished cells"):
        results.write(Store(tmp_path / "cells", pytest.fail), tmp_path)


def test_full_precision_alone_needs_no_picture(tmp_path):
    plots.write([cell("fp")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_styles_are_all_different():
    names = [*(name for name in table.EARLIER), "q-vdit-authors", "q-vdit-paper", "qvdit"]
    styles = [plots.style(name) for name in names]
    assert len(set(styles)) == len({(s.colour, s.marker) for s in styles}) == len(names)


def test_matplotlib_is_imported_when_a_picture_is_drawn():
    code = "import sys, qvdit.cli, qvdit.compare.job; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
