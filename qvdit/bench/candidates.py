"""Everything timed at one size of a linear: the peers, our kernels alone, and the whole linear.

All int8 products get the same integers, of 4-bit weights: power limits a GPU, and larger integers take more of it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from qvdit.bench import peers
from qvdit.bench.shapes import Shape
from qvdit.bench.timing import Candidate
from qvdit.contract.packing import packed_words
from qvdit.runtimes import cuda, torch_ops

FRAMES = 16
_SET_BYTES = 256e6  # of all input sets together, several times a GPU's L2: nothing is timed out of that
_FEWEST, _MOST = 3, 64
_MANY_ROWS = 65536  # from here on only what tells something new is timed
SUSTAINED_ROWS = 16384  # from here on products keep the whole GPU busy, and its power limit sets their clocks
_PROLOGUES = (Shape(32768, 1152, 1152), Shape(32768, 1152, 4608))  # an attention's input, and an MLP's second linear's
_THREE_BITS = (*_PROLOGUES, Shape(32768, 5120, 5120))

Rows = tuple[torch.Tensor, ...]


def input_sets(shape: Shape) -> int:
    """How many input sets take turns. The smallest footprint counts: int8 rows and 4-bit weights."""
    each = shape.m * shape.k + shape.n * shape.k / 2
    return min(max(math.ceil(_SET_BYTES / each), _FEWEST), _MOST)


@dataclass(frozen=True)
class LowBit:
    """Our side's tensors of a size; one of each for every input set where they are lists."""

    words: dict[int, list[torch.Tensor]]  # by bits: int32 [N, b · K / 32]
    weight: list[torch.Tensor]  # int8 [N, K]: the 4-bit words, unpacked
    scale: torch.Tensor  # float32 [N]
    bias: torch.Tensor  # float32 [N]
    alpha: torch.Tensor  # float16 [4, K]
    beta: dict[int, torch.Tensor]  # by rank: [R, N], of the type that layers hold on the GPU
    gain: torch.Tensor  # float32 [T]
    modulation: torch.Tensor  # float32 [2, K]

    @staticmethod
    def random(shape: Shape, sets: int, three_bits: bool, device: torch.device) -> LowBit:
        """Random tensors; y's values are of the size of one."""
        n, k = shape.n, shape.k

        def words(bits: int) -> list[torch.Tensor]:
            size, low, high = (n, packed_words(k, bits)), -(1 << 31), 1 << 31
            return [torch.randint(low, high, size, dtype=torch.int32, device=device) for _ in range(sets)]

        packed = {bits: words(bits) for bits in ((4, 3) if three_bits else (4,))}
        beta = (torch.randn(4, n, device=device) / k).half()
        return LowBit(
            words=packed,
            weight=[torch_ops.unpack_weight(w, 4, k, None, False)[0] for w in packed[4]],
            scale=torch.rand(n, device=device) / k,
            bias=torch.randn(n, device=device),
            alpha=torch.randn(4, k, device=device).half(),
            beta={1: beta[:1].float(), 4: beta},
            gain=torch.rand(FRAMES, device=device),
            modulation=torch.randn(2, k, device=device),
        )

    def quantize(self, x: torch.Tensor, rank: int = 0, prologue: str = "plain") -> Rows:
        """quantize_rows' results; ranks above 0 with frame gain."""
        options = self.low_rank(x, rank) | {"prologue": prologue}
        if prologue == "layernorm":
            options |= {"modulation_scale": self.modulation[:1], "modulation_shift": self.modulation[1:]}
        return torch.ops.qvdit.quantize_rows(x, 8, True, **options)

    def low_rank(self, x: torch.Tensor, rank: int) -> dict[str, object]:
        """The input side of a low-rank term, for x."""
        per_frame = max(len(x) // FRAMES, 1)
        return {"alpha": self.alpha[:rank], "frame_gain": self.gain, "tokens_per_frame": per_frame} if rank else {}

    def gemm(self, rows: Rows, i: int, y: torch.Tensor, rank: int, tile: int, bias: bool = True) -> None:
        """The product alone, with its whole epilogue, into y."""
        beta = self.beta[rank] if rank else None
        added = self.bias if bias else None
        torch_ops.gemm(rows, self.weight[i], None, self.scale, None, beta, added, y, tile)

    def linear(self, x: torch.Tensor, i: int, rank: int, bits: int) -> torch.Tensor:
        """The whole linear: quantization, weights unpacked from ``bits``, product, epilogue."""
        options = self.low_rank(x, rank) | ({"beta": self.beta[rank]} if rank else {})
        weights = (self.words[bits][i], bits, self.scale)
        return torch.ops.qvdit.quantized_linear(x, 8, True, *weights, bias=self.bias, **options)


def candidates(shape: Shape, tiles: bool, device: torch.device) -> list[Candidate]:
    """What is timed at a size. tiles: the GEMM with every tile too."""
    sets = input_sets(shape)
    xs = [torch.randn(shape.m, shape.k, dtype=torch.bfloat16, device=device) for _ in range(sets)]
    ours = LowBit.random(shape, sets, shape in _THREE_BITS, device)
    made = (_peers(shape, xs, ours), _products(shape, xs, ours, tiles), _linears(shape, xs, ours))
    return [*itertools.chain(*made), *_memory_bound(shape, xs, ours)]


def sustained(chosen: Iterable[Candidate], shape: Shape) -> list[Candidate]:
    """Those that are timed by themselves for long, too: of many rows the products that are compared."""
    products = (("bf16", 0), ("fp8_row", 0), ("gemm", 1))
    many = shape.m >= SUSTAINED_ROWS
    return [each for each in chosen if many and (each.what, each.rank) in products and each.tile is None]


def large_copy(device: torch.device) -> Candidate:
    """A copy of 1 GiB, far more than any cache holds."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=device).random_() for _ in range(2))
    return Candidate("copy", lambda i: target.copy_(source), moved=2.0 * source.numel())


def _peers(shape: Shape, xs: list[torch.Tensor], ours: LowBit) -> Iterator[Candidate]:
    """bf16, int8 and fp8 of the libraries; fp8 with its quantizer; the unfused 4-bit linear."""
    device = xs[0].device
    candidate = partial(Candidate, act_bits=8, operations=_operations(shape))
    dense = [torch.randn(shape.n, shape.k, dtype=torch.bfloat16, device=device) / shape.k**0.5 for _ in xs]
    bias = ours.bias.bfloat16()
    bf16 = partial(candidate, "bf16", weight_bits=16, act_bits=16)
    yield bf16(call=lambda i: torch.nn.functional.linear(xs[i], dense[i], bias))

    x_int8 = [ours.quantize(x)[0] for x in xs]
    yield candidate("int8_cublaslt", lambda i: torch._int_mm(x_int8[i], ours.weight[i].t()), weight_bits=8)

    weight_fp8, x_fp8, scale = [peers.fp8_rows(w)[0] for w in dense], [peers.fp8_rows(x) for x in xs], ours.scale[None]
    yield candidate("fp8_row", lambda i: peers.fp8_row(*x_fp8[i], weight_fp8[i], scale), weight_bits=8)

    fp8 = _compiled(peers.fp8_row_linear)
    yield candidate("fp8_row_linear", lambda i: fp8(_any_rows(xs[i]), weight_fp8[i], scale), weight_bits=8)

    if shape.m < _MANY_ROWS:
        unfused, size = _compiled(peers.unfused_w4a8), (shape.n, shape.k // 2)
        packed = [torch.randint(0, 256, size, dtype=torch.uint8, device=device) for _ in xs]
        call = lambda i: unfused(_any_rows(xs[i]), packed[i], scale, ours.bias)  # noqa: E731
        yield candidate("unfused_w4a8", call, weight_bits=4)


def _products(shape: Shape, xs: list[torch.Tensor], ours: LowBit, tiles: bool) -> Iterator[Candidate]:
    """The GEMM alone, on what is quantized and unpacked already; with scales and nothing else, by CUTLASS's tiles."""
    few = shape.m >= _MANY_ROWS
    y = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=xs[0].device)
    rows = {rank: [ours.quantize(x, rank) for x in xs] for rank in ((1,) if few else (0, 1, 4))}

    def gemm(rank: int, tile: cuda.Tile, bias: bool, i: int) -> None:
        ours.gemm(rows[rank][i], i, y, rank, tile, bias)

    candidate = partial(Candidate, weight_bits=8, act_bits=8, operations=_operations(shape))
    for rank in rows:
        yield candidate("gemm", partial(gemm, rank, cuda.Tile.AUTO, True), rank=rank)
    for tile in [] if few else [t for t in cuda.Tile if t.name.startswith("WGMMA")]:
        yield candidate("cutlass_s8", partial(gemm, 0, tile, False), tile=tile.name)
    for tile in list(cuda.Tile)[1:] if tiles else []:
        yield candidate("gemm", partial(gemm, 1, tile, True), rank=1, tile=tile.name)


