"""``qvdit bench kernels`` without a GPU: sizes, peers, turns, files, floors, pictures, what it says and refuses."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from qvdit.bench import blocks, candidates, display, floors, kernels, peers, plots, results, shapes, timing, turns
from qvdit.bench.results import Results, Row
from qvdit.bench.shapes import Shape
from qvdit.cli import app
from qvdit.contract import FrameRows, QvditError
from qvdit.runtimes import torch_ops

WIDE, NARROW, MLP = Shape(32768, 5120, 5120), Shape(32768, 4608, 1152), Shape(32768, 1152, 4608)


def row(shape: Shape, what: str, ms: float, rank: int = 0, weight_bits: int | None = None, **more) -> Row:
    tops = None if what in ("copy", "quantize") else 2e-9 * shape.m * shape.n * shape.k / ms
    return Row(shape.m, shape.n, shape.k, what, weight_bits, 8, rank, ms, 0.01, tops, **more)


def measured(*rows: Row, gpu: str = "NVIDIA H200") -> Results:
    return Results("qvdit bench kernels", gpu, "580.1", {"torch": "2.13"}, "2026-11-22", 4.0, rows)


def all_of(shape: Shape, bf16: float = 2.0, gemm: float = 1.0, linear: float = 1.1) -> list[Row]:
    """Rows of a size: bf16 takes 2 ms, fp8 1.3, our GEMM 1, the whole linear 1.1, a rank 1 % and four 4 %."""
    return [
        row(shape, "bf16", bf16, weight_bits=16),
        row(shape, "fp8_row", 1.3, weight_bits=8),
        *(row(shape, "gemm", gemm, rank, 8) for rank in (0, 1, 4)),
        *(row(shape, "linear", linear * (1 + rank / 100), rank, 4) for rank in (0, 1, 4)),
        row(shape, "copy", 0.1, gb_s=4000.0),
        *(row(shape, "quantize", 0.1, rank, gb_s=3500.0) for rank in (0, 1, 4)),
    ]


# Sizes --------------------------------------------------------------------------------------------------------------


def test_shapes_are_parsed():
    assert shapes.parse("32768x1152x4608, 512x5120x5120") == (MLP, Shape(512, 5120, 5120))
    assert shapes.parse("none") == ()
    assert set(shapes.parse("quick")) <= set(shapes.parse("all"))
    assert str(MLP) == "32768 x 1152 x 4608"


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4", "32768x0x1152", "ax32x32", "-1x32x32", "16x33x32"])
def test_other_shapes_are_refused(text):
    with pytest.raises(QvditError, match="--shapes"):
        shapes.parse(text)


def test_every_size_that_a_floor_names_is_timed():
    assert set(floors.FIRST_VERSION) <= set(shapes.ALL)
    assert len(set(shapes.ALL)) == len(shapes.ALL)


@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_input_sets_exceed_the_cache(shape):
    footprint = candidates.input_sets(shape) * (shape.m * shape.k + shape.n * shape.k / 2)
    assert footprint > 150e6  # an H200's L2 holds 60 MB


# What is timed ------------------------------------------------------------------------------------------------------


def test_the_unfused_linear_is_a_linear():
    x, weight_q = torch.randn(64, 96), torch.randint(-8, 8, (32, 96), dtype=torch.int8)
    packed = (weight_q[:, ::2] + 8).to(torch.uint8) | (weight_q[:, 1::2] + 8).to(torch.uint8) << 4
    assert torch.equal(peers.expand_int4(packed), weight_q)
    scale, bias = torch.rand(1, 32) / 96, torch.randn(32)
    expected = torch.nn.functional.linear(x, weight_q * scale.T, bias)
    assert torch.dist(peers.unfused_w4a8(x, packed, scale, bias), expected) < 0.01 * expected.norm()


def test_quantizers_of_peers():
    x = torch.randn(16, 96, dtype=torch.bfloat16)
    x[3] = 0
    for quantize, bound in ((peers.int8_rows, 0.01), (peers.fp8_rows, 0.04)):
        x_q, scale = quantize(x)
        assert torch.dist(x_q.float() * scale, x.float()) < bound * x.float().norm()
    assert peers.int8_rows(x)[0].abs().amax() == 127


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the kernels, and nothing is compiled."""

    def quantize(self, x, rank=0, prologue="plain"):
        x_q, scale = peers.int8_rows(x)
        return x_q, scale[:, 0], torch.empty(0), torch.empty(len(x), rank), torch.empty(0)

    monkeypatch.setattr(torch_ops, "unpack_weight", lambda words, b, k, *_: (torch.ones(len(words), k).char(), None))
    monkeypatch.setattr(torch_ops, "gemm", lambda rows, weight, *_: None)
    monkeypatch.setattr(candidates.LowBit, "quantize", quantize)
    monkeypatch.setattr(candidates.LowBit, "linear", lambda self, x, i, rank, bits: self.words[bits][i])
    monkeypatch.setattr(candidates, "_compiled", lambda function: function)
    monkeypatch.setattr(candidates, "_MOST", 3)


