"""How large a video is."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from qvdit.contract.errors import QvditError


@dataclass(frozen=True)
class VideoSize:
    """Frames, and height and width in pixels."""

    frames: int
    height: int
    width: int

    @staticmethod
    def parse(text: str) -> VideoSize:
        """``17x256x448`` → 17 frames, 256 pixels high and 448 wide; QvditError for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if found is None or "0" in (given := [number.lstrip("0") or "0" for number in found.groups()]):
            raise QvditError(f"--size {text!r}", "FRAMESxHEIGHTxWIDTH in pixels", "for example --size 17x256x448")
        return VideoSize(*map(int, given))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


OPTIONAL = {"size", "precision"}  # fields that JSON made before there were such does not have


def described(value: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it, for digests; of what came later None is left out, as it was before."""
    return dataclasses.asdict(
        value, dict_factory=lambda pairs: {name: v for name, v in pairs if not (v is None and name in OPTIONAL)}
    )
