"""qvdit_gated_residual against PyTorch: residual + gate · x in float32, and where its rows are written."""

from __future__ import annotations

import pytest
import torch

from qvdit.contract import QvditError
from qvdit.runtimes import cuda

DTYPES = {torch.float16: cuda.Dtype.F16, torch.bfloat16: cuda.Dtype.BF16}
SHAPES = [(6, 5, 24), (4, 7, 1), (2, 3, 13), (12, 64, 192), (8, 33, 1152), (2, 1030, 8)]  # B, L, K


def launched(
    residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor | None, swapped: int = 0, y: torch.Tensor | None = None
) -> torch.Tensor:
    """y [B · L, K], poisoned before; residual, x [B, L, K], gate [B or 1, 1, K]."""
    batch, rows, features = residual.shape
    y = torch.full((batch * rows, features), torch.nan, device="cuda") if y is None else y
    arguments = cuda.GatedResidualArgs(
        residual=residual.data_ptr(),
        x=x.data_ptr(),
        m=batch * rows,
        k=features,
        x_dtype=DTYPES[x.dtype],
        gate=None if gate is None else gate.data_ptr(),
        rows_per_gate=0 if gate is None else batch * rows // len(gate),
        swapped=swapped,
        swapped_inner=rows if swapped else 0,
        y=y.data_ptr(),
    )
    cuda.library().gated_residual(arguments, torch.cuda.current_stream().cuda_stream)
    return y


def drawn(shape: tuple[int, int, int], dtype: torch.dtype, gates: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    residual, x = (torch.randn(shape, device="cuda", generator=generator) for _ in range(2))
    gate = torch.randn((gates, 1, shape[2]), device="cuda", generator=generator)
    return residual, x.to(dtype), gate


def expected(residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """One rounding a value, as a fused multiply-add has."""
    term = x.double() if gate is None else gate.double() * x.double()
    return (residual.double() + term).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gates", ["none", "one", "each"])
def test_it_is_the_sum(dtype, shape, gates):
    residual, x, gate = drawn(shape, dtype, shape[0] if gates == "each" else 1)
    chosen = None if gates == "none" else gate
    found = launched(residual, x, chosen)
    assert torch.equal(found, expected(residual, x, chosen).flatten(0, 1))


@pytest.mark.parametrize(("shape", "outer"), [((6, 5, 24), 3), ((6, 5, 13), 2), ((32, 64, 192), 16), ((4, 1, 8), 4)])
def test_swapped_rows(shape, outer):
    residual, x, gate = drawn(shape, torch.float16, shape[0])
    whole = expected(residual, x, gate).unflatten(0, (-1, outer)).transpose(1, 2)
    assert torch.equal(launched(residual, x, gate, outer), whole.reshape(-1, shape[2]))


def test_in_place():
    residual, x, gate = drawn((4, 9, 40), torch.bfloat16, 4)
    whole = expected(residual, x, gate).flatten(0, 1)
    launched(residual, x, gate, y=residual)
    assert torch.equal(residual.flatten(0, 1), whole)


def test_rows_that_begin_between_vectors():
    """Features in eights, addresses that are none of 16 bytes."""
    residual, x, gate = drawn((3, 4, 17), torch.float16, 3)
    cut = [tensor.flatten()[1 : 1 + tensor[..., 1:].numel()].view_as(tensor[..., 1:]) for tensor in (residual, x, gate)]
    assert all(tensor.data_ptr() % 16 for tensor in cut)
    assert torch.equal(launched(*cut), expected(*cut).flatten(0, 1))


def test_what_is_no_number_stays_where_it_is():
    residual, x, gate = drawn((2, 3, 16), torch.float16, 2)
    x[0, 1, 3], residual[1, 2, 5] = torch.inf, torch.nan
    bad = ~launched(residual, x, gate).isfinite()
    assert bad.nonzero().tolist() == [[1, 3], [5, 5]]


def test_nothing_is_launched_for_no_rows():
    empty = torch.empty((0, 4, 8), device="cuda")
    assert launched(empty, empty.half(), None).numel() == 0


def test_what_the_kernel_does_not_take_is_refused():
    residual, x, gate = drawn((6, 5, 24), torch.float16, 1)
    with pytest.raises(QvditError, match="30 rows swapped as"):
        launched(residual, x, gate, 4)
    with pytest.raises(QvditError, match="rows swapped in place"):
        launched(residual, x, gate, 3, residual)
