"""What the kernels must reach on an H200, checked against a run's rows alone.

Every floor is checked at every size it names that was timed; TQE's whole linear is that of rank 1 with frame gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from qvdit.bench.results import Results, Row
from qvdit.bench.saved import ratio
from qvdit.bench.shapes import Shape

# TOP/s of the best of several CUTLASS tiles with rank-1 epilogues on an H200, what a first version reached.
FIRST_VERSION = {
    Shape(32768, 1152, 1152): 1103,
    Shape(32768, 3456, 1152): 1177,
    Shape(32768, 4608, 1152): 1175,
    Shape(32768, 1152, 4608): 1400,
    Shape(32768, 1536, 1536): 1279,
    Shape(32768, 8960, 1536): 1246,
    Shape(32768, 1536, 8960): 1455,
    Shape(32768, 5120, 5120): 1401,
    Shape(32768, 13824, 5120): 1320,
    Shape(16384, 3072, 3072): 1462,
    Shape(16384, 12288, 3072): 1315,
}
BLOCKS = ("block_stdit_xl", "block_wan_1_3b")


@dataclass(frozen=True)
class Figure:
    """One measurement beside its bound."""

    where: str
    value: float
    bound: float
    most: bool  # the bound is an upper one

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound

    @property
    def slack(self) -> float:
        """What is left to the bound, of the bound; negative where it is missed."""
        slack = (self.value - self.bound) / (abs(self.bound) or 1.0)
        return -slack if self.most else slack


@dataclass(frozen=True)
class Verdict:
    """A floor and what was measured of it, worst first."""

    floor: str
    unit: str
    figures: tuple[Figure, ...]

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return all(figure.met for figure in self.figures) if self.figures else None

    @property
    def missed(self) -> tuple[Figure, ...]:
        return tuple(figure for figure in self.figures if not figure.met)


Bound = Callable[[Shape], float | None]  # None: the floor does not name this size
Measure = Callable[[Shape], float | None]  # None: not measured


def verdicts(results: Results) -> list[Verdict]:
    """Every floor, in the order in which they are worth reading."""
    return [*_products(results), *_linears(results), *_term(results), *_quantizers(results), _blocks(results)]


def _products(results: Results) -> Iterator[Verdict]:
    def faster(than: str, sustained: bool = False) -> Measure:
        return lambda s: ratio(
            results.find(s, than, sustained=sustained), results.find(s, "gemm", 1, sustained=sustained)
        )

    def tops(shape: Shape) -> float | None:
        row = results.find(shape, "gemm", 1)
        return None if row is None else row.tops

    yield _at_least(results, "GEMM, whole epilogue: the first CUTLASS version's best", "TOP/s", tops, FIRST_VERSION.get)
    yield _at_least(
        results,
        "GEMM, whole epilogue: 1.9x bf16 for K >= 3072 and M >= 16384",
        "x",
        faster("bf16"),
        lambda s: 1.9 if s.k >= 3072 and s.m >= 16384 else None,
    )
    yield _at_least(results, "GEMM, whole epilogue: above fp8 scaled by rows", "x", faster("fp8_row"), lambda s: 1.0)

    yield _at_least(
        results,
        "GEMM, whole epilogue: above fp8, each at the clocks that it keeps up, M >= 16384",
        "x",
        faster("fp8_row", sustained=True),
        lambda s: 1.0 if s.m >= 16384 else None,
    )


def _linears(results: Results) -> Iterator[Verdict]:
    def faster(shape: Shape) -> float | None:
        return ratio(results.find(shape, "bf16"), results.find(shape, "linear", 1, 4))

    for text, bound in (
        ("1.65x bf16 for K >= 3072 and N >= 5120", lambda s: 1.65 if s.k >= 3072 and s.n >= 5120 else None),
        ("1.45x bf16 for K = 1152 … 1536 and N >= 3456", lambda s: 1.45 if _narrow(s) and s.n >= 3456 else None),
        ("1.2x bf16 for N = 1152 and K = 4608", lambda s: 1.2 if (s.n, s.k) == (1152, 4608) else None),
        ("never slower than bf16", lambda s: 1.0),
    ):
        yield _at_least(results, f"whole linear, 4-bit weights: {text}", "x", faster, bound)


def _term(results: Results) -> Iterator[Verdict]:
    """What TQE's ranks add to the whole linear."""

    def cost(rank: int) -> Measure:
        def percent(shape: Shape) -> float | None:
            slower = ratio(results.find(shape, "linear", rank, 4), results.find(shape, "linear", 0, 4))
            return None if slower is None else 100 * (slower - 1)

        return percent

    def bound(applies: Callable[[Shape], bool], percent: float) -> Bound:
        return lambda shape: percent if applies(shape) else None

    for rank, wide, narrow in ((1, 2.0, 5.0), (4, 5.0, 13.0)):
        what = f"TQE of rank {rank} with frame gain: at most"
        for text, limit in (
            (f"{what} {wide:g} % of the whole linear for K >= 3072", bound(_wide, wide)),
            (f"{what} {narrow:g} % for K = 1152 … 1536", bound(_narrow, narrow)),
        ):
            yield _verdict(text, "%", _figures(results.shapes(), cost(rank), limit, most=True))


def _quantizers(results: Results) -> Iterator[Verdict]:
    def against(bandwidth: Callable[[Shape], float | None], least_rows: int) -> Iterator[Figure]:
        for row in results.rows:
            copied = bandwidth(row.shape)
            if row.what == "quantize" and row.gb_s and copied and row.m >= least_rows:
                kind = f" {row.prologue}" if row.prologue else ""
                yield Figure(f"{row.shape} rank {row.rank}{kind}", 100 * row.gb_s / copied, 80.0, most=False)

    def copy_alike(shape: Shape) -> float | None:
        row = results.find(shape, "copy")
        return None if row is None else row.gb_s

    yield _verdict("quantizing: 80 % of the bandwidth of copying the same x", "%", against(copy_alike, 0))
    large = against(lambda s: 1000 * results.copy_tb_s, 16384)
    yield _verdict("quantizing: 80 % of a large copy's bandwidth, M >= 16384", "%", large)


def _blocks(results: Results) -> Verdict:
    """Both blocks are there in both precisions; how fast they must be is not said."""
    rows: dict[str, dict[int | None, Row]] = {name: {} for name in BLOCKS}
    for row in results.blocks():
        rows.setdefault(row.what, {})[row.weight_bits] = row
    speedups = {name: ratio(found.get(16), found.get(4)) for name, found in rows.items()}
    figures = [Figure(name, value, 0.0, most=False) for name, value in speedups.items() if value is not None]
    everything = len(figures) == len(rows)
    return Verdict("whole blocks, w4a8 against bf16: both reported", "x", tuple(figures) if everything else ())


def _wide(shape: Shape) -> bool:
    return shape.k >= 3072


def _narrow(shape: Shape) -> bool:
    return 1152 <= shape.k <= 1536


def _at_least(results: Results, text: str, unit: str, measure: Measure, bound: Bound) -> Verdict:
    return _verdict(text, unit, _figures(results.shapes(), measure, bound, most=False))


def _figures(shapes: Iterable[Shape], measure: Measure, bound: Bound, most: bool) -> Iterator[Figure]:
    for shape in shapes:
        wanted, value = bound(shape), measure(shape)
        if wanted is not None and value is not None:
            yield Figure(str(shape), value, wanted, most)


def _verdict(text: str, unit: str, figures: Iterable[Figure]) -> Verdict:
    return Verdict(text, unit, tuple(sorted(figures, key=lambda figure: figure.slack)))
