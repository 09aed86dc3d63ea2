"""One model as one engine: the folder between those who prepare it and those who measure it. No PyTorch.

CASES/MODEL/ENGINE/tensorrt/model.onnx, layers.onnx    as in a bundle; FP16 has no layers
                   parity/…                            as in a bundle: inputs, outputs and layers of PyTorch's run
                   case.json, half.safetensors         this file's
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvdit.contract import QvditError
from qvdit.contract.bundle import PARITY_HALF
from qvdit.contract.files import read_json, write_json
from qvdit.contract.parity import load_half

MODELS = ("wan-shapes", "latte-shapes", "latte-xl-block", "latte-xl-slice", "latte-xl")
ENGINES = ("fp16", "int8_qdq", "w8a8", "w4a8", "w4a8_no_tqe", "w3a6")
USUAL_MODELS = ("wan-shapes", "latte-shapes", "latte-xl-slice")
FULL_XL = ("fp16", "w4a8")  # engines of latte-xl: a build takes minutes
FORMAT = 2
_CASE = "case.json"


@dataclass(frozen=True)
class Case:
    """What is known of a case beside its files."""

    model: str
    engine: str
    weight_bytes: int  # stored for the weights of the linears: integers, scales, zeros, TQE, gains; biases aside
    layers: int  # quantized ones
    versions: dict[str, str]  # of the tools that prepared it
    format: int = FORMAT


def folder(root: Path, model: str, engine: str) -> Path:
    """Where a case is."""
    return root / model / engine


def engines_of(model: str, asked: tuple[str, ...] = ENGINES) -> tuple[str, ...]:
    """The engines of those asked for that a model is measured as."""
    return tuple(engine for engine in asked if model != "latte-xl" or engine in FULL_XL)


def save(case: Case, where: Path) -> None:
    """Write what makes a folder a case; do it last, after its parity files, PyTorch's FP16 run among them."""
    write_json(where / _CASE, dataclasses.asdict(case))


def exists(where: Path) -> bool:
    """Whether a folder is a whole case."""
    return (where / _CASE).is_file()


def is_current(where: Path) -> bool:
    """Whether a folder is a whole case of this version."""
    content: Any = read_json(where / _CASE, "a case to measure") if exists(where) else None
    return isinstance(content, dict) and content.get("format") == FORMAT


def load(where: Path) -> tuple[Case, np.ndarray]:
    """A case, and the output of PyTorch's FP16 run, float32; QvditError where it is none."""
    fix = "prepare it: qvdit bench tensorrt --prepare-only"
    content: Any = read_json(where / _CASE, "a case to measure")
    names = {field.name for field in dataclasses.fields(Case)}
    if not isinstance(content, dict) or set(content) != names or content["format"] != FORMAT:
        raise QvditError(f"{where / _CASE} of another version", f"format {FORMAT}", fix)
    half = load_half(where)
    if half is None:
        raise QvditError(f"{where} without {PARITY_HALF}", "a whole case", fix)
    return Case(**content), half


def parse(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Names separated by commas, each of which must be known, in the known order."""
    asked = [name.strip() for name in text.split(",")]
    wrong = [name for name in asked if name not in known]
    if wrong:
        raise QvditError(f"{option} {wrong[0]!r}", f"some of {', '.join(known)}", f"check {option}")
    return tuple(name for name in known if name in asked)
