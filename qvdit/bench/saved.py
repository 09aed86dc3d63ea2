"""What the files of every benchmark's results have in common: a header's fields, and rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qvdit.contract import QvditError
from qvdit.contract.files import read_json

Results = TypeVar("Results")


class Timed(Protocol):
    """Something with a time."""

    @property
    def ms(self) -> float: ...


def load(results: type[Results], row: Callable[[dict[str, Any]], Any], path: Path, what: str) -> Results:
    """Read results, a dataclass with ``rows``; anything else than ``what`` raises QvditError."""
    value: Any = read_json(path, what)
    try:
        header = {f.name: value[f.name] for f in fields(results) if f.name in value or f.default is MISSING}  # type: ignore[arg-type]
        return results(**{**header, "rows": tuple(row(found) for found in header["rows"])})
    except (KeyError, TypeError, ValueError) as error:
        raise QvditError(f"{path}, which lacks or adds something ({error})", what, "make it again") from None


def ratio(slow: Timed | None, fast: Timed | None) -> float | None:
    """How many times as fast the second is."""
    return None if slow is None or fast is None else slow.ms / fast.ms
