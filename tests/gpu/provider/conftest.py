"""Tests of ONNX Runtime's CUDA provider, with onnxruntime-gpu in front of the package for CPUs; no kernels needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvdit.contract import QvditError
from qvdit.runtimes.tensorrt.device import Device

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why the provider cannot run here, or None."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} has no CUDA provider: pip install onnxruntime-gpu"
    try:
        Device()
    except QvditError as error:
        return str(error)
    return None if os.environ.get("QVDIT_TEST_BUNDLES") else "no QVDIT_TEST_BUNDLES: folders of bundles"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def bundles() -> list[Path]:
    return [Path(name) for name in os.environ["QVDIT_TEST_BUNDLES"].split(os.pathsep) if name]
