"""Sizes of linears: those of video DiTs."""

from __future__ import annotations

from dataclasses import dataclass

from qvdit.contract import QvditError
from qvdit.contract.layer import ROW_PAD


@dataclass(frozen=True, order=True)
class Shape:
    """M rows, N output features, K input features."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"


MODELS = (  # STDiT-XL and Latte, Wan 1.3B, Wan 14B
    Shape(32768, 1152, 1152),
    Shape(32768, 3456, 1152),
    Shape(32768, 4608, 1152),
    Shape(32768, 1152, 4608),
    Shape(32768, 1536, 1536),
    Shape(32768, 8960, 1536),
    Shape(32768, 1536, 8960),
    Shape(32768, 5120, 5120),
    Shape(32768, 13824, 5120),
    Shape(512, 5120, 5120),
)
# CogVideoX's hidden 1920 and HunyuanVideo's 3072, attention and MLP. The many rows come first: peers that are compiled
# once for all numbers of rows are then tuned for many.
_LAYERS = ((1920, 1920), (7680, 1920), (3072, 3072), (12288, 3072), (3072, 12288))
_ROWS = (32768, 16384, 118784, 512)
ALL = (*MODELS, *(Shape(m, n, k) for n, k in _LAYERS for m in _ROWS))
QUICK = (
    Shape(32768, 1152, 1152),
    Shape(32768, 1152, 4608),
    Shape(32768, 5120, 5120),
    Shape(16384, 12288, 3072),
    Shape(512, 5120, 5120),
)


def parse(text: str) -> tuple[Shape, ...]:
    """``all``, ``quick``, ``none``, or MxNxK separated by commas."""
    named = {"all": ALL, "quick": QUICK, "none": ()}
    return named[text] if text in named else tuple(_one(part) for part in text.split(","))


def _one(text: str) -> Shape:
    sizes = text.strip().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise QvditError(f"--shapes {text!r}", "MxNxK", "for example --shapes 32768x1152x4608,512x5120x5120")
    m, n, k = map(int, sizes)
    if n % ROW_PAD or k % ROW_PAD:
        raise QvditError(f"--shapes {text!r}", f"N and K that are multiples of {ROW_PAD}", "the peers take no others")
    return Shape(m, n, k)
