"""The smoothing scale."""

from __future__ import annotations

import pytest
import torch

from qvdit.method.smoothing import smoothing_scale


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # a = (16, 1), wmax = (1, 4), p = 1/2: 4 / 1 and 1 / 2, whose geometric mean is √2
    weight = torch.tensor([[1.0, -4.0], [-0.5, 2.0]])
    found = smoothing_scale(torch.tensor([16.0, 1.0]), [weight], 0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 0.5]) / 2**0.5)


def test_all_readers_of_an_input_count():
    # the peaks (1, 4) come from two linears
    weights = [torch.tensor([[1.0, 0.1]]), torch.tensor([[0.1, -4.0], [0.2, 0.0]])]
    found = smoothing_scale(torch.tensor([16.0, 1.0]), weights, 0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 0.5]) / 2**0.5)


@pytest.mark.parametrize("strength", [0.0, 0.11, 0.5, 1.0])
def test_formula_up_to_a_factor(strength):
    abs_max, weight = draw(20).abs() + 0.1, draw(7, 20, seed=1)
    found = smoothing_scale(abs_max, [weight], strength)
    ratio = found / (abs_max**strength / weight.abs().amax(0) ** (1 - strength))
    torch.testing.assert_close(ratio, ratio[:1].expand(20))
    assert found.log().mean().item() == pytest.approx(0, abs=1e-6)


def test_the_product_does_not_change():
    x, weight = draw(5, 20), draw(7, 20, seed=1)
    scale = smoothing_scale(x.abs().amax(0), [weight], 0.5)
    torch.testing.assert_close((x / scale) @ (weight * scale).T, x @ weight.T, rtol=1e-4, atol=1e-5)


def test_outliers_move_into_the_weights():
    x, weight = draw(64, 20), draw(7, 20, seed=1)
    x[:, 3] *= 100
    scale = smoothing_scale(x.abs().amax(0), [weight], 0.5)
    peaks = (x / scale).abs().amax(0)
    assert peaks.max() / peaks.median() < 0.2 * x.abs().amax() / x.abs().amax(0).median()


def test_features_that_are_never_active_or_never_read():
    abs_max, weight = draw(6).abs(), draw(4, 6, seed=1)
    abs_max[1] = 0
    weight[:, 2] = 0
    found = smoothing_scale(abs_max, [weight], 0.5)
    assert found.isfinite().all()
    assert (found > 0).all()
