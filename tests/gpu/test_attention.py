"""The attention kernel against float64, over layouts, sizes around its tiles, and what is no number."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qvdit.contract import QvditError
from qvdit.runtimes import cuda, torch_ops

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding to nearest
SIZES = [8, 16, 32, 40, 48, 56, 64, 72, 80, 96, 104, 128]


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, other: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """y [B, L, H, D] of q [B, L, H, D], k and v [B, S, H, D], whatever their strides. other: arguments to replace."""
    y = torch_ops._new(q, tuple(q.shape), q.dtype)
    arguments = torch_ops.attention_args(q, k, v, y, scale)
    for name, value in (other or {}).items():
        setattr(arguments, name, value)
    cuda.library().attention(arguments, torch.cuda.current_stream().cuda_stream)
    return y


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * scale).softmax(-1) @ v).transpose(1, 2)


def drawn(batch: int, rows: int, keys: int, heads: int, size: int, dtype: torch.dtype, spread: float = 1.0) -> Any:
    generator = torch.Generator("cuda").manual_seed(rows * 131 + keys)
    shapes = ((batch, rows, heads, size), (batch, keys, heads, size), (batch, keys, heads, size))
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32) for shape in shapes)
    return (q * spread).to(dtype), k.to(dtype), v.to(dtype)


def assert_close(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
    """Each weight is rounded once, relative to its row's largest, and so is y: bounded by the values' magnitudes."""
    wanted = expected(q, k, v, scale)
    magnitude = expected(q, k, v.abs(), scale)
    bound = 3 * EPSILON[q.dtype] * magnitude + 1e-6
    assert ((found.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (16, 16), (17, 15), (33, 64), (100, 65), (129, 200), (300, 7)])
def test_attention(rows: int, keys: int, size: int, dtype: torch.dtype) -> None:
    q, k, v = drawn(2, rows, keys, 3, size, dtype)
    scale = size**-0.5
    assert_close(run(q, k, v, scale), q, k, v, scale)


@pytest.mark.parametrize("packed", ["qkv", "kv", "heads first"])
def test_layouts(packed: str) -> None:
    batch, rows, keys, heads, size = 2, 50, 50, 4, 72
    q, k, v = drawn(batch, rows, keys, heads, size, torch.float16)
    wide = torch.cat([x.reshape(batch, rows, -1) for x in (q, k, v)], -1)
    parts = [x.unflatten(-1, (heads, size)) for x in wide.chunk(3, -1)]
    if packed == "kv":
        parts[0] = q
    if packed == "heads first":
        parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert any(not x.is_contiguous() for x in parts)
    found = run(parts[0], parts[1], parts[2], 0.1)
    assert torch.equal(found, run(q, k, v, 0.1))


@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_steep_scores(spread: float) -> None:
    q, k, v = drawn(1, 130, 333, 2, 64, torch.float16, spread)
    assert_close(run(q, k, v, 0.3), q, k, v, 0.3)


def test_many_rows_of_few() -> None:
    """Frames of every place: more heads than a grid's second axis holds."""
    q, k, v = drawn(70000, 3, 3, 1, 16, torch.float16)
    assert_close(run(q, k, v, 0.25), q, k, v, 0.25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_no_number_stays_alone(value: float) -> None:
    q, k, v = drawn(1, 40, 40, 2, 32, torch.float16)
    good = run(q, k, v, 0.2)
    q[0, 5, 1, 3] = value
    found = run(q, k, v, 0.2)
    assert found[0, 5, 1].isnan().all()
    alone = torch.ones(40, 2, dtype=torch.bool, device="cuda")
    alone[5, 1] = False
    assert torch.equal(found[0][alone], good[0][alone])


def test_keys_that_are_not_there_are_not_read() -> None:
    """Behind the last key lie NaNs: neither they nor their weights of zero may show."""
    q, k, v = drawn(1, 20, 80, 2, 72, torch.float16)
    good = run(q, k[:, :70], v[:, :70], 0.1)
    k[:, 70:], v[:, 70:] = float("nan"), float("nan")
    assert torch.equal(run(q, k[:, :70], v[:, :70], 0.1), good)


def test_refusals() -> None:
    q, k, v = drawn(1, 16, 16, 2, 32, torch.float16)
    for wrong, said in (
        ({"head_size": 12}, "multiple of 8"),
        ({"head_size": 136}, "multiple of 8"),
        ({"scale": 0.0}, "positive"),
        ({"scale": float("inf")}, "positive"),
        ({"dtype": cuda.Dtype.F32}, "float16"),
        ({"keys": 0}, "keys"),
        ({"q": q.data_ptr() + 2}, "16 bytes"),
        ({"v_row": 60}, "multiples of 8"),
        ({"y": None}, "must be given"),
    ):
        with pytest.raises(QvditError, match=said):
            run(q, k, v, 0.1, wrong)
    for nothing in itertools.product((0, 1), repeat=2):
        if not all(nothing):
            run(q, k, v, 0.1, {"batch": nothing[0], "rows": nothing[1]})


def test_large_enough_for_every_wave() -> None:
    q, k, v = drawn(4, 1024, 1024, 16, 72, torch.float16)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    found = run(q, k, v, 72**-0.5)
    assert (found.float() - wanted.float()).abs().max() < 2e-3
