"""Weight grids and rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import WEIGHT_BITS, QvditError
from qvdit.contract.layer import group_size
from qvdit.method.weights import (
    CLIP_SEARCHES,
    WeightGrid,
    cholesky,
    damped,
    per_feature,
    round_second_order,
    search_grid,
    search_second_order,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return draw(n, k, seed=seed) * draw(n, k, seed=seed + 1).square()


def correlated_moment(k: int, seed: int = 3) -> torch.Tensor:
    """E[x xᵀ] of inputs that mostly live in k/4 dimensions."""
    mix = draw(k, k // 4, seed=seed).double()
    return mix @ mix.T + 0.05 * torch.eye(k, dtype=torch.float64)


def full_range_grid(weight: torch.Tensor, bits: int, symmetric: bool) -> WeightGrid:
    """Min and max of the row, and 0, are in the range; nothing is clipped away."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        return WeightGrid(bits, torch.maximum(-low, high) / (2 ** (bits - 1) - 1), torch.zeros(len(weight)))
    scale = (high - low) / (2**bits - 1)
    return WeightGrid(bits, scale, torch.round(-low / scale) - 2 ** (bits - 1))


def row_error(weight: torch.Tensor, grid: WeightGrid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_k importance_k (w - ŵ)² of every row."""
    error = (grid.dequantize(grid.quantize(weight)) - weight).double().square()
    return error.sum(1) if importance is None else error @ importance.double()


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """E‖(W - Ŵ) x‖²."""
    error = (weight - rounded).double()
    return float((error @ moment.double() * error).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("by_importance", [False, True])
def test_clip_search_is_never_worse_than_the_full_range(bits, symmetric, by_importance):
    weight = heavy_tailed(16, 96)
    importance = draw(96, seed=5).square() if by_importance else None
    found = row_error(weight, search_grid(weight, bits, symmetric, importance), importance)
    full = row_error(weight, full_range_grid(weight, bits, symmetric), importance)
    assert (found <= full * (1 + 1e-5)).all()
    if bits <= 4:
        assert found.sum() < 0.96 * full.sum()  # and with outliers and few bits it is better


def test_importance_decides_what_is_clipped():
    """One large weight: kept where its feature is active, clipped where it is not."""
    weight = torch.cat([draw(1, 63) * 0.1, torch.tensor([[4.0]])], dim=1)
    importance = torch.ones(64)
    importance[-1] = 1000.0
    kept = search_grid(weight, 3, False, importance)
    importance[-1] = 0.0
    clipped = search_grid(weight, 3, False, importance)
    assert abs(kept.dequantize(kept.quantize(weight))[0, -1] - 4) < 0.1
    assert clipped.dequantize(clipped.quantize(weight))[0, -1] < 1


def test_values_that_lie_on_a_grid_keep_their_integers():
    weight = torch.stack([0.125 * (torch.arange(16) - 5.0), -0.5 * torch.arange(16.0), 2.0 * torch.arange(16.0)])
    grid = search_grid(weight, 4, False)
    assert grid.scale.tolist() == [0.125, 0.5, 2.0]
    assert grid.zero.tolist() == [5 - 8, 15 - 8, 0 - 8]
    assert grid.quantize(weight).tolist() == [
        list(range(-8, 8)),
        list(range(7, -9, -1)),
        list(range(-8, 8)),
    ]
    assert torch.equal(grid.dequantize(grid.quantize(weight)), weight)


def test_symmetric_values_that_lie_on_a_grid_keep_their_integers():
    weight = 0.25 * (torch.arange(15.0) - 7)[None]
    grid = search_grid(weight, 4, True)
    assert (grid.scale.tolist(), grid.zero.tolist()) == ([0.25], [0.0])
    assert grid.quantize(weight).tolist() == [list(range(-7, 8))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_zero_is_representable_and_integers_are_in_range(bits, symmetric, shift):
    weight = heavy_tailed(8, 40) + shift
    grid = search_grid(weight, bits, symmetric)
    zeros = torch.zeros(8, 3)
    assert torch.equal(grid.dequantize(grid.quantize(zeros)), zeros)
    half = 2 ** (bits - 1)
    assert (grid.low, grid.high) == (-half, half - 1)
    for integers in (grid.quantize(weight * 10), grid.zero):
        assert (integers == integers.round()).all()
        assert integers.min() >= -half
        assert integers.max() <= half - 1
    assert (grid.scale > 0).all()
    if symmetric:
        assert (grid.zero == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_of_a_gaussian_cost_less_than_a_percent(symmetric):
    weight = draw(32, 256)
    grid = search_grid(weight, 8, symmetric)
    relative = (grid.dequantize(grid.quantize(weight)) - weight).norm() / weight.norm()
    assert 0.004 < relative < 0.01


def test_more_bits_cost_less():
    weight = draw(16, 128)
    errors = [float(row_error(weight, search_grid(weight, bits, False)).sum()) for bits in WEIGHT_BITS]
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_constant_and_zero_rows(bits, symmetric):
    weight = torch.tensor([0.0, 3.0, -3.0, 1e-12, 1e12])[:, None].expand(5, 20).contiguous()
    grid = search_grid(weight, bits, symmetric)
    restored = grid.dequantize(grid.quantize(weight))
    assert restored.isfinite().all()
    assert torch.equal(restored[0], weight[0])
    assert (restored[3].abs() < 1e-7).all()
    torch.testing.assert_close(restored[[1, 2, 4]], weight[[1, 2, 4]], rtol=1e-5, atol=0)


def test_damping_adds_a_share_of_the_mean_diagonal():
    found = damped(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), 0.5)
    assert found.dtype == torch.float64
    assert found.tolist() == [[3.5, 1.0], [1.0, 5.5]]
    assert torch.linalg.cholesky(damped(torch.zeros(4, 4))).isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 37.0])
@pytest.mark.parametrize("k", [20, 64, 130])
def test_uncorrelated_equal_inputs_round_to_nearest(k, scale):
    weight = draw(12, k)
    grid = search_grid(weight, 3, False)
    assert torch.equal(round_second_order(weight, grid, scale * torch.eye(k)), grid.quantize(weight))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("k", [48, 130])
def test_second_order_keeps_the_output_better(bits, symmetric, k):
    weight, moment = draw(16, k), correlated_moment(k)
    grid = search_grid(weight, bits, symmetric)
    integers = round_second_order(weight, grid, moment.float())
    assert (integers == integers.round()).all()
    assert integers.min() >= grid.low
    assert integers.max() <= grid.high
    second = output_error(weight, grid.dequantize(integers), moment)
    nearest = output_error(weight, grid.dequantize(grid.quantize(weight)), moment)
    assert second < 0.75 * nearest


def one_by_one(weight: torch.Tensor, grid: WeightGrid, moment: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, in float64, with the inverse eliminated step by step."""
    order = moment.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(damped(moment))
    left, rounded = weight.double().clone(), torch.empty_like(weight)
    for k in order.tolist():
        rounded[:, k] = grid.quantize(left[:, k : k + 1].float())[:, 0]
        error = left[:, k] - grid.dequantize(rounded[:, k : k + 1])[:, 0]
        left -= torch.outer(error, inverse[k] / inverse[k, k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, k] = 1.0  # it is done with: its row and column are zero but for rounding
    return rounded


def test_blocks_of_features_give_what_one_by_one_gives():
    weight, moment = draw(6, 150), correlated_moment(150).float()
    moment *= torch.linspace(0.5, 2, 150)[:, None] * torch.linspace(0.5, 2, 150)
    grid = search_grid(weight, 4, False)
    found, expected = round_second_order(weight, grid, moment), one_by_one(weight, grid, moment)
    assert not torch.equal(expected, grid.quantize(weight))
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_second_order_of_constant_rows(value):
    weight = torch.full((3, 33), value)
    grid = search_grid(weight, 4, False)
    rounded = grid.dequantize(round_second_order(weight, grid, correlated_moment(33).float()))
    torch.testing.assert_close(rounded, weight, rtol=1e-5, atol=0)


def test_inputs_on_a_line_whose_moments_were_summed_in_float32():
    """One direction holds nearly everything: rounding leaves eigenvalues below zero, further than the damping lifts."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(96, 1, generator=generator)
    moment = direction @ direction.T
    moment -= torch.eye(96) * 3e-4 * moment.diagonal().mean()  # as far as a float32 sum of many records may be off
    assert torch.linalg.eigvalsh(damped(moment, 1e-4))[0] < 0
    root = cholesky(moment, 1e-4)
    torch.testing.assert_close(root @ root.T, damped(moment, 1e-3))
    order = torch.randperm(96, generator=generator)
    root = cholesky(moment, 1e-4, order)
    torch.testing.assert_close(root @ root.T, damped(moment, 1e-3)[order][:, order])


def test_moments_that_are_no_numbers_are_refused():
    with pytest.raises(QvditError, match="no numbers"):
        cholesky(torch.full((4, 4), float("nan")))


def test_second_order_with_inputs_that_are_never_active():
    weight, moment = draw(4, 32), correlated_moment(32).float()
    moment[:, 5] = moment[5] = 0
    assert round_second_order(weight, search_grid(weight, 4, False), moment).isfinite().all()
    assert round_second_order(weight, search_grid(weight, 4, False), torch.zeros(32, 32)).isfinite().all()


@pytest.mark.parametrize("group", [0, 20])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_chosen_for_second_order_rounding_are_at_least_as_good(bits, group, monkeypatch):
    weight, moment = heavy_tailed(16, 100), correlated_moment(100)
    grid = search_grid(weight, bits, bits > 2, moment.diagonal().float(), group=group)
    found, integers = search_second_order(weight, grid, moment.float())
    before = round_second_order(weight, grid, moment.float())
    for channel in range(16):  # each for itself: the given scale is among those that are tried
        row = slice(channel, channel + 1)
        costs = [
            output_error(weight[row], g.dequantize(q)[row], moment) for g, q in ((found, integers), (grid, before))
        ]
        assert costs[0] <= costs[1] * (1 + 1e-4)
    assert output_error(weight, found.dequantize(integers), moment) < 0.99 * output_error(
        weight, grid.dequantize(before), moment
    )
    assert torch.equal(round_second_order(weight, found, moment.float()), integers)
    monkeypatch.setattr("qvdit.method.weights._TRIED_AT_ONCE", 5 * 600)  # a few channels at once: the same
    few, same = search_second_order(weight, grid, moment.float())
    assert torch.equal(same, integers)
    assert torch.equal(few.scale, found.scale)


# Groups ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "wanted", "expected"),
    [(192, 64, 64), (640, 64, 64), (48, 64, 48), (100, 64, 50), (96, 36, 32), (37, 8, 1), (37, 0, 37), (5, 1, 1)],
)
def test_groups_are_whole(k, wanted, expected):
    assert group_size(k, wanted) == expected


def test_every_group_is_a_channel_of_its_own():
    """The grid of [N, K] in groups is that of [N · C, G] without."""
    weight, importance = heavy_tailed(6, 48), draw(48, seed=5).square()
    for symmetric in (True, False):
        found = search_grid(weight, 3, symmetric, importance, group=16)
        assert found.scale.shape == found.zero.shape == (6, 3)
        for column in range(3):
            part = slice(16 * column, 16 * column + 16)
            alone = search_grid(weight[:, part], 3, symmetric, importance[part])
            torch.testing.assert_close(found.scale[:, column], alone.scale)
            assert torch.equal(found.zero[:, column], alone.zero)
            assert torch.equal(found.quantize(weight)[:, part], alone.quantize(weight[:, part]))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_groups_weights_decide_its_scale_alone(changed):
    weight = heavy_tailed(4, 48)
    before = search_grid(weight, 4, False, group=16)
    weight[2, 16 * changed : 16 * changed + 16] *= 7
    after = search_grid(weight, 4, False, group=16)
    differs = (before.scale != after.scale).nonzero().tolist()
    assert differs == [[2, changed]]


def test_a_group_of_the_whole_row_is_no_group():
    weight = heavy_tailed(4, 48)
    for group in (0, 48, 64):
        assert search_grid(weight, 4, False, group=group).scale.shape == (4,)
    assert search_grid(weight, 4, False, group=47).scale.shape == (4, 2)


@given(
    n=st.integers(1, 5),
    groups=st.integers(2, 6),
    size=st.integers(1, 9),
    bits=st.sampled_from(WEIGHT_BITS),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_grouped_grid(n, groups, size, bits, symmetric, seed):
    k = groups * size
    weight = heavy_tailed(n, k, seed)
    grid = search_grid(weight, bits, symmetric, group=size)
    assert grid.scale.shape == (n, groups)
    scale = per_feature(grid.scale, k)
    for row, column in ((0, 0), (n - 1, k - 1)):
        assert scale[row, column] == grid.scale[row, column // size]
    integers = grid.quantize(weight)
    assert grid.low <= integers.min() <= integers.max() <= grid.high
    assert torch.equal(grid.quantize(grid.dequantize(integers)), integers)
    zeros = torch.zeros(n, k)
    assert torch.equal(grid.dequantize(grid.quantize(zeros)), zeros)
    # rounding is to the nearest value of the grid: no further than half a step unless clipped
    off = (grid.dequantize(integers) - weight).abs() / scale
    clipped = (integers == grid.low) | (integers == grid.high)
    assert (off[~clipped] <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("group", [16, 25, 50])
def test_second_order_in_groups_keeps_the_output_better(group):
    weight, moment = draw(16, 100), correlated_moment(100)
    grid = search_grid(weight, 3, False, group=group)
    integers = round_second_order(weight, grid, moment.float())
    assert grid.low <= integers.min() <= integers.max() <= grid.high
    second = output_error(weight, grid.dequantize(integers), moment)
    nearest = output_error(weight, grid.dequantize(grid.quantize(weight)), moment)
    assert second < 0.75 * nearest
    same = round_second_order(weight, grid, torch.eye(100))
    assert torch.equal(same, grid.quantize(weight))


# The authors' clip grid -----------------------------------------------------------------------------------------------


def test_the_authors_clip_grid():
    authors, clean = CLIP_SEARCHES["authors"], CLIP_SEARCHES["clean"]
    assert 1.0 not in authors.ratios
    assert (authors.ratios[0], authors.ratios[-1], len(authors.ratios)) == (0.0, 0.98, 50)
    assert (clean.ratios[0], clean.ratios[-1], len(clean.ratios)) == (0.02, 1.0, 50)
    assert set(authors.ratios) - {0.0} == set(clean.ratios) - {1.0}
    assert (authors.slack, clean.slack) == (1e-4, 0.0)


def test_the_authors_search_by_hand():
    """One row: the ratio whose error is least when Δ + 1e-4 divides and Δ multiplies."""
    weight = 0.02 * draw(1, 64)
    low, high = weight.min(), weight.max()
    errors = {}
    for percent in range(2, 100, 2):
        scale = (high - low) / 15 * percent / 100
        zero = torch.round(-low / ((high - low) / 15))
        integers = (torch.round(weight / (scale + 1e-4)) + zero).clamp(0, 15)
        errors[percent] = ((integers - zero) * scale - weight).square().sum().item()
    best = min(errors, key=errors.get)
    found = search_grid(weight, 4, False, clip_grid="authors")
    torch.testing.assert_close(found.scale, ((high - low) / 15 * best / 100)[None])


def test_the_authors_clip_grid_costs_at_eight_bits():
    """Of a size that trained weights have, Δ is no longer large against 1e-4."""
    weight = 0.02 * draw(64, 512)
    clean, authors = (
        float(row_error(weight, search_grid(weight, 8, False, clip_grid=c)).sum()) for c in ("clean", "authors")
    )
    assert authors > 1.1 * clean
