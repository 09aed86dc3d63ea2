"""An engine's file and what it was built from and for: read and checked before TensorRT sees a byte of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvdit.contract import QvditError
from qvdit.contract.bundle import ENGINE, ENGINE_FACTS, ENGINE_PARITY, TENSORRT_MODEL
from qvdit.contract.files import read_json, sha256, write_atomic, write_json
from qvdit.runtimes.tensorrt.device import Gpu

FORMAT = 1
_AGAIN = "build it again: qvdit engine, or python -m qvdit.runtimes.tensorrt"

Profile = dict[str, list[list[int]]]
"""Input name → its smallest, most common and largest shape."""


@dataclass(frozen=True)
class EngineFacts:
    """``tensorrt/engine.json``."""

    tensorrt: str
    gpu: str
    compute: str  # capability, "9.0"
    driver: str
    profile: Profile
    onnx_sha256: dict[str, str]  # of the model and its data, by name inside the bundle
    plugin_sha256: str | None
    plugin_version: str | None
    plugin_tensorrt: str | None
    optimization_level: int | None
    workspace: int | None
    build_seconds: float
    engine_sha256: str
    engine_bytes: int
    device_bytes: int  # scratch memory that a context needs
    format: int = FORMAT


def model_hashes(bundle: Path) -> dict[str, str]:
    """sha256 of what an engine is built from."""
    names = [TENSORRT_MODEL, f"{TENSORRT_MODEL}.data"]
    return {name: sha256(bundle / name) for name in names if (bundle / name).is_file()}


def pending(path: Path) -> Path:
    """Where a file is until it has been proven. Not hidden: a build that was killed may be looked at."""
    return path.with_name(f"{path.name}.new")


def install(bundle: Path, plan: bytes, facts: EngineFacts) -> None:
    """Put a proven engine, whose parity result is pending, in the last one's place."""
    write_atomic(pending(bundle / ENGINE), lambda path: path.write_bytes(plan))
    write_json(pending(bundle / ENGINE_FACTS), dataclasses.asdict(facts))
    pending(bundle / ENGINE).replace(bundle / ENGINE)
    complete_install(bundle)


def complete_install(bundle: Path) -> None:
    """Finish what :func:`install` began, if it was ended between its renames.

    The engine's file comes first: facts that are pending and of the engine in place belong there.
    """
    facts = pending(bundle / ENGINE_FACTS)
    if not facts.is_file() or not (bundle / ENGINE).is_file():
        return
    try:
        if _parsed(facts).engine_sha256 != sha256(bundle / ENGINE):
            return  # of an engine that was never put in place, and will be built again
    except QvditError:
        return  # left by another version of this program: the next build replaces it
    try:
        for name in (ENGINE_PARITY, ENGINE_FACTS):
            with contextlib.suppress(FileNotFoundError):  # another process is at the same
                pending(bundle / name).replace(bundle / name)
    except OSError as error:
        raise QvditError(
            f"{bundle / ENGINE}, whose installation was cut short and cannot be finished ({error})",
            "a folder that can be written",
            f"rename {facts} to {bundle / ENGINE_FACTS}",
        ) from None


def read_facts(bundle: Path) -> EngineFacts:
    """The facts of a bundle's engine; QvditError where there is none, or it is not the one they are of."""
    engine, path = bundle / ENGINE, bundle / ENGINE_FACTS
    complete_install(bundle)
    if not engine.is_file():
        raise QvditError(
            f"no file {engine}", "an engine", "build it: qvdit engine, or python -m qvdit.runtimes.tensorrt"
        )
    facts = _parsed(path)
    found = engine.stat().st_size
    if found != facts.engine_bytes:
        raise QvditError(f"{engine} of {found} bytes", f"{facts.engine_bytes}: it is damaged", _AGAIN)
    return facts


def read_engine(bundle: Path, facts: EngineFacts) -> bytes:
    """The engine's bytes, compared with their sha256."""
    path = bundle / ENGINE
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != facts.engine_sha256:
        raise QvditError(f"{path}, which is damaged", f"the sha256 that {ENGINE_FACTS} names", _AGAIN)
    return content


def _parsed(path: Path) -> EngineFacts:
    content: Any = read_json(path, "what the engine was built from")
    names = {field.name for field in dataclasses.fields(EngineFacts)}
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != names:
        raise QvditError(f"{path} of another version", f"format {FORMAT}", _AGAIN)
    return EngineFacts(**content)


def check_facts(facts: EngineFacts, tensorrt: str, gpu: Gpu, hashes: dict[str, str]) -> None:
    """Refuse an engine of another TensorRT, another GPU or another model."""
    if facts.tensorrt != tensorrt:
        raise QvditError(f"an engine of TensorRT {facts.tensorrt}", f"one of {tensorrt}, which is here", _AGAIN)
    if (facts.gpu, facts.compute) != (gpu.name, gpu.compute):
        raise QvditError(
            f"an engine for {facts.gpu} (sm {facts.compute})", f"one for {gpu.name} (sm {gpu.compute})", _AGAIN
        )
    if facts.onnx_sha256 != hashes:
        raise QvditError("an engine of another model", f"one of this bundle's {TENSORRT_MODEL}", _AGAIN)
