"""The quantization kernels against the eager reference on the CPU: integers and scales equal, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qvdit.contract import FrameRows, QvditError
from qvdit.method import operator
from qvdit.runtimes import torch_ops
from qvdit.runtimes.cuda import STORED_ZERO

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Features: one vector and less, odd, one warp, more, each number of vectors a thread, the largest.
FEATURES = [1, 7, 33, 64, 768, 1000, 1152, 1536, 2049, 5120, 8960, 12288, 16384]
EPS = float(np.finfo(np.float32).eps)


def rows_of_any_kind(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal rows, and among them huge, tiny, zero, one-sided and constant ones, and exact ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    top = 30.0 if dtype != torch.float16 else 4.0
    for row in range(m):
        kind = row % 7
        if kind == 1:
            x[row] *= 10.0 ** float(torch.empty(()).uniform_(-top, top, generator=generator))
        elif kind == 2:
            x[row] = x[row].abs() * (-1) ** (row // 7)
        elif kind == 3:
            x[row] = torch.randint(-254, 255, (k,), generator=generator) / 2  # ties wherever the scale is 1
            x[row, 0] = 127
        elif kind == 4:
            x[row] = 0 if row // 7 % 2 else 3.5
        elif kind == 5:
            x[row] *= 1e-12
    return x.to(dtype)


def reference_rows(x: torch.Tensor, bits: int, symmetric: bool) -> operator.QuantizedRows:
    """What the kernels must give, by the eager reference."""
    return operator.quantize_rows(x, torch.tensor(float(operator.act_levels(bits, symmetric))), symmetric)


def quantize(x: torch.Tensor, *arguments, **keywords) -> list[torch.Tensor]:
    """quantize_rows on the GPU; results on the CPU."""
    moved = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in keywords.items()}
    return [t.cpu() for t in torch.ops.qvdit.quantize_rows(x.cuda(), *arguments, **moved)]


def assert_rows_equal(found: list[torch.Tensor], expected: operator.QuantizedRows, k: int, symmetric: bool) -> None:
    x_q, scale, zero, _, row_sum = found
    offset = 0 if symmetric else STORED_ZERO
    torch.testing.assert_close(scale[:, None], expected.scale, rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(x_q[:, :k].int() + offset, expected.x_q.int())
    assert not x_q[:, k:].any()
    if symmetric:
        assert expected.zero is None
        assert zero.numel() == 0
    else:
        np.testing.assert_array_equal(zero[:, None] + offset, expected.zero.int())
    if row_sum.numel():
        np.testing.assert_array_equal(row_sum, expected.centred().double().sum(-1).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", FEATURES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6])
def test_integers_and_scales_are_the_references(dtype, k, symmetric, bits):
    for m in (1, 7, 129):
        x = rows_of_any_kind(m, k, dtype, seed=m)
        expected = reference_rows(operator.transform(x), bits, symmetric)
        assert_rows_equal(quantize(x, bits, symmetric, row_sums=True), expected, k, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [33, 1152, 4608])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inv_smooth(symmetric, k, dtype):
    x = rows_of_any_kind(64, k, dtype, seed=1)
    inv_smooth = torch.randn(k, generator=torch.Generator().manual_seed(2)).exp()
    expected = reference_rows(operator.transform(x, inv_smooth), 8, symmetric)
    assert_rows_equal(quantize(x, 8, symmetric, inv_smooth=inv_smooth), expected, k, symmetric)


def test_the_scale_divides():
    """At exact halves a multiplication by the reciprocal goes to the wrong side sooner or later."""
    halves = torch.cat([torch.tensor([127.0]), torch.arange(126) + 0.5])
    x = torch.arange(1, 40001, 2)[:, None].float() * halves
    expected = reference_rows(x, 8, True)
    assert_rows_equal(quantize(x, 8, True), expected, 127, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [127, 1152, 3072])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_scales_of_every_size(dtype, symmetric, k, rank):
    """Of powers of two from the smallest to the largest: exact ties, and normal rows."""
    ties = torch.cat([torch.tensor([127.0, 0.0]), torch.arange(125) + 0.5]).repeat(-(-k // 127))[:k]
    x = torch.cat([torch.stack([ties, -ties]), torch.randn(2, k, generator=torch.Generator().manual_seed(21))])
    powers = 2.0 ** torch.arange(-130, 121).double()
    x = (x.to(dtype).double() * powers[:, None, None]).flatten(0, 1).to(dtype)
    alpha = torch.ones(rank, k).half() if rank else None
    expected = reference_rows(operator.transform(x), 8, symmetric)
    assert_rows_equal(quantize(x, 8, symmetric, alpha=alpha, row_sums=True), expected, k, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [33, 1152, 5120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_make_their_row_nan_and_no_other(symmetric, value, k, dtype):
    x = rows_of_any_kind(30, k, dtype, seed=3)
    x[4, 0] = x[11, k // 2] = x[22, k - 1] = value
    x[23] = value
    alpha = torch.randn(2, k, generator=torch.Generator().manual_seed(4)).half()
    expected = reference_rows(operator.transform(x), 8, symmetric)
    found = quantize(x, 8, symmetric, alpha=alpha, row_sums=True)
    assert_rows_equal(found, expected, k, symmetric)
    bad = [4, 11, 22, 23]
    assert found[1].isnan().nonzero()[:, 0].tolist() == bad
    assert found[3].isnan().all(0).nonzero()[:, 0].tolist() == bad


@pytest.mark.parametrize("symmetric", [True, False])
def test_largest_finite_values(symmetric):
    """Their range overflows: asymmetric scales become Inf, and nothing NaN but what the reference makes so."""
    x = torch.full((3, 64), torch.finfo(torch.float32).max)
    x[:, ::2] *= -1
    expected = reference_rows(x, 8, symmetric)
    assert expected.scale.isinf().all() == (not symmetric)
    assert_rows_equal(quantize(x, 8, symmetric, row_sums=True), expected, 64, symmetric)


def low_rank(
    rows: operator.QuantizedRows, alpha: torch.Tensor, gain: torch.Tensor | float = 1.0, roundings: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """gain · scale · (x_q - zero) alpha in float64, [M, R], and how far so many roundings may be from it."""
    factor, integers = rows.scale.double() * gain, rows.centred().double()
    terms = integers.abs() @ alpha.T.double().abs()
    return factor * (integers @ alpha.T.double()), factor.abs() * roundings * EPS * terms + 1e-37


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 32])
@pytest.mark.parametrize("k", [33, 40, 1152, 1920, 3072, 5120, 12288, 16384])
@pytest.mark.parametrize("frames", [0, 3])
def test_low_rank_input_side(symmetric, rank, k, frames):
    m, tokens = 41, 5
    x = rows_of_any_kind(m, k, torch.bfloat16, seed=5)
    generator = torch.Generator().manual_seed(6)
    alpha = torch.randn(rank, k, generator=generator).half()
    gain = torch.randn(frames, generator=generator) if frames else None
    rows = reference_rows(operator.transform(x), 8, symmetric)
    per_row = 1.0 if gain is None else gain.double()[torch.arange(m) // tokens % frames][:, None]
    expected, bound = low_rank(rows, alpha, per_row)
    gains = {"frame_gain": gain, "tokens_per_frame": tokens}
    found = quantize(x, 8, symmetric, alpha=alpha, row_sums=True, **gains)
    assert_rows_equal(found, rows, k, symmetric)
    assert ((found[3].T.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_input_side_of_six_bits(symmetric, rank):
    x = rows_of_any_kind(41, 1152, torch.float16, seed=17)
    alpha = torch.randn(rank, 1152, generator=torch.Generator().manual_seed(18)).half()
    rows = reference_rows(operator.transform(x), 6, symmetric)
    expected, bound = low_rank(rows, alpha)
    found = quantize(x, 6, symmetric, alpha=alpha, row_sums=True)
    assert_rows_equal(found, rows, 1152, symmetric)
    assert ((found[3].T.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [64, 1152, 8960])
@pytest.mark.parametrize("alone", [False, True])
def test_alpha_of_any_size(dtype, symmetric, k, alone):
    """Each rank has a size of its own: tiny, nothing at all, great, and one with a single great element."""
    x = rows_of_any_kind(50, k, torch.float16, seed=15).to(dtype)
    alpha = torch.randn(6, k, generator=torch.Generator().manual_seed(16))
    alpha = (alpha * torch.tensor([1e-6, 1e-3, 0.0, 1.0, 1e4, 1.0])[:, None]).half()
    alpha[5, k // 3] = 65504
    assert 0 < alpha[0].abs().max() < torch.finfo(torch.float16).tiny  # subnormal ones
    rows = reference_rows(operator.transform(x), 8, symmetric)
    # Of 16-bit rows a tensor core truncates a sum as often as a thread has vectors, ten times after the great element.
    roundings = 16 if alone and dtype != torch.float32 else 8
    for ranks in alpha.split(1) if alone else [alpha]:
        expected, bound = low_rank(rows, ranks, roundings=roundings)
        u = quantize(x, 8, symmetric, alpha=ranks)[3]
        assert ((u.T.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_alpha_without_a_number_leaves_its_rank_without_and_no_other(value):
    x, alpha = torch.randn(20, 1152).half(), torch.randn(3, 1152).half()
    alpha[1, 700] = value
    bad = ~quantize(x, 8, True, alpha=alpha)[3].isfinite()
    assert bad.all(1).tolist() == bad.any(1).tolist() == [False, True, False]


def assert_alike_together_and_apart(rows: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor) -> None:
    together, apart = rows(x), [rows(part) for part in x.split(200)]
    for i, found in enumerate(together):
        if found.numel():
            expected = torch.cat([part[i] for part in apart], int(i == 3))  # u: [R, M]
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 32])
@pytest.mark.parametrize("k", [40, 1152, 3072, 5120, 8960, 12288])
def test_rows_do_not_depend_on_how_many_there_are(dtype, symmetric, rank, k):
    """Many rows, of which each block has several after and beside one another: what they give a few at a time."""
    generator = torch.Generator("cuda").manual_seed(7)
    x = torch.randn(20_001, k, generator=generator, device="cuda").to(dtype)
    x[::1000, k // 2] = torch.nan
    alpha = torch.randn(rank, k, generator=generator, device="cuda").half() if rank else None

    def rows(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.qvdit.quantize_rows(part, 8, symmetric, alpha=alpha, row_sums=True)

    assert_alike_together_and_apart(rows, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("gains", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("k", [1152, 3072, 12288])
def test_every_row_has_its_frames_gain(dtype, symmetric, gains, rank, k):
    """Many rows, frames that end amid a block's: the term without a gain, times the row's, to the bit."""
    frames, tokens, m = 7, 331, 20_001
    generator = torch.Generator("cuda").manual_seed(9)
    x = torch.randn(m, k, generator=generator, device="cuda").to(dtype)
    alpha = torch.randn(gains * rank, k, generator=generator, device="cuda").half()
    gain = torch.randn(gains, frames, generator=generator, device="cuda")
    options = {"frame_gain": gain, "tokens_per_frame": tokens}
    found = torch.ops.qvdit.quantize_rows(x, 8, symmetric, alpha=alpha, **options)[3]
    alone = torch.ops.qvdit.quantize_rows(x, 8, symmetric, alpha=alpha)[3]
    per_row = gain[:, torch.arange(m, device="cuda") // tokens % frames].repeat_interleave(rank, 0)
    torch.testing.assert_close(found, alone * per_row, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [512, 700, 1024])
@pytest.mark.parametrize("k", [40, 1152, 3072, 5120, 12288])
def test_few_rows_beside_each_other(symmetric, m, k):
    """Few rows of rank 1, of which each block has several: what they give a few at a time."""
    generator = torch.Generator("cuda").manual_seed(8)
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    x[m // 3, k // 2] = torch.nan
    alpha = torch.randn(1, k, generator=generator, device="cuda").half()

    def rows(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.qvdit.quantize_rows(part, 8, symmetric, alpha=alpha, row_sums=True)

    assert_alike_together_and_apart(rows, x)


@pytest.mark.parametrize("prologue", ["plain", "gelu", "layernorm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [40, 768, 1152, 1536, 4608])
def test_rows_with_what_comes_before_do_not_depend_on_how_many_there_are(prologue, dtype, symmetric, k):
    """The kernel that keeps rows as float32, and puts the next ones in shared memory meanwhile."""
    generator = torch.Generator("cuda").manual_seed(8)
    x = torch.randn(20_001, k, generator=generator, device="cuda").to(dtype)
    x[::1000, k // 2] = torch.nan
    factors = torch.randn(4, k, generator=generator, device="cuda")
    keywords = {"alpha": factors[:1].half(), "inv_smooth": factors[1].abs(), "prologue": prologue, "row_sums": True}
    if prologue == "layernorm":
        keywords |= {"modulation_scale": factors[2:3], "modulation_shift": factors[3:]}
    assert_alike_together_and_apart(lambda part: torch.ops.qvdit.quantize_rows(part, 8, symmetric, **keywords), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("k", "block"), [(12, 4), (40, 8), (96, 32), (1152, 128), (768, 256), (1536, 512), (5120, 1024), (12288, 1024)]
)
@pytest.mark.parametrize("smooth", [False, True])
def test_rotation(k, block, symmetric, smooth, dtype):
    """The transform is a butterfly of float32 additions in one order: its integers are the reference's."""
    for m in (1, 7, 300):
        x = rows_of_any_kind(m, k, dtype, seed=m)
        inv_smooth = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5 if smooth else None
        expected = reference_rows(operator.transform(x, inv_smooth, block), 6, symmetric)
        found = quantize(x, 6, symmetric, inv_smooth=inv_smooth, rotation=block, row_sums=True)
        assert_rows_equal(found, expected, k, symmetric)