def _linears(shape: Shape, xs: list[torch.Tensor], ours: LowBit) -> Iterator[Candidate]:
    """The whole linear, weights packed."""

    def linear(rank: int, bits: int, i: int) -> torch.Tensor:
        return ours.linear(xs[i], i, rank, bits)

    candidate = partial(Candidate, "linear", act_bits=8, operations=_operations(shape))
    for rank in (0, 1) if shape.m >= _MANY_ROWS else (0, 1, 4):
        yield candidate(partial(linear, rank, 4), weight_bits=4, rank=rank)
    if 3 in ours.words:
        yield candidate(partial(linear, 1, 3), weight_bits=3, rank=1)


def _memory_bound(shape: Shape, xs: list[torch.Tensor], ours: LowBit) -> Iterator[Candidate]:
    """A copy of x, the quantizer, unpacking."""

    def quantize(rank: int, prologue: str, i: int) -> Rows:
        return ours.quantize(xs[i], rank, prologue)

    def unpack(bits: int, i: int) -> object:
        return torch_ops.unpack_weight(ours.words[bits][i], bits, shape.k, None, False)

    elements, few = shape.m * shape.k, shape.m >= _MANY_ROWS
    yield Candidate("copy", lambda i: xs[i].clone(), moved=4.0 * elements)
    candidate = partial(Candidate, "quantize", act_bits=8, moved=3.0 * elements)
    for rank in (1,) if few else (0, 1, 4):
        yield candidate(partial(quantize, rank, "plain"), rank=rank)
    for prologue in ("gelu", "layernorm") if shape in _PROLOGUES else ():
        yield candidate(partial(quantize, 1, prologue), rank=1, prologue=prologue)
    for bits in () if few else ours.words:
        yield Candidate("unpack", partial(unpack, bits), bits, moved=(bits / 8 + 1) * shape.n * shape.k)


def _operations(shape: Shape) -> float:
    return 2.0 * shape.m * shape.n * shape.k


@functools.cache
def _compiled(function):  # type: ignore[no-untyped-def]
    """Compiled once for every N and K; the rows' number may vary, and costs a compilation less."""
    return torch.compile(function, dynamic=False)


def _any_rows(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
