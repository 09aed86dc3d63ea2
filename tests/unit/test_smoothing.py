"""The smoothing scale."""

from __future__ import annotations

import pytest
import torch

from qvdit.method.smoothing import salience, smoothing_scale, spearman, step_weights, weight_salience


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # a = (16, 1), wmax = (1, 4), p = 1/2: 4 / 1 and 1 / 2, whose geometric mean is √2
    weight = torch.tensor([[1.0, -4.0], [-0.5, 2.0]])
    found = smoothing_scale(torch.tensor([16.0, 1.0]), weight_salience([weight]), 0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 0.5]) / 2**0.5)


def test_all_readers_of_an_input_count():
    # the peaks (1, 4) come from two linears
    weights = [torch.tensor([[1.0, 0.1]]), torch.tensor([[0.1, -4.0], [0.2, 0.0]])]
    found = smoothing_scale(torch.tensor([16.0, 1.0]), weight_salience(weights), 0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 0.5]) / 2**0.5)


@pytest.mark.parametrize("strength", [0.0, 0.11, 0.5, 1.0])
def test_formula_up_to_a_factor(strength):
    abs_max, weight = draw(20).abs() + 0.1, draw(7, 20, seed=1)
    found = smoothing_scale(abs_max, weight_salience([weight]), strength)
    ratio = found / (abs_max**strength / weight.abs().amax(0) ** (1 - strength))
    torch.testing.assert_close(ratio, ratio[:1].expand(20))
    assert found.log().mean().item() == pytest.approx(0, abs=1e-6)


def test_the_product_does_not_change():
    x, weight = draw(5, 20), draw(7, 20, seed=1)
    scale = smoothing_scale(x.abs().amax(0), weight_salience([weight]), 0.5)
    torch.testing.assert_close((x / scale) @ (weight * scale).T, x @ weight.T, rtol=1e-4, atol=1e-5)


def test_outliers_move_into_the_weights():
    x, weight = draw(64, 20), draw(7, 20, seed=1)
    x[:, 3] *= 100
    scale = smoothing_scale(x.abs().amax(0), weight_salience([weight]), 0.5)
    peaks = (x / scale).abs().amax(0)
    assert peaks.max() / peaks.median() < 0.2 * x.abs().amax() / x.abs().amax(0).median()


def test_features_that_are_never_active_or_never_read():
    abs_max, weight = draw(6).abs(), draw(4, 6, seed=1)
    abs_max[1] = 0
    weight[:, 2] = 0
    found = smoothing_scale(abs_max, weight_salience([weight]), 0.5)
    assert found.isfinite().all()
    assert (found > 0).all()


def test_ptq4dit_balances_the_largest_values_of_every_channel():
    """CSB: both sides come to √(a w); ours do up to one common factor, which changes no quantized value."""
    x, weight = draw(50, 20) * draw(20, seed=2).exp(), draw(7, 20, seed=1) * draw(20, seed=3).exp()
    a, w = x.abs().amax(0), weight_salience([weight])
    scale = smoothing_scale(a, w, 0.5)
    balanced = (x / scale).abs().amax(0), weight_salience([weight * scale])
    for side in balanced:
        torch.testing.assert_close(side / (a * w).sqrt(), (side / (a * w).sqrt())[:1].expand(20))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 31.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [0.4, 0.3, 0.2, 0.1], -1.0),
        # 1 - 6 Σd² / (n (n² - 1)): ranks (1, 3, 2, 4, 6, 5), Σd² = 4, n = 6
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 4.0, 9.0, 4.5], 1 - 6 * 4 / 210),
        # tied ranks (1.5, 1.5, 3) against (1, 2, 3): cov 1.5, variances 1.5 and 2
        ([7.0, 7.0, 9.0], [1.0, 2.0, 3.0], 1.5 / (1.5 * 2) ** 0.5),
        ([7.0, 7.0, 7.0], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_spearman_by_hand(x, y, expected):
    for first, second in ((x, y), (y, x)):
        assert spearman(torch.tensor(first), torch.tensor(second)).item() == pytest.approx(expected, abs=1e-6)


def test_spearman_sees_ranks_alone():
    x, y = draw(40), draw(40, seed=1)
    assert spearman(x.exp(), 3 * y - 1) == spearman(x, y)


def test_spearman_weights_by_hand():
    """η = softmax(-ρ): the step that agrees least with the weights counts most."""
    peak = torch.tensor([1.0, 2.0, 3.0])
    by_step = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])  # ρ = 1, -1, 1/2
    terms = torch.tensor([-1.0, 1.0, -0.5]).exp()
    found = step_weights("spearman", by_step, peak)
    torch.testing.assert_close(found, terms / terms.sum())
    torch.testing.assert_close(salience("spearman", by_step, peak), found @ by_step)


def test_spearman_weights_fall_as_correlation_rises():
    peak = torch.arange(20.0)
    by_step = torch.stack([peak + noise * draw(20, seed=5) for noise in (0, 3, 10, 40, 1000)])
    correlations = torch.stack([spearman(row, peak) for row in by_step])
    found = step_weights("spearman", by_step, peak)
    assert found.sum().item() == pytest.approx(1)
    assert found[correlations.argsort()].diff().le(0).all()
    assert found[0] < found[-1]


def test_the_moving_average_of_the_authors_lives_of_the_noisiest_steps():
    by_step, peak = torch.ones(100, 4), torch.ones(4)
    found = step_weights("ema", by_step, peak)
    assert found.sum().item() == pytest.approx(1)
    assert found[:10].sum().item() == pytest.approx(0.64, abs=0.01)  # rows begin with the most noise
    assert found.diff().lt(0).all()
    # and so it is when only some of the trajectory is recorded
    few = step_weights("ema", by_step[:8], peak)
    assert (few[0] / few[1]).item() == pytest.approx(0.95 ** (-200 / 7), rel=1e-4)
    assert step_weights("ema", by_step[:1], peak).tolist() == [1.0]


def test_the_mean_weighs_all_steps_alike():
    by_step = draw(5, 4).abs()
    torch.testing.assert_close(salience("mean", by_step, torch.ones(4)), by_step.mean(0))
