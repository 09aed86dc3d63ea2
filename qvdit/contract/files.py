"""Files that are written whole or not at all, and stay where they belong."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvdit.contract.errors import QvditError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` beside ``path``, flush it to disk and rename it: a killed run leaves old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    share(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def share(path: Path) -> None:
    """Give a file the permissions of any new one, 0666 less the umask: a bundle is made to be copied and served.

    safetensors and ONNX's external data write for the owner alone. Not for threads: the umask is read by setting it.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; the same value always gives the same bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """The value, or None for NaN and Inf, which JSON cannot hold: a model that yields NaN has no PSNR."""
    return value if math.isfinite(value) else None


def read_json(path: Path, what: str) -> Any:
    """Read JSON; a missing or damaged file is the user's to know about. ``what`` names it in the error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QvditError(f"no file {path}", what, "check the path, or make it again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QvditError(f"{path}, which is not JSON ({error})", what, "make it again") from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refused where it would leave the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise QvditError(
            f"the path {name!r}", f"a file inside {folder}", "do not use this bundle: it was tampered with"
        )
    return path
