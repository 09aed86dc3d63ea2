"""The CUDA kernels of ``runtimes/csrc``: the library found, checked and called by ctypes. Needs no PyTorch.

Pointers are device addresses as integers (0 or None: absent), sizes and dtypes as ``csrc/qvdit_kernels.h`` documents
them; the structures here repeat the ones there, and a test compares the two.
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntEnum
from pathlib import Path

from qvdit.contract import QvditError

ABI = 9  # QVDIT_ABI
STORED_ZERO = 128  # asymmetric x_q and z_x are stored less this, to fit int8

VARIABLE = "QVDIT_KERNELS"  # names the library's file
_NAME = "libqvdit_kernels.so"
_HERE = Path(__file__).parent
_PLACES = (_HERE / "lib" / _NAME, _HERE.parent / "build" / "kernels" / _NAME)
_BUILD = f"cmake -S {_HERE / 'csrc'} -B build/kernels && cmake --build build/kernels"


class Status(IntEnum):
    """What a launch function returns."""

    OK = 0
    INVALID = 1
    NO_KERNEL = 2
    CUDA = 3


class Dtype(IntEnum):
    """Types of x and y; S32 as y's gives the accumulators."""

    F32 = 0
    F16 = 1
    BF16 = 2
    S32 = 3


class Tile(IntEnum):
    """Which GEMM kernel; AUTO chooses by a measured table."""

    AUTO = 0
    MMA_128X128 = 1
    MMA_128X256 = 2
    WGMMA_128X128 = 3
    WGMMA_128X192 = 4
    WGMMA_128X96 = 5


_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class QuantizeArgs(ctypes.Structure):
    """qvdit_quantize_args."""

    _fields_ = (
        ("x", _POINTER),
        ("m", _SIZE),
        ("k", _SIZE),
        ("x_dtype", _INT),
        ("prologue", _INT),
        ("act_bits", _INT),
        ("symmetric", _INT),
        ("inv_smooth", _POINTER),
        ("rotation", _SIZE),
        ("modulation_scale", _POINTER),
        ("modulation_shift", _POINTER),
        ("modulation_stride", _SIZE),
        ("rows_per_modulation", _SIZE),
        ("epsilon", _FLOAT),
        ("frames", _INT),
        ("frame_gain", _POINTER),
        ("tokens_per_frame", _SIZE),
        ("ranks_per_gain", _SIZE),
        ("alpha", _POINTER),
        ("rank", _SIZE),
        ("x_q", _POINTER),
        ("scale", _POINTER),
        ("zero", _POINTER),
        ("u", _POINTER),
        ("row_sum", _POINTER),
        ("transformed", _POINTER),
    )


class UnpackArgs(ctypes.Structure):
    """qvdit_unpack_args."""

    _fields_ = (
        ("words", _POINTER),
        ("n", _SIZE),
        ("k", _SIZE),
        ("bits", _INT),
        ("reserved", _INT),
        ("zero", _POINTER),
        ("weight", _POINTER),
        ("weight_sum", _POINTER),
    )


class GemmArgs(ctypes.Structure):
    """qvdit_gemm_args."""

    _fields_ = (
        ("x_q", _POINTER),
        ("weight", _POINTER),
        ("m", _SIZE),
        ("n", _SIZE),
        ("k_pad", _SIZE),
        ("scale", _POINTER),
        ("weight_scale", _POINTER),
        ("zero", _POINTER),
        ("weight_sum", _POINTER),
        ("weight_zero", _POINTER),
        ("row_sum", _POINTER),
        ("u", _POINTER),
        ("beta", _POINTER),
        ("rank", _SIZE),
        ("segment", _SIZE),
        ("bias", _POINTER),
        ("y", _POINTER),
        ("y_dtype", _INT),
        ("tile", _INT),
        ("beta_dtype", _INT),
        ("reserved", _INT),
    )


class AttentionArgs(ctypes.Structure):
    """qvdit_attention_args."""

    _fields_ = (
        ("q", _POINTER),
        ("k", _POINTER),
        ("v", _POINTER),
        ("batch", _SIZE),
        ("heads", _SIZE),
        ("rows", _SIZE),
        ("keys", _SIZE),
        ("head_size", _SIZE),
        ("q_batch", _SIZE),
        ("q_row", _SIZE),
        ("q_head", _SIZE),
        ("k_batch", _SIZE),
        ("k_row", _SIZE),
        ("k_head", _SIZE),
        ("v_batch", _SIZE),
        ("v_row", _SIZE),
        ("v_head", _SIZE),
        ("scale", _FLOAT),
        ("dtype", _INT),
        ("y", _POINTER),
    )