@pytest.mark.usefixtures("eager")
def test_candidates_run(monkeypatch: pytest.MonkeyPatch):
    shape = Shape(64, 96, 64)
    monkeypatch.setattr(candidates, "_THREE_BITS", (shape,))
    monkeypatch.setattr(candidates, "_PROLOGUES", (shape,))
    found = candidates.candidates(shape, True, torch.device("cpu"))
    for candidate in found:
        for i in range(candidates.input_sets(shape)):
            candidate.call(i)
    kinds = {candidate.what for candidate in found}
    assert kinds == {
        *("bf16", "int8_cublaslt", "fp8_row", "fp8_row_linear", "cutlass_s8", "unfused_w4a8"),
        *("gemm", "linear", "quantize", "copy", "unpack"),
    }
    assert {(c.weight_bits, c.rank) for c in found if c.what == "linear"} == {(4, 0), (4, 1), (4, 4), (3, 1)}
    assert {c.prologue for c in found if c.what == "quantize"} == {None, "gelu", "layernorm"}
    assert len({str(c) + str(c.weight_bits) for c in found}) == len(found)
    assert all((c.operations is None) != (c.moved is None) for c in found)


@pytest.mark.usefixtures("eager")
def test_fewer_candidates_at_many_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_MANY_ROWS", 64)
    found = {(c.what, c.rank) for c in candidates.candidates(Shape(64, 96, 64), False, torch.device("cpu"))}
    assert {("bf16", 0), ("fp8_row", 0), ("gemm", 1), ("linear", 0), ("linear", 1), ("copy", 0)} <= found
    assert not {("unfused_w4a8", 0), ("linear", 4), ("cutlass_s8", 0)} & found


def test_turns_and_summaries():
    order: list[str] = []

    def timer(name: str, ms: float):
        def time() -> float:
            order.append(name)
            return ms

        return time

    repeats = 30
    timers = {"a": timer("a", 1.0), "b": timer("b", 2.0), "c": timer("c", 3.0)}
    assert turns.in_turns(timers, repeats) == {"a": [1.0] * repeats, "b": [2.0] * repeats, "c": [3.0] * repeats}
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == repeats + turns.WARM_UPS
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}  # in any order, each of them once
    assert turns.in_turns({"d": timer("d", 4.0)}, 2, warm_ups=0) == {"d": [4.0, 4.0]}
    del order[-2:]
    before = order.copy()
    order.clear()
    turns.in_turns(timers, repeats)
    assert order == before
    assert turns.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 1.0)


def test_milliseconds_are_of_the_whole_call(monkeypatch: pytest.MonkeyPatch):
    now = 1.0

    def call() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now)
    assert turns.milliseconds(call)() == 250.0


def test_long_turns_count_from_the_middle():
    now = 0.0

    def timer(name: str, ms: float):
        def time() -> float:
            nonlocal now
            now += 1.0
            return ms + now

        return time

    times = turns.for_long({"a": timer("a", 0.0), "b": timer("b", 100.0)}, 2, 4.0, lambda: now)
    assert times == {"a": [3.0, 4.0, 11.0, 12.0], "b": [107.0, 108.0, 115.0, 116.0]}
    assert len(turns.for_long({"a": timer("a", 0.0)}, 2, 0.1, lambda: now)["a"]) == 2  # once a round at least


@pytest.mark.usefixtures("eager")
def test_the_products_that_are_compared_are_sustained():
    found = candidates.candidates(Shape(64, 96, 64), True, torch.device("cpu"))
    kept = {(c.what, c.rank, c.tile) for c in candidates.sustained(found, MLP)}
    assert kept == {("bf16", 0, None), ("fp8_row", 0, None), ("gemm", 1, None)}
    assert not candidates.sustained(found, Shape(512, 1152, 4608))