@pytest.mark.parametrize("rotation", [3, 64, 2048, -2])
def test_rotations_that_are_refused(rotation):
    with pytest.raises(QvditError, match=f"blocks of {rotation}"):
        quantize(torch.randn(2, 96), 8, True, rotation=rotation)


def test_gains_of_several_linears():
    x, tokens = rows_of_any_kind(40, 96, torch.bfloat16, seed=5), 5
    generator = torch.Generator().manual_seed(6)
    alpha, gain = torch.randn(6, 96, generator=generator).half(), torch.randn(3, 4, generator=generator)
    together = quantize(x, 8, True, alpha=alpha, frame_gain=gain, tokens_per_frame=tokens)[3]
    for i in range(3):
        own = {"alpha": alpha[2 * i : 2 * i + 2], "frame_gain": gain[i], "tokens_per_frame": tokens}
        assert torch.equal(together[2 * i : 2 * i + 2], quantize(x, 8, True, **own)[3])


def run_transformed(
    x: torch.Tensor, symmetric: bool, prologue: str, **keywords
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """quantize_rows' results and the x̃ that it quantized."""
    on_gpu = x.cuda()
    outputs = torch_ops._quantized(on_gpu, symmetric, None, False)
    transformed = torch.full((x.numel() // x.shape[-1], x.shape[-1]), 77.0, device="cuda")
    modulation = tuple(None if (t := keywords.get(name)) is None else t.cuda() for name in ("scale", "shift"))
    inv_smooth = None if (t := keywords.get("inv_smooth")) is None else t.cuda()
    rotation = keywords.get("rotation", 0)
    factors = (inv_smooth, None, None, 1, prologue, modulation, 1e-6, rotation, transformed)
    arguments = torch_ops.quantize_arguments(outputs, on_gpu, 8, symmetric, *factors)
    torch_ops.launch("quantize_rows", on_gpu, arguments)
    return [t.cpu() for t in outputs], transformed.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [33, 1152, 1536, 5120])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("smooth", [False, True])
def test_gelu(dtype, k, symmetric, smooth):
    x = 4 * torch.randn(50, k, generator=torch.Generator().manual_seed(7))
    x[0] *= 1e3
    x = x.to(dtype)
    inv_smooth = torch.rand(k, generator=torch.Generator().manual_seed(8)) + 0.5 if smooth else None
    found, transformed = run_transformed(x, symmetric, "gelu", inv_smooth=inv_smooth)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    expected = expected if inv_smooth is None else expected * inv_smooth
    assert ((transformed - expected).abs() <= 32 * EPS * expected.abs() + 1e-6).all()
    assert_rows_equal(found, reference_rows(transformed, 8, symmetric), k, symmetric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 128, 1024])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gelu_comes_before_smoothing_and_rotation(dtype, block, symmetric):
    generator = torch.Generator().manual_seed(14)
    x = (4 * torch.randn(50, 5120, generator=generator)).to(dtype)
    inv_smooth = torch.rand(5120, generator=generator) + 0.5
    found, transformed = run_transformed(x, symmetric, "gelu", inv_smooth=inv_smooth, rotation=block)
    terms = torch.nn.functional.gelu(x.double(), approximate="tanh") * inv_smooth
    largest = terms.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True).expand(-1, -1, block).flatten(-2)
    expected = operator.walsh_hadamard(terms, block)
    assert ((transformed - expected).abs() <= 64 * EPS * largest + 1e-6 * block).all()
    assert_rows_equal(found, reference_rows(transformed, 8, symmetric), 5120, symmetric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [33, 1152, 1536, 5120])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("parts", [(), ("scale",), ("shift",), ("scale", "shift")])
