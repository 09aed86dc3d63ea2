"""The rotation: an orthogonal transform that weights undo, and that spreads outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract.layer import rotation_block
from qvdit.method.operator import transform, walsh_hadamard
from qvdit.method.quantization import Prepared
from qvdit.method.statistics import InputStatistics

BLOCKS = [1, 2, 4, 8, 64, 256]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(block: int) -> torch.Tensor:
    """H_B by Sylvester's construction, float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < block:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_orthogonal(block):
    found = walsh_hadamard(torch.eye(block), block).double()
    assert torch.equal(found, matrix(block))
    assert torch.equal(found @ found.T, block * torch.eye(block, dtype=torch.float64))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("k", "block"), [(192, 64), (256, 256), (640, 128), (768, 256), (24, 8), (37, 0), (2, 2), (1, 0)]
)
def test_the_block_is_the_largest_power_of_two_in_k(k, block):
    assert rotation_block(k) == block


def test_blocks_do_not_mix():
    x = draw(3, 24)
    found = walsh_hadamard(x, 8)
    for start in (0, 8, 16):
        assert torch.equal(found[:, start : start + 8], walsh_hadamard(x[:, start : start + 8], 8))
    assert torch.equal(walsh_hadamard(x, 0), x)


def butterfly(row: np.ndarray, block: int) -> np.ndarray:
    """The definition word for word: one pair of float32 values after the other."""
    out = row.astype(np.float32).copy()
    half = 1
    while half < block:
        for index in range(len(out)):
            if not index & half:
                a, b = out[index], out[index + half]
                out[index], out[index + half] = a + b, a - b
        half *= 2
    return out


@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([2, 4, 16, 64]), blocks=st.integers(1, 5))
def test_the_order_of_additions_is_the_definitions(seed, block, blocks):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, block * blocks)) * np.exp(rng.normal(0, 4, block * blocks))).astype(np.float32)
    found = walsh_hadamard(torch.from_numpy(x), block).numpy()
    np.testing.assert_array_equal(found, np.stack([butterfly(row, block) for row in x]))


@given(values=st.lists(st.integers(-1000, 1000), min_size=32, max_size=32), block=st.sampled_from([2, 8, 32]))
def test_twice_is_a_multiple_where_arithmetic_is_exact(values, block):
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(walsh_hadamard(walsh_hadamard(x, block), block), block * x)


def test_it_spreads_an_outlier():
    x = 0.1 * draw(256)
    x[17] = 100.0
    rotated = walsh_hadamard(x, 256) / 256**0.5
    assert rotated.norm() == pytest.approx(x.norm().item(), rel=1e-5)
    assert rotated.abs().max() < 10  # 100 / √256, and a little
    assert rotated.abs().max() / rotated.abs().median() < 2


def statistics_of(x: torch.Tensor) -> InputStatistics:
    return InputStatistics(x.abs().amax(0)[None], x.mean(0), x.T @ x / len(x))


@pytest.mark.parametrize("k", [24, 64, 37])
def test_the_weights_undo_it_exactly(k):
    """In exact arithmetic: small integers, signs and scales that are powers of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (20, k), generator=generator).float()
    weight = torch.randint(-8, 9, (5, k), generator=generator).float()
    smooth = 2.0 ** torch.randint(-2, 3, (k,), generator=generator) * (
        torch.randint(2, (k,), generator=generator) * 2 - 1
    )
    block = rotation_block(k)
    prepared = Prepared.of(weight, statistics_of(x), smooth, block)
    assert torch.equal(transform(x, 1 / smooth, block) @ prepared.weight.T, x @ weight.T)


@pytest.mark.parametrize("smoothed", [True, False])
def test_statistics_turn_with_the_input(smoothed):
    x = draw(500, 24) @ draw(24, 24, seed=1) + draw(24, seed=2)
    smooth = draw(24, seed=3).exp() * draw(24, seed=4).sign() if smoothed else None
    turned = transform(x, None if smooth is None else 1 / smooth, 8)
    prepared = Prepared.of(draw(5, 24), statistics_of(x), smooth, 8)
    expected = statistics_of(turned)
    torch.testing.assert_close(prepared.mean, expected.mean, rtol=1e-3, atol=1e-3)
    size = expected.second_moment.diagonal().max().item()
    torch.testing.assert_close(prepared.second_moment, expected.second_moment, rtol=1e-4, atol=1e-5 * size)
    centred = turned - turned.mean(0)
    torch.testing.assert_close(prepared.covariance(), centred.T @ centred / 500, rtol=1e-3, atol=1e-4 * size)
