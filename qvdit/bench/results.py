"""What a run of ``qvdit bench kernels`` measured: rows, and the file they are kept in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvdit.bench import saved
from qvdit.bench.shapes import Shape
from qvdit.contract.files import write_json

# Dense peaks by NVIDIA's data sheets, TOP/s: int8 (and fp8), bf16. Other GPUs: no share of a ceiling is given.
_PEAKS = {"NVIDIA H200": (1979.0, 989.0), "NVIDIA H100 80GB HBM3": (1979.0, 989.0)}


@dataclass(frozen=True)
class Row:
    """One thing timed at one size: ``ms`` a call, median; ``spread``, interquartile range over median."""

    m: int
    n: int
    k: int
    what: str
    weight_bits: int | None  # None where there are no weights
    act_bits: int | None
    rank: int
    ms: float
    spread: float
    tops: float | None = None  # 2 M N K / time; of a block, what its matrix products and attention take
    gb_s: float | None = None  # bytes that must be moved / time, where memory is the bound
    tile: str | None = None  # the GEMM's, where one was forced
    prologue: str | None = None  # the quantizer's, where it is not plain
    parts_ms: dict[str, float] | None = None  # of a block: where the time goes
    sustained: bool | None = None  # True: by itself, at the clocks that the GPU's power limit leaves it; else in turns

    @property
    def shape(self) -> Shape:
        return Shape(self.m, self.n, self.k)


_NUMBER, _BITS = (int, float), (int, type(None))
_REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("m", "n", "k", "rank"), (int,)),
    "what": (str,),
    **dict.fromkeys(("weight_bits", "act_bits"), _BITS),
    **dict.fromkeys(("ms", "spread"), _NUMBER),
    "tops": (*_NUMBER, type(None)),
}


@dataclass(frozen=True)
class Results:
    """One run on one GPU."""

    command: str
    gpu: str
    driver: str
    versions: dict[str, str]
    date: str
    copy_tb_s: float  # read and written, of a large copy
    rows: tuple[Row, ...] = ()
    power_limit_w: float | None = None  # the GPU's, where nvidia-smi tells: it bounds the clocks of long products

    @property
    def peaks(self) -> tuple[float, float] | None:
        """Dense int8 and bf16 TOP/s of the data sheet, where it is known."""
        return _PEAKS.get(self.gpu)

    def shapes(self) -> list[Shape]:
        """The sizes of linears, in the order they were timed."""
        return list(dict.fromkeys(row.shape for row in self.rows if not row.what.startswith("block_")))

    def find(
        self,
        shape: Shape,
        what: str,
        rank: int = 0,
        weight_bits: int | None = None,
        prologue: str | None = None,
        sustained: bool = False,
    ) -> Row | None:
        """What was timed at a size, in turns or by itself (``sustained``); of several forced tiles the fastest."""
        found = [
            row
            for row in self.rows
            if (row.shape, row.what, row.rank, row.prologue) == (shape, what, rank, prologue)
            and bool(row.sustained) == sustained
            and weight_bits in (None, row.weight_bits)
            and (row.tile is None or what == "cutlass_s8")
        ]
        return min(found, key=lambda row: row.ms, default=None)

    def blocks(self) -> list[Row]:
        """The rows of whole blocks."""
        return [row for row in self.rows if row.what.startswith("block_")]


def save(results: Results, path: Path) -> None:
    """Write the file, whole or not at all. Keys that say nothing are left out of it."""
    rows = [
        {key: value for key, value in asdict(row).items() if value is not None or key in _REQUIRED}
        for row in results.rows
    ]
    header = {key: value for key, value in asdict(results).items() if value is not None}
    write_json(path, {**header, "rows": rows})


def load(path: Path) -> Results:
    """Read a file that :func:`save` wrote; anything else raises QvditError."""
    return saved.load(Results, _row, path, "a JSON of `qvdit bench kernels`")


def _row(value: dict[str, Any]) -> Row:
    missing = [key for key in _REQUIRED if key not in value]
    if missing:
        raise ValueError(f"a row without {', '.join(missing)}")
    wrong = [f"{key} {value[key]!r}" for key, types in _REQUIRED.items() if not isinstance(value[key], types)]
    if wrong:
        raise ValueError(f"a row with {', '.join(wrong)}")
    return Row(**value)
