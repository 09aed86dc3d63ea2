"""The GEMM and the unpacking against the eager reference; the whole operator as models call it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qvdit.contract import WEIGHT_BITS, FrameRows, LowBitLayer, QvditError
from qvdit.contract.packing import pack, unpack
from qvdit.method.lowbit import LowBitLinear
from qvdit.runtimes import torch_ops
from qvdit.runtimes.cuda import STORED_ZERO, Tile

EPS = float(np.finfo(np.float32).eps)
MMA = [Tile.MMA_128X128, Tile.MMA_128X256]
NARROW = [Tile.WGMMA_128X192, Tile.WGMMA_128X96]  # of 16-bit outputs only
COLUMNS = {Tile.MMA_128X256: 256, Tile.WGMMA_128X192: 192, Tile.WGMMA_128X96: 96}  # of a tile; of the others 128
# M, N, K: one of each, odd, a tile and one more, several tiles, K not a multiple of a slice
SIZES = [(1, 1, 1), (7, 5, 33), (129, 127, 100), (128, 128, 128), (129, 264, 1000), (300, 520, 2080), (1, 1152, 1152)]

# Types of beta.
HELD = [np.float16, np.float32]


def tiles(n: int, size: int) -> list[Tile]:
    """Those that this device has for rows of n outputs of some size in bytes."""
    found = [*MMA]
    if torch.cuda.get_device_capability()[0] == 9 and n * size % 16 == 0:
        found += [Tile.WGMMA_128X128, *(NARROW if size == 2 else [])]
    return found


def random_layer(
    n: int, k: int, bits: int, symmetric: bool, parts: tuple[str, ...], rank: int, seed: int = 0, held=np.float32
) -> LowBitLayer:
    """``parts``: what it has of zero, bias, smooth and gain. held: beta's type."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return LowBitLayer(
        name="layer",
        weight_bits=bits,
        act_bits=8,
        act_symmetric=symmetric,
        rows=FrameRows.SEQUENCE if "gain" in parts else FrameRows.NONE,
        weight_q=rng.integers(-half, half, (n, k)).astype(np.int8),
        weight_scale=(0.01 + rng.random(n)).astype(np.float32),
        weight_zero=rng.integers(-half, half, n).astype(np.int8) if "zero" in parts else None,
        bias=floats(n) if "bias" in parts else None,
        inv_smooth=np.exp(floats(k)) if "smooth" in parts else None,
        alpha=floats(k, rank).astype(np.float16) if rank else None,
        beta=floats(rank, n).astype(held) if rank else None,
        frame_gain=floats(3) if "gain" in parts else None,
    )


def on_gpu(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).cuda()


def packed(layer: LowBitLayer) -> torch.Tensor:
    return torch.from_numpy(pack(layer.weight_q, layer.weight_bits, layer.weight_zero).view(np.int32)).cuda()


def run(
    layer: LowBitLayer, x: torch.Tensor, tokens_per_frame: int = 1, tile: int = 0, out_dtype: torch.dtype | None = None
):
    """The layer by its two parts."""
    rows = torch.ops.qvdit.quantize_rows(
        x,
        layer.act_bits,
        layer.act_symmetric,
        inv_smooth=on_gpu(layer.inv_smooth),
        alpha=None if layer.alpha is None else on_gpu(layer.alpha.T),
        frame_gain=on_gpu(layer.frame_gain),
        tokens_per_frame=tokens_per_frame,
        row_sums=layer.weight_zero is not None and layer.weight_bits == 8,
    )
    return torch.ops.qvdit.low_bit_linear(
        *rows,
        packed(layer),
        layer.weight_bits,
        layer.shape[1],
        on_gpu(layer.weight_scale),
        on_gpu(layer.weight_zero),
        on_gpu(layer.beta),
        on_gpu(layer.bias),
        out_dtype or x.dtype,
        int(tile),
    )


def run_whole(layer: LowBitLayer, x: torch.Tensor, tokens_per_frame: int = 1) -> torch.Tensor:
    """The layer as one operator."""
    return torch.ops.qvdit.quantized_linear(
        x,
        layer.act_bits,
        layer.act_symmetric,
        packed(layer),
        layer.weight_bits,
        on_gpu(layer.weight_scale),
        on_gpu(layer.weight_zero),
        on_gpu(layer.bias),
        None if layer.alpha is None else on_gpu(layer.alpha.T),
        on_gpu(layer.beta),
        on_gpu(layer.frame_gain),
        tokens_per_frame,
        on_gpu(layer.inv_smooth),
    )