def test_layernorm_and_modulation(dtype, k, symmetric, parts):
    generator = torch.Generator().manual_seed(9)
    batch, tokens = 3, 17
    x = (torch.randn(batch * tokens, k, generator=generator) * 3 + 5).to(dtype)
    # As models make them: several modulations of a sample beside each other.
    together = torch.randn(batch, 6, k, generator=generator).cuda()
    modulation = {name: together[:, i] for i, name in enumerate(("scale", "shift")) if name in parts}
    found, transformed = run_transformed(x, symmetric, "layernorm", **modulation)
    expected = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6)
    rows = {name: t.cpu().double().repeat_interleave(tokens, 0) for name, t in modulation.items()}
    expected = expected * (1 + rows.get("scale", torch.zeros(()))) + rows.get("shift", torch.zeros(()))
    assert ((transformed - expected).abs() <= 64 * EPS * (1 + expected.abs()) * 4).all()
    assert_rows_equal(found, reference_rows(transformed, 8, symmetric), k, symmetric)


@pytest.mark.parametrize("prologue", ["gelu", "layernorm"])
def test_fused_rows_with_nan(prologue):
    x = torch.randn(8, 1152, generator=torch.Generator().manual_seed(10))
    x[3, 77] = torch.nan
    x[5, 1] = torch.inf
    found, _ = run_transformed(x, True, prologue)
    assert found[1].isnan().nonzero()[:, 0].tolist() == [3, 5]
    assert not found[0][[3, 5]].any()


