"""Bit widths: what the operator supports and how a user writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qvdit.contract.errors import QvditError

WEIGHT_BITS = (2, 3, 4, 6, 8)
ACT_BITS = (6, 8)


@dataclass(frozen=True)
class Bits:
    """Bits of a weight and of an activation, written ``w4a8``."""

    weight: int
    act: int

    @staticmethod
    def parse(text: str) -> Bits:
        """Read ``w4a8``."""
        match = re.fullmatch(r"w([0-9])a([0-9])", text.strip().lower())
        if match and int(match[1]) in WEIGHT_BITS and int(match[2]) in ACT_BITS:
            return Bits(int(match[1]), int(match[2]))
        raise QvditError(
            f"bits {text!r}",
            f"wXaY with X in {', '.join(map(str, WEIGHT_BITS))} and Y in {', '.join(map(str, ACT_BITS))}",
            "for example --bits w4a8",
        )

    def __str__(self) -> str:
        return f"w{self.weight}a{self.act}"
