"""Tests of real engines. They run in TensorRT's Python, without PyTorch: tests/gpu/tensorrt86.sh."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qvdit.contract import QvditError
from qvdit.runtimes.tensorrt import versions
from qvdit.runtimes.tensorrt.device import driver

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why engines cannot run here, or None."""
    try:
        versions.tensorrt()
        driver()
    except QvditError as error:
        return str(error)
    return None if os.environ.get("QVDIT_TEST_BUNDLES") else "no QVDIT_TEST_BUNDLES: folders of bundles with engines"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def bundles() -> list[Path]:
    return [Path(name) for name in os.environ["QVDIT_TEST_BUNDLES"].split(os.pathsep) if name]


@pytest.fixture
def copied(bundles: list[Path], tmp_path: Path) -> Path:
    """A copy of the first bundle with its engine, to be damaged."""
    kept = ("tensorrt", "parity", "onnx", "quantized", "manifest.json")
    for name in kept:
        source = bundles[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path
