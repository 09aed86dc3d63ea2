"""What of the CUDA kernels runs without a GPU: shared headers on the host, the interface, and that they compile."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import WEIGHT_BITS, QvditError
from qvdit.contract.kernels import Prologue
from qvdit.contract.layer import ROW_PAD
from qvdit.contract.packing import pack, unpack
from qvdit.runtimes import cuda

CSRC = Path(__file__).parents[2] / "runtimes" / "csrc"
HOST_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def host(shared: Callable[..., Path]) -> ctypes.CDLL:
    """The headers that kernels and host share, as a library."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def build(folder: Path) -> None:
        folder.mkdir()
        command = [compiler, *HOST_FLAGS, "-shared", "-fPIC", str(CSRC / "host.cc"), "-o", str(folder / "libhost.so")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    library = ctypes.CDLL(str(shared("kernels-host", build) / "libhost.so"))
    library.qvdit_host_wrong_quotients.restype = ctypes.c_int64
    library.qvdit_host_wrong_quotients.argtypes = (ctypes.c_int64, ctypes.c_int64)
    library.qvdit_host_wrong_scales.restype = ctypes.c_int64
    library.qvdit_host_wrong_scales.argtypes = (ctypes.c_float, ctypes.c_int64)
    return library


def host_unpack(host: ctypes.CDLL, words: np.ndarray, bits: int, k: int, zero: np.ndarray | None = None) -> np.ndarray:
    weight = np.full((len(words), k), 0x5A, np.int8)
    size = ctypes.c_int64
    pointers = (None if array is None else array.ctypes.data_as(ctypes.c_void_p) for array in (words, zero, weight))
    words_at, zero_at, weight_at = pointers
    assert host.qvdit_host_unpack(words_at, bits, zero_at, size(len(words)), size(k), weight_at) == cuda.Status.OK
    return weight


@given(st.sampled_from(WEIGHT_BITS), st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_kernels_unpack_what_python_packs(host, bits, n, k, seed):
    half = 1 << (bits - 1)
    weight = np.random.default_rng(seed).integers(-half, half, (n, k)).astype(np.int8)
    np.testing.assert_array_equal(host_unpack(host, pack(weight, bits), bits, k), weight)


@given(st.sampled_from(WEIGHT_BITS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_kernels_and_python_read_any_words_alike(host, bits, n, blocks, seed):
    words = np.random.default_rng(seed).integers(0, 1 << 32, (n, bits * blocks), np.uint32)
    k = ROW_PAD * blocks
    np.testing.assert_array_equal(host_unpack(host, words, bits, k), unpack(words, bits, k))


@given(st.sampled_from([b for b in WEIGHT_BITS if b < 8]), st.integers(1, 9), st.integers(1, 100), st.data())
def test_kernels_take_zero_points_away(host, bits, n, k, data):
    half = 1 << (bits - 1)
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).integers
    weight, zero = draw(-half, half, (n, k)).astype(np.int8), draw(-half, half, n).astype(np.int8)
    found = host_unpack(host, pack(weight, bits, zero), bits, k, zero)
    np.testing.assert_array_equal(found, weight - zero[:, None])


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16])
def test_other_widths_are_refused(host, bits):
    nothing, size = ctypes.c_void_p(), ctypes.c_int64(1)
    assert host.qvdit_host_unpack(nothing, bits, nothing, size, size, nothing) == cuda.Status.INVALID


def test_rounded_quotients_hold_an_integer_as_byte_and_as_float16(host):
    q = np.arange(-511, 512)
    x, bits = q.astype(np.float32), np.zeros(len(q), np.uint32)
    host.qvdit_host_rounded_bits(
        x.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(q)), bits.ctypes.data_as(ctypes.c_void_p)
    )
    np.testing.assert_array_equal(bits & 0xFF, q & 0xFF)
    np.testing.assert_array_equal((bits & 0xFFFF).astype(np.uint16).view(np.float16), 1536.0 + q)


def test_quotients_near_ties_are_rounded_as_a_division_is(host):
    """2048 divisors; QVDIT_EXHAUSTIVE=1 takes all 2^23 (ten seconds)."""
    step = 1 if os.environ.get("QVDIT_EXHAUSTIVE") else 4097
    assert host.qvdit_host_wrong_quotients(1 << 23, step) == 0