def test_a_candidate_becomes_a_row():
    product = timing.Candidate("gemm", print, 8, 8, 1, "WGMMA_128X128", operations=2e9)
    found = product.row(Shape(1000, 1000, 1000), [1.0, 1.0, 1.0])
    assert (found.tops, found.gb_s, found.spread, found.tile) == (2.0, None, 0.0, "WGMMA_128X128")
    assert timing.Candidate("copy", print, moved=4e6).row(MLP, [2.0, 2.0]).gb_s == 2.0


# The file -----------------------------------------------------------------------------------------------------------


class Watch:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def measured(self, results: Results, rows: Sequence[Row]) -> None:
        self.seen.append(len(results.rows))


@pytest.mark.parametrize("sustained", [True, False])
def test_a_run_times_in_turns_and_by_themselves(sustained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = Shape(512, 1152, 1152)
    chosen = [timing.Candidate(what, print, rank=rank) for what, rank in (("bf16", 0), ("gemm", 1), ("linear", 1))]
    captured: list[str] = []

    def timer_of(call, calls, pool):
        captured.append("one")
        return lambda: 1.0

    monkeypatch.setattr(kernels, "check_machine", lambda: None)
    monkeypatch.setattr(kernels, "about", lambda command, copied: measured())
    monkeypatch.setattr(kernels, "_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(timing, "captured", timer_of)
    monkeypatch.setattr(candidates, "candidates", lambda shape, tiles, device: chosen)
    monkeypatch.setattr(candidates, "large_copy", lambda device: timing.Candidate("copy", print, moved=2.0))
    settings = kernels.Settings((MLP, few), blocks=False, tiles=False, repeats=3, sustained=sustained)
    found = kernels.run(settings, tmp_path / "kernels.json", "qvdit bench kernels", Watch())
    assert [row.what for row in found.rows if not row.sustained] == ["bf16", "gemm", "linear"] * 2
    by_itself = [(row.shape, row.what) for row in found.rows if row.sustained]
    assert by_itself == ([(MLP, "bf16"), (MLP, "gemm")] if sustained else [])
    assert len(captured) == 1 + 2 * len(chosen)  # each once
    assert results.load(tmp_path / "kernels.json") == found


def test_a_stopped_run_keeps_what_it_measured(tmp_path: Path):
    def stopped() -> list[Row]:
        raise KeyboardInterrupt

    out, watch, freed = tmp_path / "deep" / "kernels.json", Watch(), []
    jobs = [lambda: all_of(WIDE), lambda: all_of(MLP), stopped]
    with pytest.raises(KeyboardInterrupt):
        kernels.fill(measured(), jobs, out, watch, lambda: freed.append(1))
    kept = results.load(out)
    assert kept.shapes() == [WIDE, MLP]
    assert watch.seen == [12, 24]
    assert len(freed) == 2


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("GPU-a, 580.1, 700.00\nGPU-b, 580.1, 350.00\n", ("580.1", 350.0)),
        ("GPU-b, 580.1, [N/A]\n", ("580.1", None)),
        ("GPU-a, 580.1, 700.00\n", ("580.1", None)),  # a part of a GPU has a name of its own
    ],
)
def test_what_nvidia_smi_tells(lines: str, expected: tuple[str, float | None], monkeypatch: pytest.MonkeyPatch):
    done = subprocess.CompletedProcess([], 0, lines)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert kernels.driver_and_limit("GPU-b") == expected


def test_without_nvidia_smi_the_driver_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert kernels.driver_and_limit("GPU-b") == ("unknown", None)


