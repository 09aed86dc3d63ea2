"""What a run of ``qvdit bench tensorrt`` measured: rows, and the file they are kept in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qvdit.bench import saved
from qvdit.contract.files import write_json


@dataclass(frozen=True)
class Row:
    """One model as one engine. Errors are relative, of whole outputs."""

    model: str
    engine: str
    ms: float  # a forward pass, median
    spread: float  # interquartile range over median
    engine_bytes: int
    weight_bytes: int  # of the linears, as the engine stores them; biases aside
    device_bytes: int  # of GPU memory that loading the engine and one run took, weights included
    rel_err: float | None  # to PyTorch's own FP16 run of the same, quantized model; None: not finite
    error_ratio: float | None  # its error against full precision over that of PyTorch's FP16 run
    error_ratio_float32: float | None  # … of PyTorch's float32 run of the quantized model; None where none is quantized
    layers_compared: int  # whose integers were compared; static INT8 shows none
    xq_mismatches: int
    acc_mismatches: int
    worst_layer: float | None  # largest relative error of a layer fed the reference's input; None where there is none
    build_seconds: float
    cuda_graph: bool
    plugin_version: str | None = None  # of the plugin in it; None where there is none


@dataclass(frozen=True)
class Results:
    """One run on one GPU."""

    command: str
    gpu: str
    driver: str
    versions: dict[str, str]
    date: str
    rows: tuple[Row, ...] = ()

    def models(self) -> list[str]:
        """Models in the order they were measured."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def find(self, model: str, engine: str) -> Row | None:
        """The row of a model as an engine."""
        return next((row for row in self.rows if (row.model, row.engine) == (model, engine)), None)


def save(results: Results, path: Path) -> None:
    """Write the file, whole or not at all."""
    write_json(path, asdict(results))


def load(path: Path) -> Results:
    """Read a file that :func:`save` wrote; anything else raises QvditError."""
    return saved.load(Results, _row, path, "a JSON of `qvdit bench tensorrt`")


_OPEN = {"rel_err", "error_ratio", "error_ratio_float32", "worst_layer", "plugin_version"}

_TYPES = {"str": str, "str | None": str, "bool": bool, "int": int}


def _row(value: dict[str, Any]) -> Row:
    row = Row(**value)
    for field in fields(Row):
        found = getattr(row, field.name)
        wanted = _TYPES.get(str(field.type), (int, float))
        if not (isinstance(found, wanted) or (found is None and field.name in _OPEN)):
            raise ValueError(f"a row with {field.name} {found!r}")
    return row
