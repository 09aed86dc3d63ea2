"""The closed form of TQE's correction and the fit of its frame gains."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from qvdit.contract import FrameRows
from qvdit.method.tqe import GainFit, best_approximation, best_correction

N, K = 12, 18


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def error():
    return draw(N, K)


@pytest.fixture
def moment():
    """E[x xᵀ] of correlated inputs."""
    x = draw(400, K, seed=1) @ draw(K, K, seed=2)
    return x.T @ x / 400


def with_damping(moment: torch.Tensor) -> torch.Tensor:
    return moment.double() + 1e-4 * moment.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)


def residual(error: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, moment: torch.Tensor) -> float:
    """E‖(error - betaᵀ alphaᵀ) x‖²."""
    left = error.double() - (alpha.double() @ beta.double()).T
    return float((left @ moment.double() * left).sum())


@pytest.mark.parametrize("rank", [1, 2, 5, 11])
def test_what_is_left_are_the_discarded_singular_values(error, moment, rank):
    alpha, beta = best_correction(error, moment, rank)
    assert alpha.shape == (K, rank)
    assert beta.shape == (rank, N)
    assert alpha.dtype == beta.dtype == torch.float32
    damped = with_damping(moment)
    squares = torch.linalg.eigvalsh(error.double() @ damped @ error.double().T)  # ascending: sigma² of error · S
    expected = float(squares[: N - rank].sum())
    assert residual(error, alpha, beta, damped) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0])
def test_no_neighbour_is_better(error, moment, rank, size):
    alpha, beta = best_correction(error, moment, rank)
    damped = with_damping(moment)
    best = residual(error, alpha, beta, damped)
    for seed in range(20):
        near_alpha = alpha + size * draw(K, rank, seed=100 + seed)
        near_beta = beta + size * draw(rank, N, seed=200 + seed)
        assert residual(error, near_alpha, near_beta, damped) > best


def test_it_is_better_than_the_best_of_the_weights_alone(error, moment):
    u, sigma, vt = torch.linalg.svd(error)
    plain = residual(error, vt[:2].T * sigma[:2], u[:, :2].T, moment)
    assert residual(error, *best_correction(error, moment, 2), moment) < 0.95 * plain


def test_error_shrinks_with_rank_to_nothing(error, moment):
    left = [residual(error, *best_correction(error, moment, rank), moment) for rank in range(1, N + 1)]
    assert all(later < earlier for earlier, later in pairwise(left))
    whole = residual(error, torch.zeros(K, 1), torch.zeros(1, N), moment)
    assert left[0] < whole
    assert left[-1] < 1e-9 * whole


def test_a_planted_term_is_found(moment):
    alpha, beta = draw(K, 2, seed=5), draw(2, N, seed=6)
    found_alpha, found_beta = best_correction((alpha @ beta).T, moment, 2)
    torch.testing.assert_close(found_alpha @ found_beta, alpha @ beta, rtol=1e-3, atol=1e-4)


def test_no_error_no_correction(moment):
    alpha, beta = best_correction(torch.zeros(N, K), moment, 2)
    assert (alpha @ beta == 0).all()
    assert alpha.isfinite().all()


@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_best_approximation_is_the_truncated_svd(shape, rank):
    """Eckart-Young: what is left are the discarded singular values, and the subspace is numpy's."""
    weight = draw(*shape, seed=3)
    alpha, beta = best_approximation(weight, rank)
    assert (alpha.shape, beta.shape) == ((shape[1], rank), (rank, shape[0]))
    u, sigma, vt = np.linalg.svd(weight.double().numpy())
    found = (alpha @ beta).T.double().numpy()
    np.testing.assert_allclose(found, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-5 * sigma[0])
    left = np.linalg.norm(weight.double().numpy() - found)
    assert left == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), rel=1e-5)
    # the two factors are of equal size
    np.testing.assert_allclose((alpha.norm(dim=0) / beta.norm(dim=1)).numpy(), 1, rtol=1e-4)


B, T, P = 2, 4, 3
GAINS = torch.tensor([0.6, 0.9, 1.1, 1.4])
LAYOUTS = {
    FrameRows.SEQUENCE: ((B, T * P), GAINS.repeat_interleave(P).repeat(B).reshape(B, T * P)),
    FrameRows.SPATIAL: ((B * T, P), GAINS.repeat(B)[:, None].expand(B * T, P)),
    FrameRows.TEMPORAL: ((B * P, T), GAINS.expand(B * P, T)),
}


@pytest.mark.parametrize("rows", LAYOUTS)
def test_planted_gains_are_recovered(rows):
    shape, gain_of_row = LAYOUTS[rows]
    fit = GainFit(T, rows)
    for seed in range(3):
        correction = draw(*shape, N, seed=seed)
        fit.add(gain_of_row[..., None] * correction, correction)
    found = fit.gain()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, GAINS, rtol=1e-5, atol=0)


def test_the_fit_is_least_squares_over_all_batches():
    errors, corrections = draw(3, B, T * P, N, seed=1), draw(3, B, T * P, N, seed=2)
    errors = corrections + 0.3 * errors
    fit = GainFit(T, FrameRows.SEQUENCE)
    for error, correction in zip(errors, corrections, strict=True):
        fit.add(error, correction)
    by_frame = [x.reshape(3, B, T, P, N).transpose(0, 2).reshape(T, -1, 1).double() for x in (corrections, errors)]
    expected = torch.linalg.lstsq(*by_frame).solution.flatten()
    torch.testing.assert_close(fit.gain().double(), expected, rtol=1e-5, atol=0)


def test_gains_are_bounded_and_one_where_nothing_is_corrected():
    fit = GainFit(3, FrameRows.TEMPORAL)
    correction = torch.ones(1, 3, N)
    correction[:, 1] = 0
    fit.add(torch.tensor([-3.0, 5.0, 9.0])[None, :, None] * torch.ones(1, 3, N), correction)
    assert fit.gain().tolist() == [0.5, 1.0, 1.5]
    assert fit.gain(-10, 10).tolist() == [-3.0, 1.0, 9.0]
    assert GainFit(2, FrameRows.TEMPORAL).gain().tolist() == [1.0, 1.0]