@pytest.mark.parametrize("levels", [31.0, 63.0, 127.0, 255.0])
def test_ranges_are_divided_by_their_levels_as_a_division_does(host, levels):
    """Every 4097th range; QVDIT_EXHAUSTIVE=1 takes all."""
    assert host.qvdit_host_wrong_scales(levels, 1 if os.environ.get("QVDIT_EXHAUSTIVE") else 4097) == 0


@given(
    st.floats(np.float32(1e-8), np.float32(1e36), width=32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([31.0, 63.0, 127.0, 255.0]),
)
def test_quotients_of_any_size_are_rounded_as_a_division_is(host, divisor, seed, levels):
    rng = np.random.default_rng(seed)
    quotients = np.concatenate([rng.uniform(-levels, levels, 500), 10.0 ** rng.uniform(-45, 2, 500), [0.0, -0.0]])
    with np.errstate(under="ignore"):
        x = (np.minimum(quotients, levels) * float(divisor)).astype(np.float32)
        expected = np.rint(x / np.float32(divisor))
    found = np.full_like(x, np.nan)
    host.qvdit_host_round_quotients(
        x.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_float(divisor),
        ctypes.c_int64(len(x)),
        found.ctypes.data_as(ctypes.c_void_p),
    )
    np.testing.assert_array_equal(found, expected)


# KB of shared memory that a block may have on sm_86, 89 and 120; on 80 and 87; on 90 and 100. A multiprocessor has one
# more; CUDA keeps one for each block.
SHARED_KB = st.sampled_from([99, 163, 227])
FEATURES = st.integers(1, 2048).map(lambda eights: 8 * eights)  # K of rows that are read 16 bytes at a time
ROWS = st.one_of(st.integers(1, 3000), st.integers(1, 2**31 - 2))


def padded(k: int) -> int:
    return -(-k // ROW_PAD) * ROW_PAD


def plan_halves(host: ctypes.CDLL, m: int, k: int, vectors: int, rank: int, limit: int) -> list[int]:
    found, size, number = (ctypes.c_int32 * 3)(), ctypes.c_int64, ctypes.c_int32
    host.qvdit_host_plan_halves(size(m), size(k), number(vectors), number(rank), number(limit), found)
    return list(found)


class Groups(NamedTuple):
    """qvdit_host_plan_groups's numbers."""

    vectors: int
    rows: int
    warps: int
    pieces: int
    sets: int
    alpha: int
    bytes: int
    running: int


def plan_groups(host: ctypes.CDLL, k: int, rank: int, kb: int) -> Groups:
    found = (ctypes.c_int32 * 8)()
    host.qvdit_host_plan_groups(ctypes.c_int64(k), ctypes.c_int32(rank), ctypes.c_int32(kb * 1024), found)
    return Groups(*found)


@given(ROWS, FEATURES, st.sampled_from([4, 5, 6, 8, 10]), st.integers(0, 1), SHARED_KB)
def test_a_block_of_rows_fits(host, m, k, vectors, rank, kb):
    limit = kb * 1024 - 256  # the kernel declares some
    warps, rows, shared = plan_halves(host, m, k, vectors, rank, limit)
    assert (warps - 1) * vectors * 256 < padded(k) <= warps * vectors * 256
    assert rows >= 1
    assert warps * rows <= 16
    assert shared <= limit


@given(FEATURES, st.integers(2, 31), SHARED_KB)
def test_a_group_of_rows_fits(host, k, rank, kb):
    plan = plan_groups(host, k, rank, kb)
    if plan.vectors == 0:
        assert rank > 2 or kb < 227  # of two ranks an H200 takes every row
        assert plan_groups(host, k, rank + 1, kb).vectors == 0
        return
    assert plan.pieces * plan.vectors * 32 >= padded(k)
    assert plan.warps <= 16
    assert plan.alpha + plan.bytes <= kb * 1024


@given(FEATURES, st.integers(2, 32), SHARED_KB, st.integers(1, 16))
def test_a_block_of_groups_fits(host, k, rank, kb, most):
    plan = plan_groups(host, k, rank, kb)
    if plan.vectors == 0:
        return
    multiprocessor = (19 if plan.vectors == 8 else 16, (kb + 1) * 1024)
    numbers = (rank, kb * 1024, *multiprocessor, most)
    groups = host.qvdit_host_groups_a_block(ctypes.c_int64(k), *map(ctypes.c_int32, numbers))
    assert groups >= 1
    assert plan.warps * groups <= 16  # so that at most eight of two warps and more meet at barriers of their own
    assert plan.alpha + groups * plan.bytes <= kb * 1024

    def running(groups: int) -> int:
        block = plan.alpha + groups * plan.bytes + 1024  # CUDA keeps 1 KB of each
        return min(multiprocessor[0] // (groups * plan.warps), multiprocessor[1] // block) * groups * plan.warps

    assert running(groups) >= 8
    assert groups <= most or max(map(running, range(1, most + 1))) < 8  # more only where too few warps would run


@pytest.mark.parametrize(
    ("k", "rank", "vectors", "rows", "running"),
    [
        (1152, 4, 12, 8, 15),
        (2880, 4, 12, 4, 16),  # eight rows in nine warps of 10 vectors cost less, but one group alone would run
        (3072, 4, 12, 4, 16),  # a group of eight would have half of a multiprocessor
        (3072, 5, 12, 8, 16),
        (3072, 8, 12, 8, 16),  # but four products a vector cost more
        (5120, 2, 10, 4, 16),
        (5760, 4, 12, 4, 16),  # eight rows were 4 % faster here: the rule costs that
        (12288, 2, 12, 2, 16),
        (12288, 32, 0, 0, 0),
    ],
)
def test_rows_are_grouped_by_rule(host, k, rank, vectors, rows, running):
    plan = plan_groups(host, k, rank, 227)
    assert (plan.vectors, plan.rows, plan.running) == (vectors, rows, running)


def test_python_repeats_the_argument_structs(host):
    structs = (cuda.QuantizeArgs, cuda.UnpackArgs, cuda.GemmArgs, cuda.AttentionArgs, cuda.GatedResidualArgs)
    sizes = (ctypes.c_int64 * len(structs))()
    host.qvdit_host_struct_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(struct) for struct in structs]
    header = (CSRC / "qvdit_kernels.h").read_text()
    for struct in structs:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", struct.__name__.removesuffix("Args")).lower()
        body = header.split(f"struct qvdit_{name}_args {{")[1].split("\n};")[0]
        code = " ".join(line.split("//")[0] for line in body.splitlines())
        declared = [
            name.split()[-1].lstrip("*") for part in code.split(";") if part.strip() for name in part.split(",")
        ]
        assert [field[0] for field in struct._fields_] == declared


def test_python_repeats_the_enums():
    header = (CSRC / "qvdit_kernels.h").read_text()
    enums = (
        ("QVDIT_TILE_", cuda.Tile),
        ("QVDIT_", cuda.Dtype),
        ("QVDIT_", Prologue),
    )
    for prefix, enum in enums:
        for member in enum:
            assert f"{prefix}{member.name} = {member.value}" in header
    assert f"#define QVDIT_ABI {cuda.ABI}" in header


def test_no_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv(cuda.VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "_PLACES", (tmp_path / "lib.so",))
    with pytest.raises(QvditError, match=r"no libqvdit_kernels\.so .* cmake"):
        cuda.library_path()


def test_a_named_library_that_is_none(monkeypatch, tmp_path, host):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setenv(cuda.VARIABLE, str(broken))
    with pytest.raises(QvditError, match=r"broken\.so"):
        cuda.KernelLibrary(cuda.library_path())
    with pytest.raises(QvditError, match="the CUDA kernels' library"):  # a library, but another
        cuda.KernelLibrary(Path(host._name))


# Bytes a thread may spill. The quantizers' are of what stays the same from row to row: quantize_rows.cuh has the times
# with registers for them, which are worse.
MOST_SPILLED = {"quantize_gelu.cu": 80, "quantize_groups.cu": 32, "quantize_halves_bf16.cu": 12}


# One kernel of each kind, one for each generation of GPUs; the GPU build compiles the rest.
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("device.cu", "87"),
        ("unpack_weight.cu", "110"),
        ("gemm_mma_bf16.cu", "80"),
        ("quantize_gelu.cu", "90a"),
        ("quantize_groups.cu", "120"),
        ("quantize_halves_bf16.cu", "86"),
        ("attention_bf16.cu", "90a"),
        ("gemm.cu", "120"),
        ("low_bit_linear.cu", "87"),
    ],
)
def test_kernels_compile(source, architecture, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("NO NVCC HERE: THE CUDA KERNELS ARE NOT COMPILED")
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if f"sm_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-O3", "-DNDEBUG", '-DQVDIT_ARCHITECTURES="test"', "--Werror=all-warnings", "-Xptxas=-v"]
    command = [compiler, *options, "-gencode", target, "-c", str(CSRC / source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert max(spilled, default=0) <= MOST_SPILLED.get(source, 0), spilled  # gemm.cu has no kernel
