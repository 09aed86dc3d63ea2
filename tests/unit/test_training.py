"""The quantized linear in training: its gradients, and that folding keeps what was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvdit.contract import FrameRows
from qvdit.method import operator
from qvdit.method.lowbit import LowBitLinear
from qvdit.method.quantization import near_integers
from qvdit.method.training import TrainableLinear, half_term, rotated_by_product, round_through
from qvdit.method.weights import WeightGrid, round_second_order, search_grid

N, K, T, P, R = 6, 40, 3, 4, 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_linear(
    bits: int = 4,
    act_bits: int = 8,
    act_symmetric: bool = True,
    weight_symmetric: bool = False,
    parts: tuple[str, ...] = ("bias", "smooth", "tqe", "gain"),
) -> TrainableLinear:
    """``parts``: what it has of bias, smooth, tqe, gain, inner, groups and rotation."""
    weight = draw(N, K)
    grid = search_grid(weight, bits, weight_symmetric, group=8 if "groups" in parts else 0)
    layer = TrainableLinear(
        "layer",
        weight,
        draw(N, seed=1) if "bias" in parts else None,
        grid,
        act_bits,
        act_symmetric,
        FrameRows.SEQUENCE,
        inv_smooth=draw(K, seed=2).exp() if "smooth" in parts else None,
        alpha=draw(K, R, seed=3) if "tqe" in parts else None,
        beta=draw(R, N, seed=4) if "tqe" in parts else None,
        gain=torch.tensor([0.7, 1.0, 1.6]) if "gain" in parts else None,
        rotation=8 if "rotation" in parts else 0,
    )
    if "inner" in parts:
        layer.add_inner_term(R, torch.Generator().manual_seed(5))
        layer.inner_b.data += draw(N, R, seed=6)
    return layer


def video_rows() -> torch.Tensor:
    """[B, T·P, K]"""
    return draw(2, T * P, K, seed=7)


@pytest.mark.parametrize("act_symmetric", [True, False])
@pytest.mark.parametrize(("bits", "weight_symmetric"), [(3, False), (4, True), (8, False)])
@pytest.mark.parametrize(
    "parts",
    [
        (),
        ("bias",),
        ("smooth", "inner"),
        ("tqe",),
        ("bias", "tqe", "gain"),
        ("bias", "smooth", "tqe", "gain", "inner"),
        ("groups",),
        ("rotation",),
        ("bias", "smooth", "tqe", "gain", "inner", "groups", "rotation"),
    ],
    ids="+".join,
)
@torch.no_grad()
def test_folding_keeps_the_output(bits, act_symmetric, weight_symmetric, parts):
    layer = make_linear(bits, 8, act_symmetric, weight_symmetric, parts)
    layer.log_scale += 0.05 * draw(*layer.log_scale.shape, seed=8)  # as training would
    x = video_rows()
    folded = LowBitLinear(layer.fold())
    expected, found = layer(x), folded(x)
    terms = layer.quantized_input(x).abs() @ layer.quantized_weight().abs().T
    halves = torch.zeros_like(terms)
    if "tqe" in parts:  # each of its two vectors is stored in half precision: eps / 2 of each value
        halves = 1.6 * (layer.quantized_input(x).abs() @ layer.alpha.abs()) @ layer.beta.abs()
    if "bias" in parts:
        terms = terms + layer.bias.abs()
    bound = 16 * torch.finfo(torch.float32).eps * (terms + halves) + 1.01 * torch.finfo(torch.float16).eps * halves
    assert ((expected - found).abs() <= bound).all()


@pytest.mark.parametrize("act_bits", [6, 8])
def test_folded_arrays(act_bits):
    layer = make_linear(3, act_bits, False, parts=("bias", "smooth", "tqe", "gain", "inner"))
    with torch.no_grad():
        folded = layer.fold()
        grid = WeightGrid(3, layer.log_scale.exp(), layer.zero)
        integers = grid.quantize(layer.weight + layer.inner_b @ layer.inner_a)
        assert not torch.equal(integers, grid.quantize(layer.weight))
    assert (folded.name, folded.weight_bits, folded.act_bits, folded.act_symmetric) == ("layer", 3, act_bits, False)
    assert folded.rows is FrameRows.SEQUENCE
    assert folded.weight_q.dtype == folded.weight_zero.dtype == np.int8
    np.testing.assert_array_equal(folded.weight_q, integers.numpy())
    np.testing.assert_array_equal(folded.weight_zero, layer.zero.numpy())
    np.testing.assert_array_equal(folded.weight_scale, grid.scale.numpy())
    assert folded.frame_gain.dtype == np.float32
    np.testing.assert_array_equal(folded.frame_gain, layer.gain.detach().numpy())
    assert folded.alpha.dtype == folded.beta.dtype == np.float16
    product = folded.alpha.astype(np.float64) @ folded.beta.astype(np.float64)
    exact = (layer.alpha.double() @ layer.beta.double()).detach().numpy()
    size = (layer.alpha.abs().double() @ layer.beta.abs().double()).detach().numpy()
    assert (np.abs(product - exact) <= 1.01 * np.finfo(np.float16).eps * size).all()
    np.testing.assert_array_equal(folded.inv_smooth, layer.inv_smooth.numpy())
    np.testing.assert_array_equal(folded.bias, layer.bias.detach().numpy())


@pytest.mark.parametrize("imbalance", [1e-9, 1.0, 1e9])
def test_half_precision_holds_a_term_however_its_vectors_are_scaled(imbalance):
    alpha, beta = draw(K, R) * imbalance, draw(R, N, seed=1) / imbalance
    halves = half_term(alpha, beta)
    assert all(np.isfinite(half).all() for half in halves)
    np.testing.assert_allclose(np.abs(halves[0]).max(0), np.abs(halves[1]).max(1), rtol=2e-3)
    found, expected = (
        halves[0].astype(np.float64) @ halves[1].astype(np.float64),
        (alpha.double() @ beta.double()).numpy(),
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_a_term_that_corrects_nothing_is_kept_as_zeros():
    alpha, beta = half_term(draw(K, R), torch.zeros(R, N))
    assert np.isfinite(alpha).all()
    assert not beta.any()


def test_what_is_absent_stays_absent():
    folded = make_linear(4, weight_symmetric=True, parts=("tqe",)).fold()
    assert folded.rows is FrameRows.NONE
    assert folded.weight_zero is folded.bias is folded.inv_smooth is folded.frame_gain is None
    assert folded.rank == R


def test_the_inner_term_starts_as_no_change():
    layer = make_linear(3)
    before, x = layer.fold(), video_rows()
    y = layer(x)
    layer.add_inner_term(4, torch.Generator().manual_seed(1))
    assert layer.inner_a.shape == (4, K)
    assert layer.inner_b.shape == (N, 4)
    assert 0.5 / K**0.5 < layer.inner_a.abs().max() <= 1 / K**0.5
    np.testing.assert_array_equal(layer.fold().weight_q, before.weight_q)
    assert torch.equal(layer(x), y)


def test_the_inner_term_follows_its_generator():
    terms = []
    for seed in (1, 1, 2):
        layer = make_linear()
        layer.add_inner_term(4, torch.Generator().manual_seed(seed))
        terms.append(layer.inner_a.detach())
    assert torch.equal(terms[0], terms[1])
    assert not torch.equal(terms[0], terms[2])


@pytest.mark.parametrize("quantize_activations", [True, False])
@pytest.mark.parametrize("more", [(), ("groups", "rotation")], ids=["plain", "shaped"])
def test_gradients_reach_every_parameter(quantize_activations, more):
    layer = make_linear(3, parts=("bias", "smooth", "tqe", "gain", "inner", *more))
    layer.quantize_activations = quantize_activations
    (layer(video_rows()) * draw(2, T * P, N, seed=9)).sum().backward()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"log_scale", "bias", "alpha", "beta", "gain", "inner_a", "inner_b"}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name


def test_gradients_pass_through_rounding_unchanged():
    """Nothing is clipped on a wide grid, so the gradient of W + B·A is the gradient of Ŵ."""
    weight = draw(N, K)
    grid = WeightGrid(8, torch.full((N,), 0.05), torch.zeros(N))
    layer = TrainableLinear("layer", weight, None, grid, 8, True, FrameRows.NONE)
    layer.add_inner_term(R, torch.Generator().manual_seed(5))
    layer.inner_b.data += draw(N, R, seed=6) * 0.1
    x = draw(5, K, seed=7).requires_grad_(True)
    upstream = draw(5, N, seed=8)
    (layer(x) * upstream).sum().backward()
    with torch.no_grad():
        weight_gradient = upstream.T @ layer.quantized_input(x)
        torch.testing.assert_close(layer.inner_b.grad, weight_gradient @ layer.inner_a.T)
        torch.testing.assert_close(layer.inner_a.grad, layer.inner_b.T @ weight_gradient)
        torch.testing.assert_close(x.grad, upstream @ layer.quantized_weight())


def test_the_gradient_of_the_scale():
    """LSQ's: d ŵ / d log Δ = Δ (round(w/Δ) - w/Δ) inside the range, and Δ (bound - zero) where it is clipped."""
    grid = WeightGrid(3, torch.tensor([0.5]), torch.tensor([0.0]))
    weight = torch.tensor([[0.6, -0.9, 9.0, -9.0]])
    layer = TrainableLinear("layer", weight, None, grid, 8, True, FrameRows.NONE)
    layer.quantized_weight().backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    each = torch.tensor([0.5 * (1 - 1.2), 0.5 * (-2 + 1.8), 0.5 * 3, 0.5 * -4])
    expected = (each * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum()
    torch.testing.assert_close(layer.log_scale.grad, expected[None])


def test_the_gradient_of_a_groups_scale_is_its_own_weights():
    weight = draw(2, 6)
    grid = search_grid(weight, 3, False, group=3)
    layer = TrainableLinear("layer", weight, None, grid, 8, True, FrameRows.NONE)
    upstream = torch.zeros(2, 6)
    upstream[1, 3:] = draw(3, seed=1)
    layer.quantized_weight().backward(upstream)
    assert (layer.log_scale.grad != 0).tolist() == [[False, False], [False, True]]
    part = WeightGrid(3, grid.scale[1:, 1], grid.zero[1:, 1])
    alone = TrainableLinear("alone", weight[1:, 3:], None, part, 8, True, FrameRows.NONE)
    alone.quantized_weight().backward(upstream[1:, 3:])
    torch.testing.assert_close(layer.log_scale.grad[1, 1:], alone.log_scale.grad)


def test_rotated_folding_names_its_block():
    folded = make_linear(parts=("groups", "rotation")).fold()
    assert folded.rotation == 8
    assert folded.weight_scale.shape == folded.weight_zero.shape == (N, K // 8)


def test_the_scale_stays_positive_after_a_big_step():
    layer = make_linear(3)
    optimizer = torch.optim.SGD([layer.log_scale], lr=1.0)
    layer.log_scale.grad = torch.linspace(-20, 40, N)
    optimizer.step()
    assert (layer.grid.scale > 0).all()
    assert np.isfinite(layer.fold().weight_scale).all()
    assert layer(video_rows()).isfinite().all()


def test_activations_may_stay_in_floating_point():
    layer = make_linear(parts=("bias", "smooth"))
    layer.quantize_activations = False
    x = video_rows()
    expected = (x * layer.inv_smooth) @ layer.quantized_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.quantize_activations = True
    assert (layer(x) - expected).abs().max() > 1e-3


def test_round_through():
    x = torch.tensor([0.5, 1.5, -0.4, 2.6], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [0, 2, 0, 3]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_near_integers_keeps_the_integers_it_is_given(bits, group):
    weight = draw(N, K)
    grid = search_grid(weight, bits, False, group=group)
    mix = draw(K, 8, seed=1)
    for integers in (
        round_second_order(weight, grid, mix @ mix.T),
        grid.quantize(weight),
        torch.full((N, K), float(grid.low)),
        torch.full((N, K), float(grid.high)),
    ):
        latent = near_integers(weight, integers, grid)
        assert torch.equal(grid.quantize(latent), integers)
        # Δ goes through a logarithm and back: the margin must survive its rounding
        layer = TrainableLinear("layer", latent, None, grid, 8, True, FrameRows.NONE)
        np.testing.assert_array_equal(layer.fold().weight_q, integers.numpy())


def test_near_integers_moves_no_further_than_it_must():
    grid = WeightGrid(4, torch.tensor([1.0]), torch.tensor([0.0]))
    weight = torch.tensor([[2.3, 2.9, -0.2]])
    found = near_integers(weight, torch.tensor([[2.0, 2.0, 5.0]]), grid)
    torch.testing.assert_close(found, torch.tensor([[2.3, 2.4, 4.6]]))


@pytest.mark.parametrize(("features", "block"), [(8, 8), (40, 8), (640, 128), (256, 256)])
def test_a_rotation_as_a_product_is_the_butterflys(features, block):
    x, matrix = draw(3, 5, features), operator.walsh_hadamard(torch.eye(block), block)
    assert torch.equal(matrix.abs(), torch.ones(block, block))
    torch.testing.assert_close(rotated_by_product(x, matrix), operator.walsh_hadamard(x, block), rtol=1e-5, atol=1e-4)
    whole = torch.randint(-9, 9, (4, features)).float()  # of integers every order gives the same sums
    assert torch.equal(rotated_by_product(whole, matrix), operator.walsh_hadamard(whole, block))


def test_a_rotation_does_not_change_how_far_a_step_goes():
    """The operator's rotation is √B times an orthonormal one; what is trained has the gradients of the orthonormal."""
    k, block = 32, 16  # √B is a power of two: everything but its factor is equal to the bit
    weight, alpha, beta, x = draw(N, k), draw(k, R, seed=3), draw(R, N, seed=4), draw(5, k, seed=7)
    grid = search_grid(weight, 3, False)
    orthonormal = TrainableLinear("o", weight, None, grid, 6, True, FrameRows.NONE, None, alpha, beta)
    rotated = TrainableLinear(
        "r",
        weight / 4,
        None,
        WeightGrid(3, grid.scale / 4, grid.zero),
        6,
        True,
        FrameRows.NONE,
        None,
        alpha / 4,
        beta,
        rotation=block,
    )
    for layer in (orthonormal, rotated):
        layer.add_inner_term(R, torch.Generator().manual_seed(5))
        layer.inner_b.data += draw(N, R, seed=6)
    y = orthonormal(operator.walsh_hadamard(x, block) / 4)
    torch.testing.assert_close(rotated(x), y, rtol=1e-5, atol=1e-5)
    for output in (y, rotated(x)):
        output.square().sum().backward()
    for (name, a), (_, b) in zip(orthonormal.named_parameters(), rotated.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