def test_rows_need_not_be_aligned_or_contiguous():
    x = torch.randn(20, 2 * 1153, generator=torch.Generator().manual_seed(11)).half()
    view = x.cuda()[:, 1 : 2 * 1152 + 1 : 2]
    expected = reference_rows(view.cpu().float(), 8, True)
    assert_rows_equal([t.cpu() for t in torch.ops.qvdit.quantize_rows(view, 8, True)], expected, 1152, True)
    flat = torch.randn(1 + 12 * 1152, generator=torch.Generator().manual_seed(12)).half().cuda()
    shifted = flat[1:].view(12, 1152)  # contiguous, 2 bytes past a multiple of 16
    expected = reference_rows(shifted.cpu().float(), 8, True)
    assert_rows_equal([t.cpu() for t in torch.ops.qvdit.quantize_rows(shifted, 8, True)], expected, 1152, True)


def test_frames_are_those_of_the_reference():
    shape = (2, 12, 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(13))
    gain, alpha = torch.tensor([1.0, -2.0, 3.0]), torch.ones(1, 64).half()
    rows = reference_rows(x, 8, True)
    expected = operator.rank_term(rows, alpha.T.float(), torch.ones(1, 1), gain, FrameRows.SEQUENCE)
    found = quantize(
        x, 8, True, alpha=alpha, frame_gain=gain, tokens_per_frame=FrameRows.SEQUENCE.tokens_per_frame(12, 3)
    )
    torch.testing.assert_close(found[3], expected.reshape(1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.unguarded
def test_more_than_two_billion_elements():
    m, k = 160_000, 13_824
    x = torch.empty(m, k, dtype=torch.float16, device="cuda").normal_()
    x_q, scale = torch.ops.qvdit.quantize_rows(x, 8, True)[:2]
    for part in (slice(0, 3), slice(155_340, 155_350), slice(m - 3, m)):  # about and past 2^31
        expected = reference_rows(x[part].cpu().float(), 8, True)
        np.testing.assert_array_equal(x_q[part].cpu().int(), expected.x_q.int())
        torch.testing.assert_close(scale[part].cpu()[:, None], expected.scale, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"act_bits": 7}, "7 activation bits"),
        ({"alpha": torch.zeros(33, 64).half()}, "rank 33; at most 32"),
        ({"frame_gain": torch.ones(2), "tokens_per_frame": 0}, "0 tokens a frame"),
        ({"modulation_scale": torch.zeros(1, 64)}, "modulation without a LayerNorm"),
        ({"inv_smooth": torch.zeros(63)}, r"\(63,\)"),
        ({"prologue": "relu"}, "relu"),
    ],
)
def test_refusals(keywords, message):
    with pytest.raises(QvditError, match=message):
        quantize(torch.zeros(4, 64), **{"act_bits": 8, "symmetric": True, **keywords})


def test_too_many_features():
    with pytest.raises(QvditError, match="16385"):
        quantize(torch.zeros(1, 16385), 8, True)


def test_no_rows():
    assert [len(t) for t in quantize(torch.zeros(0, 64), 8, False)][:3] == [0, 0, 0]