class GatedResidualArgs(ctypes.Structure):
    """qvdit_gated_residual_args."""

    _fields_ = (
        ("residual", _POINTER),
        ("x", _POINTER),
        ("m", _SIZE),
        ("k", _SIZE),
        ("x_dtype", _INT),
        ("reserved", _INT),
        ("gate", _POINTER),
        ("rows_per_gate", _SIZE),
        ("swapped", _SIZE),
        ("swapped_inner", _SIZE),
        ("y", _POINTER),
    )


class KernelLibrary:
    """A loaded library. Its launch functions start a kernel on a stream (a cudaStream_t as an integer) and return."""

    def __init__(self, path: Path):
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.qvdit_last_error.restype = ctypes.c_char_p
            self._library.qvdit_architectures.restype = ctypes.c_char_p
            abi = self._library.qvdit_abi()
        except (OSError, AttributeError) as error:
            raise QvditError(f"{path} ({error})", "the CUDA kernels' library", f"build it: {_BUILD}") from None
        if abi != ABI:
            raise QvditError(f"{path} of interface {abi}", f"interface {ABI}", f"build it again: {_BUILD}")
        self.path = path
        self.architectures = tuple(self._library.qvdit_architectures().decode().split(";"))
        for name, arguments in (
            ("qvdit_quantize_rows", QuantizeArgs),
            ("qvdit_unpack_weight", UnpackArgs),
            ("qvdit_low_bit_gemm", GemmArgs),
            ("qvdit_attention", AttentionArgs),
            ("qvdit_gated_residual", GatedResidualArgs),
        ):
            getattr(self._library, name).argtypes = (ctypes.POINTER(arguments), ctypes.c_void_p)
        layer = (ctypes.POINTER(arguments) for arguments in (QuantizeArgs, UnpackArgs, GemmArgs))
        self._library.qvdit_low_bit_linear.argtypes = (*layer, ctypes.c_void_p)

    def check_device(self) -> None:
        """Raise QvditError unless the current device has kernels in this library."""
        self._check(self._library.qvdit_check_device())

    def quantize_rows(self, arguments: QuantizeArgs, stream: int) -> None:
        """Steps 1 and 2 of the operator, and u of its low-rank term."""
        self._check(self._library.qvdit_quantize_rows(ctypes.byref(arguments), stream))

    def unpack_weight(self, arguments: UnpackArgs, stream: int) -> None:
        """Canonically packed weights to int8 [N, K_pad]."""
        self._check(self._library.qvdit_unpack_weight(ctypes.byref(arguments), stream))

    def low_bit_gemm(self, arguments: GemmArgs, stream: int) -> None:
        """Steps 3 and 4 of the operator."""
        self._check(self._library.qvdit_low_bit_gemm(ctypes.byref(arguments), stream))

    def low_bit_linear(self, quantize: QuantizeArgs, unpack: UnpackArgs, gemm: GemmArgs, stream: int) -> None:
        """These three for one layer: the whole operator."""
        pointers = (ctypes.byref(arguments) for arguments in (quantize, unpack, gemm))
        self._check(self._library.qvdit_low_bit_linear(*pointers, stream))

    def attention(self, arguments: AttentionArgs, stream: int) -> None:
        """softmax(scale · q kᵀ) v."""
        self._check(self._library.qvdit_attention(ctypes.byref(arguments), stream))

    def gated_residual(self, arguments: GatedResidualArgs, stream: int) -> None:
        """residual + gate · x."""
        self._check(self._library.qvdit_gated_residual(ctypes.byref(arguments), stream))

    def _check(self, status: int) -> None:
        if status == Status.OK:
            return
        message = self._library.qvdit_last_error().decode()
        if status == Status.INVALID:
            raise QvditError(message, "sizes and pointers that the CUDA kernels take", "see csrc/qvdit_kernels.h")
        if status == Status.NO_KERNEL:
            raise QvditError(message, "a GPU and a tile that it was compiled for", f"build for this GPU: {_BUILD}")
        raise QvditError(
            message, "a working CUDA device", "see that nvidia-smi lists one and that its driver is new enough"
        )


def library_path() -> Path:
    """Where the library is: what QVDIT_KERNELS names, beside this file, or in the source tree's build folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    for place in _PLACES:
        if place.is_file():
            return place
    raise QvditError(
        f"no {_NAME} in {' or '.join(str(p.parent) for p in _PLACES)}",
        "the CUDA kernels' library",
        f"build it: {_BUILD}; or name it by {VARIABLE}",
    )


@functools.cache
def library() -> KernelLibrary:
    """The one library of this process."""
    return KernelLibrary(library_path())
