"""What parity found for many engines, in one JSON: of the folders that tests/gpu/tensorrt86.sh left.

python3 tests/gpu/parity_table.py FOLDER … --out tests/benchmarks/results/tensorrt-parity.json

A FOLDER is searched for parity.json with its engine.json beside it, in folders that bear the bundle's name (NAME/ or
NAME/level-N/), for parity.json.new, which an engine that was refused leaves, and for videos.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from qvdit.contract.files import write_json

COUNTS = ("layers_compared", "xq_compared", "xq_mismatches", "acc_compared", "acc_mismatches")
ERRORS = ("model_rel_err", "error_ratio", "half_error_ratio")
FACTS = (
    "tensorrt",
    "plugin_version",
    "gpu",
    "driver",
    "optimization_level",
    "build_seconds",
    "engine_bytes",
    "device_bytes",
)


def found(path: Path) -> dict[str, Any]:
    """What parity found for one engine."""
    result = json.loads(path.read_text())
    folder = path.parent.parent if path.parent.name.startswith("level-") else path.parent
    return {
        "bundle": folder.name,
        **{name: result[name] for name in COUNTS},
        **{name: result.get(name) for name in ERRORS},
        "worst_layer": max(layer["runtime_rel_err"] for layer in result["layers"]),
    }


def row(path: Path) -> dict[str, Any]:
    """That, and what is known of the engine."""
    facts = json.loads(path.with_name("engine.json").read_text())
    fixed = all(low == high for low, _, high in facts["profile"].values())
    return {**found(path), "fixed_size": fixed, **{name: facts[name] for name in FACTS}}


def main() -> int:
    """Collect; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    paths = [path for folder in given.folders for path in sorted(folder.rglob("parity.json"))]
    rows = [row(path) for path in paths if path.with_name("engine.json").is_file()]
    refused = [found(path) for folder in given.folders for path in sorted(folder.rglob("parity.json.new"))]
    judged = [json.loads(path.read_text()) for folder in given.folders for path in sorted(folder.rglob("videos.json"))]
    videos = [video for videos in judged for video in videos if "psnr_db_engine_pytorch" in video]
    write_json(given.out, {"engines": rows, "refused": refused, "videos": videos})
    for each in rows:
        print(
            f"{each['bundle']}: {each['layers_compared']} layers, {each['xq_mismatches']} x_q and "
            f"{each['acc_mismatches']} acc differ, error {each['half_error_ratio']} of PyTorch's FP16 run"
        )
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
