"""The CUDA kernels as PyTorch operators: ``torch.ops.qvdit.quantized_linear``, the whole of LowBitLinear, and its two
parts, ``quantize_rows`` and ``low_bit_linear``.

The parts compose: whatever reads one x can quantize it once. As a whole, weights are unpacked beside the quantizer. All
work under ``torch.compile`` (their fake implementations give shapes) and in CUDA graphs (kernels go to the current
stream; nothing waits). Inference only.

Symbols: M rows of an input flattened to [M, K], K_pad the next multiple of 32, N output features, R rank, T frames.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from qvdit.contract import QvditError
from qvdit.contract.kernels import Prologue
from qvdit.contract.layer import ROW_PAD
from qvdit.contract.packing import packed_words
from qvdit.runtimes import cuda

_DTYPES = {
    torch.float32: cuda.Dtype.F32,
    torch.float16: cuda.Dtype.F16,
    torch.bfloat16: cuda.Dtype.BF16,
    torch.int32: cuda.Dtype.S32,
}
PROLOGUES = {p.name.lower(): p for p in Prologue}


def padded(k: int) -> int:
    """K_pad."""
    return (k + ROW_PAD - 1) // ROW_PAD * ROW_PAD


@torch.library.custom_op("qvdit::quantize_rows", mutates_args=(), device_types="cuda")
def quantize_rows(
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    inv_smooth: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    row_sums: bool = False,
    prologue: str = "plain",
    modulation_scale: torch.Tensor | None = None,
    modulation_shift: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    rotation: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 1 and 2 of LowBitLinear for x [..., K], float32, float16 or bfloat16.

    inv_smooth: float32 [K]. alpha: float16 [R, K], transposed.
    frame_gain: float32 [T], for row m that of frame (m // tokens_per_frame) mod T; or [S, T], for S linears that read
    the same x, each with R / S of alpha's rows.
    prologue: plain, gelu (tanh) or layernorm (without weights, then · (1 + modulation_scale) + modulation_shift,
    float32 [B, K], B dividing M; their rows may be apart). rotation: features a block of the Walsh-Hadamard transform.
    Returns x_q int8 [M, K_pad], asymmetric ones less 128; scale float32 [M]; zero int32 [M], the zero point of what is
    stored, [0] if symmetric; u float32 [R, M]; row_sum int32 [M], Σ (x_q - zero), [0] unless ``row_sums``.
    """
    outputs, x = _quantized(x, symmetric, alpha, row_sums), x.contiguous()
    arguments = quantize_arguments(
        outputs,
        x,
        act_bits,
        symmetric,
        inv_smooth,
        alpha,
        frame_gain,
        tokens_per_frame,
        prologue,
        (modulation_scale, modulation_shift),
        epsilon,
        rotation,
    )
    launch("quantize_rows", x, arguments)
    return outputs


