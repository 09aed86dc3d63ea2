"""The module on the kernels against the eager reference, alone and merged."""

from __future__ import annotations

import pytest
import torch

from qvdit.contract import FrameRows
from qvdit.method.lowbit import LowBitLinear
from qvdit.runtimes.torch_linear import KernelLinear

WIDTHS = [(2, 6), (3, 6), (4, 8), (8, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [
    (FrameRows.SEQUENCE, (2, 32, 200)),
    (FrameRows.SPATIAL, (8, 9, 200)),
    (FrameRows.TEMPORAL, (17, 4, 200)),
    (FrameRows.TEMPORAL, (2, 3, 3, 200)),  # rows wrap around
    (FrameRows.NONE, (3, 5, 200)),
]
# Integers are equal, so what is left is float32 rounding of step 4, and of the output's own type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    error = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("rows", "shape"), LAYOUTS)
def test_it_is_the_reference(dtype, bits, act_bits, symmetric, zero, rows, shape, low_bit_layer):
    parts = ("bias", "smooth", "gain", *(["zero"] if zero else []))
    layer = low_bit_layer(96, 200, bits, parts, 2, act_bits=act_bits, act_symmetric=symmetric, rows=rows)
    x = activations(*shape, dtype=dtype)
    assert_same(KernelLinear(layer).cuda()(x.cuda()), LowBitLinear(layer)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "rotation"), [(192, 64), (1152, 128), (1024, 1024)])
def test_rotated_layers(dtype, bits, act_bits, symmetric, k, rotation, low_bit_layer):
    kinds = {"act_bits": act_bits, "act_symmetric": symmetric, "rotation": rotation}
    layers = [low_bit_layer(128, k, bits, ("zero", "smooth", "gain"), 1, seed=seed, **kinds) for seed in range(2)]
    x = activations(2, 32, k, dtype=dtype)
    assert_same(KernelLinear(layers[0]).cuda()(x.cuda()), LowBitLinear(layers[0])(x))
    expected = torch.cat([LowBitLinear(layer)(x) for layer in layers], -1)
    assert_same(KernelLinear(*layers).cuda()(x.cuda()), expected)


@pytest.mark.parametrize("parts", [(), ("bias",), ("zero", "bias")])
@pytest.mark.parametrize("shape", [(1, 64), (64,), (3, 2, 5, 64), (300, 64)])
def test_any_leading_shape(parts, shape, low_bit_layer):
    layer = low_bit_layer(40, 64, 4, parts)
    x = activations(*shape, dtype=torch.bfloat16)
    assert_same(KernelLinear(layer).cuda()(x.cuda()), LowBitLinear(layer)(x))


def test_an_input_that_is_not_contiguous(low_bit_layer):
    layer = low_bit_layer(40, 64, 4, ("gain",), 1)
    x = activations(2, 64, 8, dtype=torch.bfloat16).transpose(1, 2)
    assert_same(KernelLinear(layer).cuda()(x.cuda()), LowBitLinear(layer)(x))


def test_rows_with_nan(low_bit_layer):
    layer = low_bit_layer(128, 64, 4, ("gain", "bias"), 1)
    x = activations(2, 8, 64, dtype=torch.bfloat16)
    x[1, 3, 7] = torch.nan
    bad = KernelLinear(layer).cuda()(x.cuda()).isnan().cpu()
    assert bad[1, 3].all()
    assert bad.sum() == 128


# Merged layers ask the operator for u's layout with tensors that the guards of other tests cannot look at.


@pytest.mark.unguarded
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "shape"), LAYOUTS)
@pytest.mark.parametrize(("count", "n", "rank"), [(3, 128, 1), (2, 256, 4), (3, 384, 2)])
def test_merged_layers(dtype, bits, act_bits, symmetric, rows, shape, count, n, rank, low_bit_layer):
    parts = ("zero", "bias", "smooth", "gain")
    kinds = {"act_bits": act_bits, "act_symmetric": symmetric, "rows": rows}
    layers = [low_bit_layer(n, 200, bits, parts, rank, seed=seed, **kinds) for seed in range(count)]
    x = activations(*shape, dtype=dtype)
    found = KernelLinear(*layers).cuda()(x.cuda())
    assert_same(found, torch.cat([LowBitLinear(layer)(x) for layer in layers], -1))
    apart = torch.cat([KernelLinear(layer).cuda()(x.cuda()) for layer in layers], -1)
    assert_same(found, apart.cpu())


@pytest.mark.unguarded
@pytest.mark.parametrize("count", [1, 3])
def test_under_compile_and_in_a_cuda_graph(count, low_bit_layer):
    parts = ("zero", "bias", "smooth", "gain")
    layers = [low_bit_layer(128, 192, 3, parts, 1, seed=seed, act_bits=6) for seed in range(count)]
    module = KernelLinear(*layers).cuda()
    x = activations(2, 64, 192, dtype=torch.bfloat16).cuda()
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), eager, rtol=1e-2, atol=1e-2)
    longer = activations(2, 80, 192, dtype=torch.bfloat16).cuda()
    torch.testing.assert_close(compiled(longer), module(longer), rtol=1e-2, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    x.copy_(torch.randn_like(x))
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, module(x))
