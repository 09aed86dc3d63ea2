"""Stages that are done once: each leaves a marker with what it depended on and what it wrote.

A stage whose marker fits its key and whose files are still those it wrote is reused; anything else runs again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvdit.contract.files import sha256, write_json
from qvdit.system import tool_versions


@dataclass(frozen=True)
class StageCost:
    """What a stage took when it ran."""

    seconds: float
    peak_memory_bytes: int
    reused: bool


class Stages:
    """Runs or reuses the stages of one job."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self.costs: dict[str, StageCost] = {}
        self._results: dict[str, str] = {}

    def run(self, name: str, depends: Any, files: Callable[[], list[Path]], work: Callable[[], object]) -> bool:
        """Do ``work`` unless it was done with the same ``depends``; returns whether it was done now.

        depends: JSON-able; name earlier stages in it through :meth:`result`. files: what the stage leaves behind.
        """
        key = self.key(name, depends)
        marker = self.folder / f"{name}.json"
        done = self._finished(marker, key)
        if done is not None:
            self.costs[name] = StageCost(done["seconds"], done["peak_memory_bytes"], True)
            self._results[name] = _digest(done["files"])
            return False
        marker.unlink(missing_ok=True)
        _reset_peak_memory()
        started = time.monotonic()
        work()
        cost = StageCost(round(time.monotonic() - started, 2), peak_memory(), False)
        written = {str(path.relative_to(self.root)): sha256(path) for path in files()}
        write_json(marker, {"key": key, "files": written, **asdict(cost)})
        self.costs[name] = cost
        self._results[name] = _digest(written)
        return True

    @staticmethod
    def key(name: str, depends: Any) -> str:
        """What a stage's work depends on, these tools among it, as a digest."""
        return _digest([tool_versions(), name, depends])

    def result(self, name: str) -> str:
        """A digest of what a stage of this job left behind, for later stages to depend on."""
        return self._results[name]

    def _finished(self, marker: Path, key: str) -> dict[str, Any] | None:
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("key") != key:
            return None
        intact = all((self.root / n).is_file() and sha256(self.root / n) == h for n, h in content["files"].items())
        return content if intact else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _reset_peak_memory() -> None:
    """Start counting peak memory anew, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most resident memory in bytes since the last reset, or of the process where there is no reset."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
