"""Skips what needs the kernels where they cannot run, and catches kernels that leave or overrun their outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvdit.contract import QvditError
from qvdit.runtimes import cuda, torch_ops

GUARD = 4096  # bytes before and after every output
POISON, CANARY = 0x7B, 0x5C


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        cuda.library().check_device()
    except QvditError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.xdist_group("gpu"))  # one process: the GPU's memory is shared
            if reason and item.path.parent == Path(__file__).parent:  # folders have reasons of their own
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every output starts poisoned, between canaries that must still live at the end of the test."""
    if "unguarded" in request.keywords:
        yield
        return
    kept: list[torch.Tensor] = []

    def new(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        buffer = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.uint8, device=like.device)
        kept.append(buffer)
        inside = buffer[GUARD : GUARD + size]
        inside.fill_(POISON)
        return inside.view(dtype).view(shape)

    monkeypatch.setattr(torch_ops, "_new", new)
    yield
    for buffer in kept:
        edges = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
        assert (edges == CANARY).all(), "written outside an output"