@quantize_rows.register_fake
def _(
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    inv_smooth: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    row_sums: bool = False,
    prologue: str = "plain",
    modulation_scale: torch.Tensor | None = None,
    modulation_shift: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    rotation: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _quantized(x, symmetric, alpha, row_sums)


@torch.library.custom_op("qvdit::low_bit_linear", mutates_args=(), device_types="cuda")
def low_bit_linear(
    x_q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    u: torch.Tensor,
    row_sum: torch.Tensor,
    words: torch.Tensor,
    weight_bits: int,
    in_features: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: int = 0,
    segment: int = 0,
) -> torch.Tensor:
    """Steps 3 and 4 of LowBitLinear: y [M, N] of ``out_dtype``.

    x_q, scale, zero, u, row_sum: as :func:`quantize_rows` gives them; 8-bit weights with zero points need row_sum.
    words: int32 or uint32 [N, b · K_pad / 32], packed as qvdit.contract.packing packs them. weight_scale: float32 [N];
    weight_zero: int8 [N]; beta: float32 or float16 [R, N], which is faster of several ranks and slower of one;
    bias: float32 [N]. out_dtype: float32, float16 or bfloat16; int32 gives the exact accumulators
    Σ (x_q - zero)(weight_q - weight_zero), for tests. tile: of qvdit.runtimes.cuda.Tile. segment: columns of each of S
    linears that lie below each other in the weights, a multiple of 128, and whose u are S · R rows; 0: there is one.
    """
    y = _new(x_q, (x_q.shape[0], words.shape[0]), out_dtype)
    weight, weight_sum = unpack_weight(words, weight_bits, in_features, weight_zero, zero.numel() > 0)
    apart = _zeros_apart(weight_zero, weight_bits)
    if apart is not None and len(row_sum) != len(x_q):
        raise QvditError("8-bit weights with zero points, without row_sum", "row_sum", "quantize with row_sums=True")
    rows = (x_q, scale, zero, u, row_sum)
    gemm(rows, weight, weight_sum, weight_scale, apart, beta, bias, y, tile, segment)
    return y


@low_bit_linear.register_fake
def _(
    x_q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    u: torch.Tensor,
    row_sum: torch.Tensor,
    words: torch.Tensor,
    weight_bits: int,
    in_features: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: int = 0,
    segment: int = 0,
) -> torch.Tensor:
    return _new(x_q, (x_q.shape[0], words.shape[0]), out_dtype)


@torch.library.custom_op("qvdit::quantized_linear", mutates_args=(), device_types="cuda")
def quantized_linear(
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    words: torch.Tensor,
    weight_bits: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    inv_smooth: torch.Tensor | None = None,
    rotation: int = 0,
    segment: int = 0,
) -> torch.Tensor:
    """LowBitLinear: y [..., N] of x's dtype for x [..., K]; arguments as :func:`quantize_rows` and
    :func:`low_bit_linear` have them.
    """
    apart, x = _zeros_apart(weight_zero, weight_bits), x.contiguous()
    rows = _quantized(x, symmetric, alpha, apart is not None)
    weight, weight_sum = _unpacked(words, x.shape[-1], not symmetric)
    y = _new(x, (*x.shape[:-1], words.shape[0]), x.dtype)
    factors = (inv_smooth, alpha, frame_gain, tokens_per_frame)
    quantize = quantize_arguments(rows, x, act_bits, symmetric, *factors, rotation=rotation)
    unpack = unpack_arguments(words, weight_bits, x.shape[-1], weight_zero, weight, weight_sum)
    flat = y.view(-1, words.shape[0])
    product = gemm_arguments(rows, weight, weight_sum, weight_scale, apart, beta, bias, flat, segment=segment)
    launch("low_bit_linear", x, quantize, unpack, product)
    return y


@quantized_linear.register_fake
def _(
    x: torch.Tensor, act_bits: int, symmetric: bool, words: torch.Tensor, *others: object, **named: object
) -> torch.Tensor:
    return _new(x, (*x.shape[:-1], words.shape[0]), x.dtype)


def unpack_weight(
    words: torch.Tensor, bits: int, k: int, zero: torch.Tensor | None, sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed words [N, b · K_pad / 32] → int8 [N, K_pad], less ``zero`` [N] where b < 8; its row sums, int32 [N]."""
    weight, weight_sum = _unpacked(words, k, sums)
    launch("unpack_weight", words, unpack_arguments(words, bits, k, zero, weight, weight_sum))
    return weight, weight_sum


def gemm(
    rows: tuple[torch.Tensor, ...],
    weight: torch.Tensor,
    weight_sum: torch.Tensor | None,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tile: int = 0,
    segment: int = 0,
) -> None:
    """Steps 3 and 4 of LowBitLinear into y [M, N]: on quantize_rows' results and int8 weights [N, K_pad].

    weight, weight_sum: as :func:`unpack_weight` gives them; weight_zero: where it is not subtracted from ``weight``.
    segment: as for :func:`low_bit_linear`.
    """
    launch(
        "low_bit_gemm",
        y,
        gemm_arguments(rows, weight, weight_sum, weight_scale, weight_zero, beta, bias, y, tile, segment),
    )


# What the library is called with; addresses only, so the tensors must outlive the call --------------------------------


def quantize_arguments(
    outputs: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    inv_smooth: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    prologue: str = "plain",
    modulation: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    epsilon: float = 1e-6,
    rotation: int = 0,
    transformed: torch.Tensor | None = None,
) -> cuda.QuantizeArgs:
    """As for :func:`quantize_rows`, into its results; x dense. ``transformed``, float32 [M, K], receives x̃."""
    _check_devices(x, inv_smooth, alpha, frame_gain, *modulation)
    k = x.shape[-1]
    m = x.numel() // k
    x_q, scale, zero, u, row_sum = outputs
    modulation_rows, stride = _modulation(modulation, m, k)
    rank = 0 if alpha is None else alpha.shape[0]
    if rank % _rows(frame_gain):
        got = f"gains of {_rows(frame_gain)} linears for {rank} rows of alpha"
        raise QvditError(got, "as many rows for each", "stack their alphas and their gains in one order")
    if x.dtype not in _DTYPES or prologue not in PROLOGUES:
        raise QvditError(
            f"{x.dtype} and prologue {prologue!r}", f"a float type and one of {sorted(PROLOGUES)}", "cast x"
        )
    return cuda.QuantizeArgs(
        x=_pointer(x, x.dtype),
        m=m,
        k=k,
        x_dtype=_DTYPES[x.dtype],
        prologue=PROLOGUES[prologue],
        act_bits=act_bits,
        symmetric=symmetric,
        inv_smooth=_pointer(inv_smooth, torch.float32, (k,)),
        rotation=rotation,
        modulation_scale=None if modulation[0] is None else modulation[0].data_ptr(),
        modulation_shift=None if modulation[1] is None else modulation[1].data_ptr(),
        modulation_stride=stride,
        rows_per_modulation=max(m // modulation_rows, 1),
        epsilon=epsilon,
        frames=0 if frame_gain is None else frame_gain.shape[-1],
        frame_gain=_pointer(frame_gain, torch.float32),
        tokens_per_frame=tokens_per_frame,
        ranks_per_gain=rank // _rows(frame_gain),
        alpha=_pointer(alpha, torch.float16, (rank, k)),
        rank=rank,
        x_q=_pointer(x_q, torch.int8),
        scale=_pointer(scale, torch.float32),
        zero=_pointer(zero, torch.int32),
        u=_pointer(u, torch.float32),
        row_sum=_pointer(row_sum, torch.int32),
        transformed=_pointer(transformed, torch.float32, (m, k)),
    )


def unpack_arguments(
    words: torch.Tensor,
    bits: int,
    k: int,
    zero: torch.Tensor | None,
    weight: torch.Tensor,
    weight_sum: torch.Tensor | None,
) -> cuda.UnpackArgs:
    """As for :func:`unpack_weight`, into weight and weight_sum."""
    _check_devices(words, zero)
    n = words.shape[0]
    if words.dtype not in (torch.int32, torch.uint32):
        raise QvditError(f"packed weights of {words.dtype}", "int32 or uint32", "pack them with qvdit.contract.packing")
    return cuda.UnpackArgs(
        words=_pointer(words, words.dtype, (n, packed_words(k, bits))),
        n=n,
        k=k,
        bits=bits,
        zero=_pointer(zero, torch.int8, (n,)),
        weight=_pointer(weight, torch.int8),
        weight_sum=_pointer(weight_sum, torch.int32),
    )


def gemm_arguments(
    rows: tuple[torch.Tensor, ...],
    weight: torch.Tensor,
    weight_sum: torch.Tensor | None,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tile: int = 0,
    segment: int = 0,
) -> cuda.GemmArgs:
    """As for :func:`gemm`."""
    x_q, scale, zero, u, row_sum = rows
    _check_devices(y, *rows, weight, weight_sum, weight_scale, weight_zero, beta, bias)
    m, n = y.shape
    rank, segment = 0 if beta is None else beta.shape[0], segment or n
    beta_dtype = torch.float16 if beta is not None and beta.dtype == torch.float16 else torch.float32
    return cuda.GemmArgs(
        x_q=_pointer(x_q, torch.int8, (m, weight.shape[1])),
        weight=_pointer(weight, torch.int8, (n, x_q.shape[1])),
        m=m,
        n=n,
        k_pad=x_q.shape[1],
        scale=_pointer(scale, torch.float32, (m,)),
        weight_scale=_pointer(weight_scale, torch.float32, (n,)),
        zero=_pointer(zero, torch.int32),
        weight_sum=_pointer(weight_sum, torch.int32),
        weight_zero=_pointer(weight_zero, torch.int8, (n,)),
        row_sum=None if weight_zero is None else _pointer(row_sum, torch.int32),
        u=_pointer(u, torch.float32, (n // segment * rank, m)) if rank else None,
        beta=_pointer(beta, beta_dtype, (rank, n)),
        rank=rank,
        segment=segment,
        bias=_pointer(bias, torch.float32, (n,)),
        y=_pointer(y, y.dtype),
        y_dtype=_DTYPES[y.dtype],
        tile=tile,
        beta_dtype=_DTYPES[beta_dtype],
    )


def launch(name: str, like: torch.Tensor, *arguments: ctypes.Structure) -> None:
    """Call one of the library's launch functions on a tensor's device and its current stream."""
    with torch.cuda.device(like.device):
        getattr(_library(like.device.index), name)(*arguments, _stream(like))


def _quantized(
    x: torch.Tensor, symmetric: bool, alpha: torch.Tensor | None, row_sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """quantize_rows' results, not yet filled."""
    m = math.prod(x.shape[:-1])
    return (
        _new(x, (m, padded(x.shape[-1])), torch.int8),
        _new(x, (m,), torch.float32),
        _new(x, (0 if symmetric else m,), torch.int32),
        _new(x, (0 if alpha is None else alpha.shape[0], m), torch.float32),
        _new(x, (m if row_sums else 0,), torch.int32),
    )


def _unpacked(words: torch.Tensor, k: int, sums: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """unpack_weight's results, not yet filled."""
    n = words.shape[0]
    return _new(words, (n, padded(k)), torch.int8), _new(words, (n,), torch.int32) if sums else None


def _zeros_apart(weight_zero: torch.Tensor | None, bits: int) -> torch.Tensor | None:
    """Zero points that are not subtracted while weights are unpacked: those of 8-bit weights do not fit."""
    return weight_zero if bits == 8 else None


def _check_devices(like: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Kernels read addresses: one of another device would end the process."""
    for tensor in others:
        if tensor is not None and tensor.device != like.device:
            raise QvditError(f"a tensor on {tensor.device} beside one on {like.device}", "one device", "move it first")


def _rows(frame_gain: torch.Tensor | None) -> int:
    """How many linears have gains of their own."""
    return 1 if frame_gain is None or frame_gain.dim() == 1 else frame_gain.shape[0]


def _modulation(modulation: tuple[torch.Tensor | None, torch.Tensor | None], m: int, k: int) -> tuple[int, int]:
    """How many rows a modulation has, and how far apart in memory: (1, 0) where there is none."""
    given = [t for t in modulation if t is not None]
    if not given:
        return 1, 0
    rows, stride = given[0].shape[0], given[0].stride(0)
    for tensor in given:
        fits = tensor.shape == (rows, k) and tensor.stride() == (stride, 1) and tensor.dtype == torch.float32
        if not fits or m % rows:
            raise QvditError(
                f"a modulation of {tensor.dtype} {tuple(tensor.shape)} and strides {tensor.stride()} for {m} rows",
                f"float32 [B, {k}], B dividing the rows, both alike",
                "expand it to one row a sample",
            )
    return rows, stride


def _new(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Where a kernel writes. One place, so that tests can poison it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def attention_args(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, scale: float
) -> cuda.AttentionArgs:
    """What attention takes, of q [B, L, H, D], k and v [B, S, H, D], whatever their strides, and y, dense as q is."""
    arguments = cuda.AttentionArgs(scale=scale, dtype=_DTYPES[q.dtype], y=y.data_ptr())
    arguments.batch, arguments.rows, arguments.heads, arguments.head_size = q.shape
    arguments.keys = k.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        setattr(arguments, name, tensor.data_ptr())
        for axis, step in zip(("batch", "row", "head"), tensor.stride(), strict=False):
            setattr(arguments, f"{name}_{axis}", step)
    return arguments


def _pointer(tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int | None:
    """A tensor's address, checked; None for no tensor or an empty one."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous() or (shape is not None and tuple(tensor.shape) != shape):
        raise QvditError(
            f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}",
            f"{dtype} {'' if shape is None else shape}".strip(),
            "convert it before the call",
        )
    return tensor.data_ptr() or None


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def _library(device: int) -> cuda.KernelLibrary:
    """The library, once known to serve this device, which is the current one."""
    found = cuda.library()
    found.check_device()
    return found