def expected(
    layer: LowBitLayer, x: torch.Tensor, gains: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference's integers, and from them y and the sum of its terms' magnitudes in float64: acc, y, terms."""
    module = LowBitLinear(layer)
    rows = module.quantize(x.cpu())
    acc = module.accumulate(rows).double().numpy()
    scale = rows.scale.double().numpy()
    y = scale * acc * layer.weight_scale.astype(np.float64)
    terms = np.abs(y)
    if layer.alpha is not None:
        centred, alpha, beta = (
            rows.centred().double().numpy(),
            layer.alpha.astype(np.float64),
            layer.beta.astype(np.float64),
        )
        factor = scale if gains is None else scale * gains[:, None]
        y = y + factor * (centred @ alpha) @ beta
        terms = terms + np.abs(factor) * (np.abs(centred) @ np.abs(alpha)) @ np.abs(beta)
    if layer.bias is not None:
        y, terms = y + layer.bias, terms + np.abs(layer.bias)
    return acc, y, terms


def assert_close(y: torch.Tensor, reference: np.ndarray, terms: np.ndarray) -> None:
    """Within float32 rounding of the terms, and half a unit of the output's own type."""
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    smallest = 2.0**-25 if y.dtype == torch.float16 else 1e-37
    error = np.abs(y.double().cpu().numpy() - reference)
    assert (error <= 16 * EPS * terms + rounding * (np.abs(reference) + 16 * EPS * terms) + smallest).all()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 33), (130, 1000), (1152, 1152), (5, 5120), (3, 12288), (3, 16384)])
@pytest.mark.parametrize("zero", [False, True])
def test_unpacking(bits, n, k, zero):
    layer = random_layer(n, k, bits, True, ("zero",) if zero else (), 0)
    weight, sums = torch_ops.unpack_weight(packed(layer), bits, k, on_gpu(layer.weight_zero), True)
    stored = layer.weight_q.astype(np.int32)
    if zero and bits < 8:
        stored = stored - layer.weight_zero[:, None]
    np.testing.assert_array_equal(weight[:, :k].cpu(), stored)
    assert not weight[:, k:].any()
    np.testing.assert_array_equal(sums.cpu(), stored.sum(1))
    np.testing.assert_array_equal(unpack(packed(layer).cpu().numpy().view(np.uint32), bits, k), layer.weight_q)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zero", [False, True])
def test_accumulators_are_exact(size, bits, symmetric, zero):
    m, n, k = size
    layer = random_layer(n, k, bits, symmetric, ("zero",) if zero else (), 0, seed=bits)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).half().cuda()
    acc, _, _ = expected(layer, x)
    for tile in tiles(n, 4):
        np.testing.assert_array_equal(
            run(layer, x, tile=tile, out_dtype=torch.int32).cpu(), acc.astype(np.int64), err_msg=str(tile)
        )


@pytest.mark.parametrize("tile", [*MMA, Tile.WGMMA_128X128])
def test_largest_accumulators(tile):
    """8-bit weights with zero point -128 against asymmetric activations: every product is 255 · 255."""
    n, k = 128, 8192
    if tile not in tiles(n, 4):
        pytest.skip("Hopper's")
    weight_q = np.full((n, k), 127, np.int8)
    weight_q[1, 0] = 126
    zero = np.full(n, -128, np.int8)
    layer = LowBitLayer("layer", 8, 8, False, FrameRows.NONE, weight_q, np.ones(n, np.float32), weight_zero=zero)
    acc = run(layer, torch.ones(5, k, device="cuda"), tile=tile, out_dtype=torch.int32).cpu()
    assert (acc[:, 1] == k * 255 * 255 - 255).all()
    acc[:, 1] += 255
    assert (acc == k * 255 * 255).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rank", "held"), [(0, np.float32), *itertools.product([1, 2, 3, 4, 5, 32], HELD)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", [(), ("zero", "bias"), ("zero", "bias", "smooth", "gain")])