def test_the_file_holds_what_others_rely_on(tmp_path: Path):
    out = tmp_path / "kernels.json"
    block = row(Shape(32760, 1536, 1536), "block_wan_1_3b", 9.0, 1, 4, parts_ms={"attention": 5.0})
    tiled = row(WIDE, "gemm", 0.9, 1, 8, tile="MMA_128X128")
    results.save(measured(*all_of(WIDE), tiled, block), out)
    value = json.loads(out.read_text())
    assert set(value) == {"command", "gpu", "driver", "versions", "date", "copy_tb_s", "rows"}
    required = {"m", "n", "k", "what", "weight_bits", "act_bits", "rank", "ms", "spread", "tops"}
    assert all(required <= set(kept) for kept in value["rows"])
    assert {key for kept in value["rows"] for key in kept} == required | {"gb_s", "tile", "parts_ms"}
    assert results.load(out) == measured(*all_of(WIDE), tiled, block)
    limited = replace(measured(*all_of(WIDE)), power_limit_w=700.0)
    results.save(limited, out)
    assert json.loads(out.read_text())["power_limit_w"] == 700.0
    assert results.load(out) == limited


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": []}', "no"])
def test_other_files_are_refused(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(QvditError, match="a JSON of `qvdit bench kernels`"):
        results.load(tmp_path / "a.json")


@pytest.mark.parametrize("change", [{"ms": "fast"}, {"what": 3}, {"colour": "red"}, {"m": None}])
def test_damaged_rows_are_refused(tmp_path: Path, change):
    path = tmp_path / "a.json"
    results.save(measured(*all_of(WIDE)), path)
    value = json.loads(path.read_text())
    value["rows"][0] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(QvditError):
        results.load(path)


def test_finding_rows():
    rows = [
        row(WIDE, "gemm", 0.5, 1, 8, tile="MMA_128X128"),
        row(WIDE, "gemm", 1.0, 1, 8),
        row(WIDE, "cutlass_s8", 0.9, 0, 8, tile="WGMMA_128X128"),
        row(WIDE, "cutlass_s8", 0.8, 0, 8, tile="WGMMA_128X192"),
        row(WIDE, "linear", 1.3, 1, 3),
        row(WIDE, "linear", 1.2, 1, 4),
        row(WIDE, "quantize", 0.3, 1, prologue="gelu", gb_s=1.0),
        row(WIDE, "gemm", 0.7, 1, 8, sustained=True),
    ]
    found = measured(*rows)
    assert found.find(WIDE, "gemm", 1) == rows[1]  # forced tiles are asides
    assert found.find(WIDE, "gemm", 1, sustained=True) == rows[7]
    assert found.find(WIDE, "cutlass_s8") == rows[3]
    assert found.find(WIDE, "linear", 1, 4) == rows[5]
    assert found.find(WIDE, "linear", 1, 3) == rows[4]
    assert found.find(WIDE, "quantize", 1) is None
    assert found.find(WIDE, "quantize", 1, prologue="gelu") == rows[6]
    assert found.find(MLP, "gemm", 1) is None


# Floors -------------------------------------------------------------------------------------------------------------


def verdict(found: Results, start: str) -> floors.Verdict:
    (one,) = [v for v in floors.verdicts(found) if v.floor.startswith(start)]
    return one


def test_nothing_measured_is_no_verdict():
    assert [v.met for v in floors.verdicts(measured())] == [None] * 15


def test_floors_met_and_missed():
    found = measured(*all_of(WIDE), *all_of(NARROW), *all_of(MLP))
    states = {v.floor: v.met for v in floors.verdicts(found)}
    assert list(states.values()).count(False) == 1  # 32768 x 4608 x 1152 in 1 ms is no 1175 TOP/s
    first = verdict(found, "GEMM, whole epilogue: the first")
    assert [(figure.where, figure.met) for figure in first.figures] == [
        (str(MLP), False),
        (str(NARROW), False),
        (str(WIDE), True),
    ]
    assert verdict(found, "GEMM, whole epilogue: 1.9x").figures[0].value == 2.0
    assert verdict(found, "whole blocks").met is None


def test_each_floor_is_held_to_its_bound():
    slow = measured(*all_of(WIDE, bf16=1.8), *all_of(NARROW, linear=1.4), *all_of(MLP, linear=1.7))
    assert not verdict(slow, "GEMM, whole epilogue: 1.9x").met
    assert not verdict(slow, "whole linear, 4-bit weights: 1.65x").met
    assert not verdict(slow, "whole linear, 4-bit weights: 1.45x").met
    assert not verdict(slow, "whole linear, 4-bit weights: 1.2x").met
    assert verdict(slow, "whole linear, 4-bit weights: never").met
    assert not verdict(measured(*all_of(WIDE, linear=2.1)), "whole linear, 4-bit weights: never").met
    assert not verdict(measured(*all_of(WIDE, gemm=1.31)), "GEMM, whole epilogue: above fp8 scaled").met
    for ms, met in ((1.29, True), (1.31, False)):
        by_itself = [replace(each, sustained=True) for each in all_of(WIDE, gemm=ms)]
        assert verdict(measured(*all_of(WIDE), *by_itself), "GEMM, whole epilogue: above fp8, each").met == met


@pytest.mark.parametrize(("shape", "rank", "most"), [(WIDE, 1, 2), (NARROW, 1, 5), (WIDE, 4, 5), (NARROW, 4, 13)])
def test_cost_of_the_term(shape, rank, most):
    for percent, met in ((most - 0.1, True), (most + 0.1, False), (-1.0, True)):
        rows = [row(shape, "linear", 1.0, 0, 4), row(shape, "linear", 1 + percent / 100, rank, 4)]
        checked = [v for v in floors.verdicts(measured(*rows)) if v.floor.startswith("TQE") and v.figures]
        assert [v.met for v in checked] == [met]
        assert checked[0].figures[0].value == pytest.approx(percent)


def test_quantizers_are_held_to_both_copies():
    few = Shape(512, 5120, 5120)
    rows = [
        row(few, "copy", 0.1, gb_s=2000.0),
        row(few, "quantize", 0.1, 1, gb_s=1700.0),
        row(WIDE, "copy", 0.1, gb_s=3500.0),
        row(WIDE, "quantize", 0.1, 1, prologue="gelu", gb_s=3000.0),
    ]
    alike, large = (v for v in floors.verdicts(measured(*rows)) if v.floor.startswith("quantizing"))
    assert [f.where for f in alike.figures] == [f"{few} rank 1", f"{WIDE} rank 1 gelu"]
    assert (alike.met, large.met) == (True, False)  # 3000 of 3500, and of 4000
    assert [f.value for f in large.figures] == [75.0]


def test_blocks_are_reported_in_both_precisions():
    sizes = {"block_stdit_xl": Shape(32768, 1152, 1152), "block_wan_1_3b": Shape(32760, 1536, 1536)}
    rows = [row(s, name, 8.0 / (1 + (bits == 4)), 0, bits) for name, s in sizes.items() for bits in (16, 4)]
    assert verdict(measured(*rows), "whole blocks").met
    assert [f.value for f in verdict(measured(*rows), "whole blocks").figures] == [2.0, 2.0]
    assert verdict(measured(*rows[:3]), "whole blocks").met is None
    assert measured(*rows).shapes() == []


# What is shown ------------------------------------------------------------------------------------------------------


def shown(found: Results) -> str:
    console = Console(width=144, record=True, file=io.StringIO())
    display.show(found, console)
    return console.export_text()


def test_tables_and_verdicts():
    block = row(Shape(32760, 1536, 1536), "block_wan_1_3b", 9.0, 1, 4, parts_ms={"attention": 5.0, "GEMM": 3.0})
    text = shown(measured(*all_of(WIDE), block))
    line = next(line for line in text.splitlines() if line.startswith(" 32768 x 5120 x 5120"))
    assert line.split()[5:] == ["859", "1322", "1718", "2.00", "87%", "1546", "1.80", "3500", "4000"]
    assert "met, 1 of 1: GEMM, whole epilogue: above fp8 scaled by rows" in text
    assert "not measured: whole blocks" in text
    assert "block_wan_1_3b w4a8 " in text
    assert "87%" not in shown(measured(*all_of(WIDE), gpu="NVIDIA Unknown"))
    assert "by itself" not in text
    by_itself = [replace(each, sustained=True) for each in all_of(WIDE, gemm=1.25)]
    lines = shown(measured(*all_of(WIDE), *by_itself)).split("by itself")[1].splitlines()
    assert lines[2].split()[5:] == ["859", "1322", "1374", "1.60", "1.04"]
    assert "1322" in shown(measured(by_itself[1])).split("by itself")[1]  # ours was left out


def test_a_missed_floor_names_every_size_that_misses():
    lines = list(display.say(verdict(measured(*all_of(NARROW), *all_of(MLP)), "GEMM, whole epilogue: the first")))
    assert lines[0].startswith("MISSED, 0 of 2")
    assert lines[1:] == [
        "    32768 x 1152 x 4608: 347.9 TOP/s (at least 1400)",
        "    32768 x 4608 x 1152: 347.9 TOP/s (at least 1175)",
    ]


def test_lines_come_size_by_size():
    console = Console(width=144, record=True, file=io.StringIO())
    lines = display.Lines(console)
    lines.measured(measured(*all_of(WIDE)), all_of(WIDE))
    lines.measured(measured(*all_of(WIDE), *all_of(MLP)), all_of(MLP))
    text = console.export_text()
    assert text.count("M x N x K") == 1
    assert text.count(" 32768 x 1152 x 4608") == 1


def test_pictures_are_the_same_for_the_same_rows(tmp_path: Path):
    found = measured(*all_of(WIDE), *all_of(NARROW))
    first = [path.read_bytes() for path in plots.write(found, tmp_path / "a.json")]
    again = plots.write(found, tmp_path / "b.json")
    assert [path.name for path in again] == ["b-roofline.png", "b-bars.png"]
    assert first == [path.read_bytes() for path in again]
    assert plots.write(replace(found, gpu="NVIDIA Unknown"), tmp_path / "c.json")
    assert plots.write(measured(), tmp_path / "d.json") == []


def test_intensity():
    assert plots.intensity(Shape(100, 100, 100), (1, 1, 2)) == 50


# The command --------------------------------------------------------------------------------------------------------


def test_rendering_needs_no_gpu(tmp_path: Path):
    path = tmp_path / "kernels.json"
    results.save(measured(*all_of(WIDE)), path)
    done = CliRunner().invoke(app, ["bench", "kernels", "--render", str(path)])
    assert done.exit_code == 0, done.output
    assert "NVIDIA H200, driver 580.1" in done.output
    assert (tmp_path / "kernels-roofline.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no GPU that PyTorch can see"),
        (["--quick", "--shapes", "none"], "--quick and --shapes"),
        (["--shapes", "1x2"], "--shapes '1x2'"),
        (["--render", "nowhere.json"], "no file nowhere.json"),
    ],
)
def test_refusals(options, said, tmp_path: Path):
    done = CliRunner().invoke(app, ["bench", "kernels", "--out", str(tmp_path / "a.json"), *options])
    assert isinstance(done.exception, QvditError)  # one line and exit status 2 are the entry point's
    assert said in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_no_library_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("QVDIT_KERNELS", "/nowhere/lib.so")
    with pytest.raises(QvditError, match="build it"):
        kernels.check_machine()


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("void cutlass::device_kernel<GemmUniversal>", "GEMM"),
        ("void qvdit::gemm_mma_kernel<Shape>", "GEMM"),
        ("void qvdit::quantize_rows_kernel<float, Plain, 1, true>", "quantization"),
        ("void qvdit::quantize_halves_kernel<__nv_bfloat16, 5, 1, true, 1>(qvdit::QuantizeParams)", "quantization"),
        ("unpack_weight_kernel<4>", "quantization"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_2", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_where_a_kernel_belongs(kernel, part):
    assert blocks.part_of(kernel) == part
    assert blocks.parts([(kernel, 3.0), (kernel, 1.0)], 2)[part] == 2.0


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: blocks.stdit_xl(batch=2, frames=3, tokens=4, text=5), (6, 4, 1152)),
        (lambda: blocks.wan_1_3b(frames=2, height=2, width=3, text=5), (1, 12, 1536)),
    ],
    ids=["stdit_xl", "wan_1_3b"],
)
def test_blocks_run(make, size):
    block = make()
    assert block.shape.m == size[0] * size[1]
    module = block.block_of(block.model.bfloat16())
    with torch.no_grad():
        assert module(*block.inputs).shape == size
    assert blocks._operations(module, block.inputs) > 2 * block.shape.m * 8 * size[2] ** 2
    sites = block.adapter.sites(block.model)
    layers = [blocks.low_bit(site, block.model.get_submodule(site.name), block.frames) for site in sites[:5]]
    assert {(layer.weight_bits, layer.rank) for layer in layers} == {(4, 1)}
    assert all((layer.frame_gain is None) == (layer.rows is FrameRows.NONE) for layer in layers)
    assert min(int(layer.weight_q.min()) for layer in layers) >= -8


def test_latte_block_is_lattes():
    """Frames and tokens meet as in the model's own forward."""
    block = blocks.stdit_xl(batch=1, frames=2, tokens=4, text=3)
    swapped = blocks._swapped(block.inputs[0], 2)
    assert torch.equal(swapped[1, 0], block.inputs[0][0, 1])
    assert torch.equal(blocks._swapped(swapped, 4), block.inputs[0])