def test_outputs_are_within_rounding(size, rank, held, dtype, bits, parts):
    m, n, k = size
    if "gain" in parts:
        m = -(-m // 3) * 3
    layer = random_layer(n, k, bits, "zero" not in parts, parts, rank, seed=rank, held=held)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).cuda()
    # Scales of every size beside each other; sums stay within float16.
    x = x * (10.0 ** torch.linspace(-6 if dtype != torch.float16 else -2, 0, m, device="cuda"))[:, None].to(dtype)
    layer_scale = 1e-3 if dtype == torch.float16 else 1.0
    layer.weight_scale[:] *= layer_scale / k
    if rank:
        layer.beta[:] *= max(layer_scale / k, 2.0**-12)  # what float16 holds
    gains = layer.frame_gain[np.arange(m) // (m // 3) % 3].astype(np.float64) if "gain" in parts else None
    _, reference, terms = expected(layer, x, gains)
    for tile in [Tile.AUTO, *(tiles(n, dtype.itemsize) if dtype != torch.float32 else MMA)]:
        assert_close(run(layer, x, max(m // 3, 1), tile), reference, terms)


@pytest.mark.parametrize(("m", "n"), [(1, 192), (129, 264), (257, 520), (1000, 1152), (6001, 1160), (2048, 7680)])
@pytest.mark.parametrize("k", [64, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_come_through_outputs_of_16_bits(m, n, k, symmetric, bits):
    """Scales of 1 and accumulators that float16 holds: what tiles without int32 outputs are checked by.

    6001 x 1160 has several tiles for each multiprocessor, of 2048 x 7680 they are taken in strips. Weights of 8 bits
    have zero points.
    """
    rng = np.random.default_rng(m)
    x = np.zeros((m, k), np.float32)
    x[:, :60] = rng.integers(-15 if symmetric else 0, 16, (m, 60))
    x[:, 60] = 127 if symmetric else 255
    x = rng.permuted(x, axis=1)
    weight_zero = rng.integers(0, 2, n).astype(np.int8) if bits == 8 else np.zeros(n, np.int8)
    weight_q = (rng.integers(-1, 2, (n, k)) + weight_zero[:, None]).astype(np.int8)
    zeros = {"weight_zero": weight_zero} if bits == 8 else {}
    layer = LowBitLayer("layer", bits, 8, symmetric, FrameRows.NONE, weight_q, np.ones(n, np.float32), **zeros)
    centred = (weight_q - weight_zero[:, None]).T.astype(np.float64)
    expected_y = (x.astype(np.float64) @ centred).astype(np.int64)
    for tile in tiles(n, 2):
        y = run(layer, torch.from_numpy(x).half().cuda(), tile=tile)
        np.testing.assert_array_equal(y.cpu().numpy().astype(np.int64), expected_y, err_msg=str(tile))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rank", "held"), itertools.product([1, 3], HELD))
def test_nan_rows(dtype, symmetric, rank, held):
    layer = random_layer(264, 1000, 4, symmetric, ("zero", "bias"), rank, held=held)
    x = torch.randn(140, 1000, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    clean = {tile: run(layer, x, tile=tile) for tile in tiles(264, 2)}
    x[3, 5], x[139, 999] = torch.nan, torch.inf
    others = torch.ones(140, dtype=torch.bool)
    others[[3, 139]] = False
    for tile, before in clean.items():
        y = run(layer, x, tile=tile)
        assert y[[3, 139]].isnan().all()
        assert torch.equal(y[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_layer_is_the_eager_module(dtype):
    """The layer's own forward, batch and frames included."""
    layer = random_layer(96, 200, 3, True, ("zero", "bias", "smooth", "gain"), 2)
    x = torch.randn(2, 12, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = LowBitLinear(layer)(x.float()).reshape(-1, 96)
    found = run(layer, x.cuda(), tokens_per_frame=4).cpu().float()
    assert (found - y).norm() / y.norm() < (1e-3 if dtype == torch.float16 else 6e-3)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 96, 64), (2, 5, 33), (24, 1152, 1152), (1024, 384, 5120)])
def test_a_layer_is_its_parts(bits, symmetric, rank, m, n, k):
    layer = random_layer(n, k, bits, symmetric, ("zero", "bias", "smooth", "gain"), rank)
    x = torch.randn(2, m // 2, k, generator=torch.Generator().manual_seed(m)).bfloat16().cuda()
    found = run_whole(layer, x, tokens_per_frame=4)
    assert found.shape == (2, m // 2, n)
    assert torch.equal(found.reshape(-1, n), run(layer, x, tokens_per_frame=4))


def test_asymmetric_integers_are_stored_less_128():
    rows = torch.ops.qvdit.quantize_rows(torch.tensor([[0.0, 255.0] * 16], device="cuda"), 8, False)
    assert rows[0].unique().tolist() == [-STORED_ZERO, 255 - STORED_ZERO]
    assert rows[2].tolist() == [-STORED_ZERO]


@pytest.mark.unguarded
@pytest.mark.parametrize("rank", [1, 4])
def test_more_than_two_billion_outputs(rank):
    m, n, k = 120_000, 18_432, 64
    layer = random_layer(n, k, 4, True, ("bias",), rank)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda").normal_()
    for tile in tiles(n, 2):
        y = run(layer, x, tile=tile)
        for part in (slice(0, 2), slice(116_507, 116_511), slice(m - 2, m)):  # about and past 2^31
            _, reference, terms = expected(layer, x[part])
            assert_close(y[part], reference, terms)
        del y


@pytest.mark.unguarded
def test_under_compile_and_in_a_cuda_graph():
    layer = random_layer(256, 192, 4, True, ("bias",), 1)
    words, scale, alpha = packed(layer), on_gpu(layer.weight_scale), on_gpu(layer.alpha.T)
    beta, bias = on_gpu(layer.beta), on_gpu(layer.bias)

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.qvdit.quantize_rows(x * 2, 8, True, alpha=alpha)
        return torch.ops.qvdit.low_bit_linear(*rows, words, 4, 192, scale, None, beta, bias, x.dtype) + 1

    x = torch.randn(100, 192, device="cuda", dtype=torch.bfloat16)
    eager = linear(x)
    assert torch.equal(torch.compile(linear, fullgraph=True)(x), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    x.copy_(torch.randn_like(x))
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, linear(x))


@pytest.mark.unguarded
@pytest.mark.parametrize("m", [1, 512])
@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("whole", [False, True])
def test_kernels_that_start_early_wait(m, rank, whole):
    """What each reads was written just before, where it writes was read just before; as with pauses between them."""
    width = 1152
    layers = [random_layer(width, width, 4, False, ("zero", "bias"), rank, seed) for seed in range(2)]
    stored = [
        (
            packed(layer),
            on_gpu(layer.weight_scale),
            on_gpu(layer.weight_zero),
            on_gpu(layer.beta / width),
            on_gpu(layer.bias),
        )
        for layer in layers
    ]
    alphas = [on_gpu(layer.alpha.T) for layer in layers]
    x = torch.randn(m, width, generator=torch.Generator().manual_seed(m)).bfloat16().cuda()

    def chain(pause: bool) -> torch.Tensor:
        y = x
        for step in range(40):
            words, scale, *rest = stored[step % 2]
            if whole and not pause:
                words = words.clone() if step % 3 == 0 else words
                zero, beta, bias = rest
                factors = {"alpha": alphas[step % 2], "beta": beta}
                y = torch.ops.qvdit.quantized_linear(y.tanh(), 8, False, words, 4, scale, zero, bias, **factors)
                continue
            rows = torch.ops.qvdit.quantize_rows(y.tanh(), 8, False, alpha=alphas[step % 2])  # its input is free again
            if pause:
                torch.cuda.synchronize()
            if step % 3 == 0:
                words = words.clone()
            y = torch.ops.qvdit.low_bit_linear(*rows, words, 4, width, scale, *rest, torch.bfloat16)
            if pause:
                torch.cuda.synchronize()
        return y

    expected_y = chain(True)
    assert expected_y.isfinite().all()
    assert expected_y.float().std() > 0
    for _ in range(20):
        assert torch.equal(chain(False), expected_y)


@pytest.mark.unguarded
def test_operators_keep_pytorchs_rules():
    x = torch.randn(4, 64, device="cuda", dtype=torch.float16)
    torch.library.opcheck(torch.ops.qvdit.quantize_rows, (x, 8, False))
    rows = torch.ops.qvdit.quantize_rows(x, 8, False)
    words = torch.randint(0, 1 << 30, (8, 8), device="cuda", dtype=torch.int32)
    arguments = (*rows, words, 4, 64, torch.ones(8, device="cuda"), None, None, None, torch.float16)
    torch.library.opcheck(torch.ops.qvdit.low_bit_linear, arguments)
    torch.library.opcheck(torch.ops.qvdit.quantized_linear, (x, 8, False, words, 4, torch.ones(8, device="cuda")))


def test_refusals():
    layer = random_layer(12, 64, 8, True, ("zero",), 0)
    rows = torch.ops.qvdit.quantize_rows(torch.randn(4, 64, device="cuda").half(), 8, True)
    scale, zero = on_gpu(layer.weight_scale), on_gpu(layer.weight_zero)

    def linear(*changed, tile: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        weight = changed or (packed(layer), 8, 64, scale, zero)
        return torch.ops.qvdit.low_bit_linear(*rows, *weight, None, None, dtype, int(tile))

    with pytest.raises(QvditError, match="row_sums=True"):
        linear()
    with pytest.raises(QvditError, match="5 bits"):
        linear(torch.zeros(12, 10, device="cuda", dtype=torch.int32), 5, 64, scale, None)
    with pytest.raises(QvditError, match=r"expected torch\.int32 \(12, 8\)"):
        linear(packed(layer), 4, 64, scale, None)
    with pytest.raises(QvditError, match="tile 9"):
        linear(packed(layer), 8, 64, scale, None, tile=9)
    with pytest.raises(QvditError, match=r"rows of a multiple of 16 bytes|Hopper only|without the wgmma"):
        linear(packed(layer), 8, 64, scale, None, tile=Tile.WGMMA_128X128)


@pytest.mark.parametrize("tile", NARROW)
def test_tiles_of_16_bits_refuse_int32(tile):
    x = torch.randn(4, 64, device="cuda").half()
    with pytest.raises(QvditError, match=r"for 16-bit outputs|Hopper only|without the wgmma"):
        run(random_layer(128, 64, 4, True, (), 0), x, tile=tile, out_dtype=torch.int32)


@pytest.mark.parametrize(("rank", "held"), [(0, np.float32), *itertools.product([1, 2, 3, 4, 10], HELD)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "segment"), [(1, 128), (129, 256), (300, 384), (12_001, 384)])
def test_linears_below_each_other(m, segment, rank, held, symmetric):
    """q, k and v as one product on one quantized x: the same bits as three. The last size is of many tiles."""
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).bfloat16().cuda()
    layers = [random_layer(segment, 96, 4, symmetric, ("bias", "gain"), rank, seed, held) for seed in range(3)]

    def quantized(*chosen: LowBitLayer) -> tuple[torch.Tensor, ...]:
        factors = {}
        if rank:
            factors["alpha"] = torch.cat([on_gpu(layer.alpha.T) for layer in chosen])
            factors["frame_gain"] = torch.stack([on_gpu(layer.frame_gain) for layer in chosen])
        return torch.ops.qvdit.quantize_rows(x, 8, symmetric, tokens_per_frame=2, **factors)

    x_q, scale, zero, u, row_sum = quantized(*layers)
    for alone in map(quantized, layers):  # u may be rounded otherwise: of rank 1 it is a sum in float32
        for found, expected in zip(alone[:3], (x_q, scale, zero), strict=True):
            assert torch.equal(found, expected)

    def linear(tile: int, *which: int) -> torch.Tensor:
        chosen = [layers[i] for i in which]
        own = torch.cat([u[i * rank : (i + 1) * rank] for i in which])
        return torch.ops.qvdit.low_bit_linear(
            *(x_q, scale, zero, own, row_sum),
            torch.cat([packed(layer) for layer in chosen]),
            4,
            96,
            torch.cat([on_gpu(layer.weight_scale) for layer in chosen]),
            None,
            torch.cat([on_gpu(layer.beta) for layer in chosen], 1) if rank else None,
            torch.cat([on_gpu(layer.bias) for layer in chosen]),
            torch.bfloat16,
            tile,
            segment,
        )

    for tile in [Tile.AUTO, *tiles(3 * segment, 2)]:
        if segment % COLUMNS.get(tile, 128):
            with pytest.raises(QvditError, match="segments of"):
                linear(int(tile), 0, 1, 2)
        else:
            apart = torch.cat([linear(int(tile), i) for i in range(3)], 1)
            if tile == Tile.AUTO:  # may choose another kernel, which adds the same terms in another order
                torch.testing.assert_close(linear(0, 0, 1, 2), apart, rtol=2.0**-7, atol=1e-3)
            else:
                assert torch.equal(linear(int(tile), 0, 1, 2), apart)


def test_segments_that_split_tiles_are_refused():
    layer = random_layer(192, 96, 4, True, (), 0)
    rows = torch.ops.qvdit.quantize_rows(torch.randn(4, 96, device="cuda"), 8, True)
    with pytest.raises(QvditError, match="segments of 96 columns"):
        torch.ops.qvdit.low_bit_linear(
            *rows, packed(layer), 4, 96, on_gpu(layer.weight_scale), None, None, None, torch.bfloat16, 0, 96
        )
