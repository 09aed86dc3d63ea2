"""The C++ runner's core, compiled without TensorRT: its files, figures and sampling against Python's.

The whole runner is compiled against every version's headers that are found, as test_tensorrt_plugin.py finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_tensorrt_plugin import VERSIONS, cuda_include, includes

from qvdit.contract.bundle import ORT_MODEL, PARITY_INPUTS, PARITY_REFERENCE
from qvdit.contract.parity import (
    LayerOutputs,
    LayerParity,
    LayerReference,
    SavedParity,
    compare_models,
    relative_error,
    save_half,
    save_reference,
)
from qvdit.runtimes.tensorrt.parity import summary

HERE = Path(__file__).parent / "csrc"
RUNNER = Path(__file__).parents[2] / "runtimes" / "csrc" / "runner"
CORE = (
    "arguments",
    "compare",
    "facts",
    "files",
    "json",
    "parity",
    "plugin_file",
    "proof",
    "quantiles",
    "safetensors",
    "sampler",
    "sha256",
    "tensor",
)
FLAGS = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
COMPUTE = ctypes.CFUNCTYPE(ctypes.c_int32)


class RefusedError(Exception):
    """What the runner says."""


class Runner:
    """The driver's functions."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.runner_psnr.restype = self.library.runner_quantile.restype = ctypes.c_double

    def call(self, function: str, *arguments: Any) -> str:
        text = ctypes.create_string_buffer(1 << 16)
        given = [str(a).encode() if isinstance(a, str | Path) else a for a in arguments]
        done = getattr(self.library, f"runner_{function}")(*given, text)
        if not done:
            raise RefusedError(text.value.decode())
        return text.value.decode()


@pytest.fixture(scope="module")
def runner(shared: Callable[..., Path]) -> Runner:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("NO C++ COMPILER HERE: THE RUNNER IS NOT TESTED")

    def build(folder: Path) -> None:
        folder.mkdir()
        sources = [HERE / "runner_driver.cc", *(RUNNER / f"{name}.cc" for name in CORE)]
        command = [compiler, *FLAGS, "-shared", "-fPIC", *map(str, sources), "-o", str(folder / "runner.so")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return Runner(shared("runner", build) / "runner.so")


def floats(values: Any) -> Any:
    array = np.ascontiguousarray(values, np.float32).ravel()
    return array.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(array.size), array


# Compiling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_runner_compiles(version, tmp_path):
    """Against the headers of a TensorRT, NvOnnxParser.h (github.com/onnx/onnx-tensorrt) beside them."""
    include, toolkit = includes().get(version), cuda_include()
    if include is None or not (include / "NvOnnxParser.h").is_file():
        pytest.skip(f"NO TENSORRT HEADERS WITH NvOnnxParser.h OF THIS VERSION HERE: NO RUNNER IS COMPILED ({version})")
    compiler = shutil.which("g++") or shutil.which("c++")
    if toolkit is None or compiler is None:
        pytest.skip("NO CUDA HEADERS OR NO C++ COMPILER HERE: NO RUNNER IS COMPILED")
    sources = sorted(source for source in RUNNER.glob("*.cc") if source.stem not in CORE)
    assert {source.stem for source in sources} >= {"builder", "engine", "main", "session", "versions"}
    # One translation unit, syntax and types alone: the objects are of no use without the libraries.
    whole = tmp_path / "whole.cc"
    whole.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [compiler, *FLAGS, "-fsyntax-only", "-isystem", str(include), "-isystem", str(toolkit), str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_build_lists_every_source():
    listed = (RUNNER / "runner.cmake").read_text()
    assert all(f"${{here}}/{source.name}" in listed for source in RUNNER.glob("*.cc"))


# Files ---------------------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(value=_JSON)
def test_json(runner, value):
    text = json.dumps(value)
    if "\\u0000" in text or "\\ud" in text:  # no C string holds the first, the others are no text
        return
    assert json.loads(runner.call("json", text)) == value
    assert json.loads(runner.call("json", json.dumps(value, ensure_ascii=False))) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no value"),
        ("{", "without quotes"),
        ('{"a": 1', "without an end"),
        ('{"a": 1, "a": 2}', "the key a twice"),
        ('{"a" 1}', "no colon"),
        ("[1,]", "no value"),
        ("[1] 2", "more text"),
        ("01", "more text"),
        ("1.", "without digits"),
        ("nul", "unknown word"),
        ('"a', "without an end"),
        ('"\\x"', "unknown escape"),
        ('"\\u12g4"', "unknown escape"),
        ('"\\ud800"', "half a surrogate"),
        ('"\n"', "control character"),
        ("[" * 40, "32 levels"),
        ("'a'", "no value"),
    ],
)
def test_text_that_is_no_json(runner, text, why):
    with pytest.raises(RefusedError, match=why):
        runner.call("json", text)


@given(content=st.binary(max_size=300))
def test_sha256(runner, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("sha") / "file"
    path.write_bytes(content)
    assert runner.call("sha256", path) == hashlib.sha256(content).hexdigest()


def test_sha256_of_many_chunks(runner, tmp_path):
    content = np.random.default_rng(0).bytes((2 << 20) + 55)
    (tmp_path / "file").write_bytes(content)
    assert runner.call("sha256", tmp_path / "file") == hashlib.sha256(content).hexdigest()


TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "name/with 'quotes' \" and ü": np.array([1.5, -2], np.float32),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.int8),
    "bytes": np.arange(5, dtype=np.uint8),
    "short": np.array([-300], np.int16),
    "word": np.array([[1 << 30]], np.int32),
    "double": np.array([np.pi]),
    "flag": np.array([True, False]),
}


def test_safetensors_are_read_and_written(runner, tmp_path):
    save_file(TENSORS, tmp_path / "a", metadata={"key": "value"})
    runner.call("copy", tmp_path / "a", tmp_path / "b")
    found = load_file(tmp_path / "b")
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()
    with safe_open(tmp_path / "b", framework="numpy") as file:
        assert file.metadata() == {"origin": str(tmp_path / "a")}


def pieces(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: str, shape: list[Any], *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry("F32", [2], 0, 8)}, 7, "outside the file"),
        ({"a": entry("F32", [2], 0, 8)}, 9, "9 bytes of data where its header tells of 8"),
        ({"a": entry("F32", [2], 0, 4)}, 4, "bytes for another shape"),
        ({"a": entry("F32", [2], 4, 12)}, 12, "holes"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, 8, "overlap"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, 6, "overlap"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "holes"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "outside the file"),
        ({"a": entry("F32", [-1], 0, 8)}, 8, "fits nowhere"),
        ({"a": entry("F32", [1 << 62, 8], 0, 8)}, 8, "fits nowhere"),
        ({"a": entry("F32", [1 << 62], 0, 8)}, 8, "fits nowhere"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "no integer"),
        ({"a": entry("F32", [2], 0, 1 << 70)}, 8, "more than 64 bits"),
        ({"a": entry("F32", [2], 0)}, 8, "no pair"),
        ({"a": entry("F8_E4M3", [8], 0, 8)}, 8, "the type F8_E4M3"),
        ({"a": entry("F32", [2], 0, 8) | {"more": 1}}, 8, "other fields"),
        ({"a": {"dtype": "F32", "shape": [2], "offsets": [0, 8]}}, 8, "no data_offsets"),
        ({"a": 3}, 8, "no object"),
        ({"__metadata__": {"a": 3}}, 0, "no string"),
        (b'{"a": 1, "a": 2}', 0, "the key a twice"),
        (b"[]", 0, "no object"),
        (b"", 0, "no object"),
        (b'{"a":', 0, "no value"),
        (b' {"__metadata__": {}}', 0, "no object"),
        (b'{"\x00": {}}', 0, "control character"),
        (b'{"\xff": {}}', 0, "not UTF-8"),
        (b'{"\xc0\x80": {}}', 0, "not UTF-8"),
        (b'{"\xed\xa0\x80": {}}', 0, "not UTF-8"),
        (b'{"\xf4\x90\x80\x80": {}}', 0, "not UTF-8"),
        (b'{"\xe2\x82', 0, "not UTF-8"),
    ],
)
def test_damaged_safetensors(runner, tmp_path, header, data, why):
    put(tmp_path / "a", header, bytes(data))
    with pytest.raises(RefusedError, match=rf"got .*/a, which is damaged \(.*{why}.*\); expected .*; copy it again"):
        runner.call("copy", tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("length", [0, 1, 99, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_headers_of_another_length(runner, tmp_path, length):
    put(tmp_path / "a", {"a": entry("F32", [1], 0, 4)}, bytes(4), length)
    with pytest.raises(RefusedError, match="damaged"):
        runner.call("copy", tmp_path / "a", tmp_path / "b")


def test_every_truncation_is_seen(runner, tmp_path):
    save_file(TENSORS, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "a").write_bytes(content[:size])
        with pytest.raises(RefusedError, match="damaged"):
            runner.call("copy", tmp_path / "a", tmp_path / "b")


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_no_damage_is_worse_than_a_sentence(runner, tmp_path_factory, at, value):
    folder = tmp_path_factory.mktemp("damage")
    save_file(TENSORS, folder / "a")
    content = bytearray((folder / "a").read_bytes())
    content[at % len(content)] = value
    (folder / "a").write_bytes(content)
    with contextlib.suppress(RefusedError):  # the value may be the same, or in the data, or part of another valid name
        runner.call("copy", folder / "a", folder / "b")


def test_a_missing_file(runner, tmp_path):
    with pytest.raises(RefusedError, match=r"got no file .*; expected a safetensors file"):
        runner.call("copy", tmp_path / "a", tmp_path / "b")


# Numbers -------------------------------------------------------------------------------------------------------------


def test_every_half(runner):
    halves = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(1 << 16, np.float32)
    runner.library.runner_from_half(
        halves.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(1 << 16), found.ctypes.data_as(ctypes.c_void_p)
    )
    np.testing.assert_array_equal(found, halves.view(np.float16).astype(np.float32))
    finite = np.isfinite(found)
    again = np.empty(1 << 16, np.uint16)
    runner.library.runner_to_half(
        found.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(1 << 16), again.ctypes.data_as(ctypes.c_void_p)
    )
    np.testing.assert_array_equal(again[finite], halves[finite])


def test_rounding_to_half(runner):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    edges = np.array([65504, 65519.996, 65520, 65536, 1e30, np.inf, 2**-25, 2**-24, 0, -0.0], np.float32)
    values = np.concatenate([bits.view(np.float32), ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), edges])
    values = values[~np.isnan(values)]
    found = np.empty(values.size, np.uint16)
    runner.library.runner_to_half(
        values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(values.size), found.ctypes.data_as(ctypes.c_void_p)
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, values.astype(np.float16).view(np.uint16))


def test_casts(runner, tmp_path):
    import ml_dtypes

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    save_file({"x": values}, tmp_path / "a")
    runner.call("cast", tmp_path / "a", 1, tmp_path / "b")
    header, data = pieces(tmp_path / "b")
    assert header["x"]["dtype"] == "BF16"
    assert data == values.astype(ml_dtypes.bfloat16).tobytes()
    runner.call("cast", tmp_path / "b", 2, tmp_path / "c")
    assert load_file(tmp_path / "c")["x"].tobytes() == values.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()


@given(seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 1e-3, 0.5]))
def test_figures_are_those_of_python(runner, seed, noise):
    rng = np.random.default_rng(seed)
    full = rng.standard_normal(500).astype(np.float32)
    quantized = (full + 0.1 * rng.standard_normal(500)).astype(np.float32)
    runtime = (quantized + noise * rng.standard_normal(500)).astype(np.float32)
    expected = compare_models(runtime, quantized, full)
    found = (ctypes.c_double * 6)()
    (r, count, _), (q, _, _), (f, _, _) = floats(runtime), floats(quantized), floats(full)
    runner.library.runner_compare(r, q, f, count, found)
    ratio = expected.error_ratio
    names = (expected.rel_err, expected.cosine, expected.error_runtime, expected.error_reference, ratio)
    np.testing.assert_allclose(list(found)[:5], names, rtol=1e-12, atol=1e-15)
    assert bool(found[5]) == (0.9 <= ratio <= 1.1)


def test_psnr_is_that_of_python(runner):
    import torch

    from qvdit.reference.measure import psnr

    rng = np.random.default_rng(0)
    video, reference = (rng.standard_normal((1, 3, 4, 8, 8)).astype(np.float32) for _ in range(2))
    (v, count, _), (r, _, _) = floats(video), floats(reference)
    expected = psnr(torch.from_numpy(video), torch.from_numpy(reference)).item()
    assert runner.library.runner_psnr(v, r, count) == pytest.approx(expected, rel=1e-6)


@given(values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60), share=st.floats(0, 1))
def test_quantiles_are_those_of_numpy(runner, values, share):
    address, count, array = floats(values)
    found = runner.library.runner_quantile(address, count, ctypes.c_double(share))
    assert found == pytest.approx(np.quantile(array.astype(np.float64), share), rel=1e-9, abs=1e-9)


# The command line ----------------------------------------------------------------------------------------------------


def arguments(runner: Runner, *words: str) -> str:
    held = (ctypes.c_char_p * max(len(words), 1))(*(word.encode() for word in words))
    return runner.call("arguments", held, len(words))


def test_arguments(runner):
    assert arguments(runner).startswith("help")
    assert arguments(runner, "bench", "folder") == "bench folder 50 0"
    assert arguments(runner, "--runs", "7", "bench", "--graph", "f") == "bench f 7 1"
    shapes = arguments(runner, "build", "f", "--min", "x=1x3", "--max", "x=2x3", "--max", "y=9")
    assert shapes == "build f 50 0 min x 1x3 max x 2x3 max y 9"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("bild", "f"), "the command bild"),
        (("build",), "0 folders"),
        (("build", "a", "b"), "2 folders"),
        (("sample", "f"), "sample without --out"),
        (("bench", "f", "--runs"), "--runs without a value"),
        (("bench", "f", "--runs", "0"), "--runs 0; expected 1 … 1000000"),
        (("bench", "f", "--runs", "many"), "--runs many"),
        (("bench", "f", "--runs", "99999999999999999999"), "--runs 9"),
        (("build", "f", "--max", "x"), "--max x; expected INPUT="),
        (("build", "f", "--max", "x=2xx3"), "--max "),
        (("build", "f", "--max", "x=2x"), "--max "),
        (("build", "f", "--fast"), "the option --fast"),
    ],
)
def test_bad_arguments(runner, words, why):
    with pytest.raises(RefusedError, match=f"got {why}"):
        arguments(runner, *words)


# What is known of an engine ------------------------------------------------------------------------------------------

FACTS = {
    "format": 1,
    "tensorrt": "8.6.0",
    "gpu": "Orin",
    "compute": "8.7",
    "driver": "CUDA 12.2",
    "profile": {"x": [[1, 3], [2, 3], [2, 6]]},
    "onnx_sha256": {"tensorrt/model.onnx": "ab"},
    "plugin_sha256": "cd",
    "plugin_version": "1",
    "plugin_tensorrt": "8.6.0",
    "optimization_level": None,
    "workspace": None,
    "build_seconds": 1.5,
    "engine_sha256": "ef",
    "engine_bytes": 10,
    "device_bytes": 20,
}


def test_facts_are_kept(runner):
    found = json.loads(runner.call("facts", json.dumps(FACTS)))
    assert set(found) == set(FACTS)
    for name in ("format", "tensorrt", "gpu", "compute", "profile", "onnx_sha256", "engine_sha256", "engine_bytes"):
        assert found[name] == FACTS[name]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tensorrt": "10.3.0"}, "an engine of TensorRT 8.6.0; expected one of 10.3.0"),
        ({"gpu": "Thor"}, r"an engine for Orin \(sm 8.7\); expected one for Thor"),
        ({"compute": "9.0"}, r"an engine for Orin \(sm 8.7\); expected one for Orin \(sm 9.0\)"),
        ({"onnx_sha256": {"tensorrt/model.onnx": "zz"}}, "an engine of another model"),
        ({"onnx_sha256": {}}, "an engine of another model"),
        ({"engine_bytes": 9}, "of 9 bytes; expected 10"),
        ({"engine_sha256": "zz"}, "which is damaged"),
    ],
)
def test_engines_of_elsewhere(runner, change, why):
    assert runner.call("check_facts", json.dumps(FACTS), json.dumps(FACTS)) == ""
    with pytest.raises(RefusedError, match=f"got model.plan,? ?{why}.*; build it again"):
        runner.call("check_facts", json.dumps(FACTS), json.dumps(FACTS | change))


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps(FACTS | {"format": 2}), json.dumps(FACTS | {"gpu": 3})])
def test_no_facts(runner, text):
    with pytest.raises(RefusedError, match=r"got engine.json, which does not describe an engine"):
        runner.call("facts", text)


def test_profiles(runner):
    def check(*extents: int) -> None:
        held = (ctypes.c_int64 * len(extents))(*extents)
        runner.call("check_profile", json.dumps(FACTS), "x", held, len(extents))

    check(1, 3)
    check(2, 6)
    for wrong in ((3, 3), (1, 2), (1, 7), (1,), (1, 3, 1)):
        with pytest.raises(RefusedError, match="expected 1x3 to 2x6, the engine's profile"):
            check(*wrong)


def test_profiles_reach_as_far_as_asked(runner):
    def widened(*words: str) -> str:
        held = (ctypes.c_char_p * (2 + len(words)))(b"build", b"f", *(word.encode() for word in words))
        return runner.call("widened", (ctypes.c_int64 * 2)(2, 8), 2, held, len(held))

    assert widened() == "2x8 2x8 2x8"
    assert widened("--min", "x=1x8", "--max", "x=1x16") == "1x8 2x8 2x16"
    for wrong, why in (("y=1x8", "sizes of an input y"), ("x=1x8x3", "x=1x8x3; expected as many extents as 2x8")):
        with pytest.raises(RefusedError, match=f"got {why}.*; check --min and --max"):
            widened("--max", wrong)


def test_the_plugin_is_looked_at_before_it_is_loaded(runner, tmp_path):
    library, name = tmp_path / "lib.so", b"qvdit LowBitLinear 4 for TensorRT 10.3.0\0"
    library.write_bytes(b"\x7fELF" + bytes(3000) + name + bytes(3000))
    assert runner.call("plugin", library, 10) == "4 10.3.0"
    with pytest.raises(RefusedError, match=r"built for TensorRT 10.3.0; expected a plugin for TensorRT 8"):
        runner.call("plugin", library, 8)
    library.write_bytes(b"\x7fELF" + bytes(3000))
    with pytest.raises(RefusedError, match="expected a build of the LowBitLinear plugin"):
        runner.call("plugin", library, 8)
    with pytest.raises(RefusedError, match="no file"):
        runner.call("plugin", tmp_path / "none", 8)


@pytest.mark.parametrize("place", [0, 5, (1 << 20) - 6, (1 << 20) - 1, (1 << 20) + 1, 3 << 20])
def test_which_models_need_the_plugin(runner, tmp_path, place):
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(place) + b"LowBitLinear" + bytes(100))
    assert runner.library.runner_needs_plugin(str(path).encode())
    path.write_bytes(bytes(place) + b"LowBitLinea" + bytes(100) + b"r")
    assert not runner.library.runner_needs_plugin(str(path).encode())


# Parity --------------------------------------------------------------------------------------------------------------


def reference(name: str, shape: tuple[int, ...], n: int, symmetric: bool, seed: int, x: Any = None) -> LayerReference:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float16).astype(np.float32) if x is None else x
    rows = int(np.prod(shape[:-1]))
    low, high = (-127, 128) if symmetric else (0, 256)
    x_q = rng.integers(low, high, (rows, shape[-1])).astype(np.int32)
    acc = rng.integers(-(1 << 24), 1 << 24, (rows, n))
    y = rng.standard_normal((*shape[:-1], n)).astype(np.float32)
    return LayerReference(name, x, 1, LayerOutputs(x_q, acc, y))


class Folder:
    """Parity files, and a model of layers that answers with the reference's own numbers."""

    def __init__(self, root: Path, layers: tuple[LayerReference, ...], nodes: dict[str, bool]):
        self.parity, self.exchange = root / "parity", root / "exchange"
        (root / ORT_MODEL).parent.mkdir(parents=True)
        (root / ORT_MODEL).write_bytes(b"model")
        self.exchange.mkdir()
        self.saved = SavedParity(
            {"hidden_states": np.ones((2, 3, 4), np.float32), "timestep": np.ones(2, np.float32)},
            np.full((2, 5), 2, np.float32),
            np.full((2, 5), 2.25, np.float32),
            layers,
        )
        save_reference(self.saved, root)
        assert (root / PARITY_INPUTS).parent == (root / PARITY_REFERENCE).parent == self.parity
        self.by_name, self.nodes = {layer.name: layer for layer in layers}, nodes  # node → symmetric
        self.calls = 0
        self.fed: list[dict[str, np.ndarray]] = []

    def outputs(self, index: int) -> dict[str, np.ndarray]:
        found = {}
        for node, symmetric in self.nodes.items():
            group = [self.by_name[name] for name in node.split(",")]
            chosen = group[min(index, len(group) - 1)]
            lead, k = chosen.x.reshape(-1, *chosen.x.shape[-2:]).shape[:2], chosen.x.shape[-1]
            stored = np.zeros((*lead, -(-k // 32) * 32), np.int8)
            stored[..., :k] = (chosen.outputs.x_q - (0 if symmetric else 128)).reshape(*lead, k)
            found[f"{node}:x_q" if symmetric else f"{node}:x_q_less_128"] = stored.view(np.int32)
            side = [layer.outputs for layer in group]
            found[f"{node}:acc"] = np.concatenate([o.acc.reshape(*lead, -1) for o in side], -1).astype(np.int32)
            found[f"{node}:y"] = np.concatenate([o.y.reshape(*lead, -1) for o in side], -1).astype(np.float16)
            found[f"{node}:scale"] = np.ones(lead, np.float32)
        return found

    def run(self, runner: Runner, spoil: Callable[[dict[str, np.ndarray]], None] = lambda outputs: None) -> Any:
        def compute() -> int:
            self.fed.append(load_file(self.exchange / "inputs.safetensors"))
            outputs = self.outputs(self.calls)
            spoil(outputs)
            save_file(outputs, self.exchange / "outputs.safetensors")
            self.calls += 1
            return 1

        shapes = {node: self.by_name[node.split(",")[0]].x.shape for node in self.nodes}
        ports = {f"{node}:x": np.zeros((1, *shape[-2:]), np.float16) for node, shape in shapes.items()}
        ports = {name: np.repeat(v, int(np.prod(shapes[name[:-2]][:-2])), 0) for name, v in ports.items()}
        save_file(ports, self.exchange / "inputs.safetensors")
        save_file(self.outputs(0), self.exchange / "outputs.safetensors")
        rows = runner.call("layers", self.parity, self.exchange, COMPUTE(compute)).splitlines()
        return {row.split()[0]: [float(value) for value in row.split()[1:]] for row in rows}


@pytest.fixture
def folder(tmp_path):
    q = reference("a.q", (2, 3, 40), 128, True, 0)
    layers = (
        q,
        reference("a.k", (2, 3, 40), 128, True, 1, q.x),
        reference("b", (1, 5, 64), 7, False, 2),
        reference("c", (1, 2, 6, 32), 16, True, 3),
    )
    return Folder(tmp_path, layers, {"a.q,a.k": True, "b": False, "c": True})


def test_layers_that_are_equal(runner, folder):
    found = folder.run(runner)
    assert set(found) == {"a.q", "a.k", "b", "c"}
    assert folder.calls == 2  # the largest node has two layers
    for name, (xq, xq_wrong, acc, acc_wrong, error, passed) in found.items():
        layer = folder.by_name[name]
        assert (xq, acc) == (layer.outputs.x_q.size, layer.outputs.acc.size)
        assert (xq_wrong, acc_wrong, passed) == (0, 0, 1)
        assert 0 < error < 1e-3
    for name, x in folder.fed[0].items():
        expected = folder.by_name[name[:-2].split(",")[0]].x
        np.testing.assert_array_equal(x.astype(np.float32), expected.reshape(x.shape))


def test_integers_that_differ_are_counted(runner, folder):
    def spoil(outputs: dict[str, np.ndarray]) -> None:
        words = outputs["a.q,a.k:x_q"].view(np.int8)
        words[0, 0, :3] ^= 1
        words[0, 0, 45] ^= 1  # padding: nobody looks at it
        outputs["a.q,a.k:acc"][1, 2, 130] += 1  # a.k's
        outputs["b:acc"][0, :2, 0] += 1
        outputs["c:y"][:] *= 1.1

    found = folder.run(runner, spoil)
    wrong = {name: (row[1], row[3], bool(row[5])) for name, row in found.items()}
    assert wrong == {"a.q": (3, 0, False), "a.k": (3, 1, False), "b": (0, 2, False), "c": (0, 0, False)}
    assert found["c"][4] == pytest.approx(0.1, rel=1e-2)


def test_a_model_without_an_output(runner, folder):
    with pytest.raises(RefusedError, match="a model of layers without b:acc"):
        folder.run(runner, lambda outputs: outputs.pop("b:acc") is None)


@pytest.mark.parametrize(("output", "given", "needed"), [("b:x_q_less_128", 60, 64), ("c:y", 0, 0)])
def test_outputs_of_too_few_columns(runner, folder, output, given, needed):
    def spoil(outputs: dict[str, np.ndarray]) -> None:
        values = given // (4 if "x_q" in output else 1)
        outputs[output] = np.ascontiguousarray(outputs[output][..., :values])

    with pytest.raises(RefusedError, match=f"got rows of {given} values; expected at least {needed}"):
        folder.run(runner, spoil)


def test_profiles_of_layers(runner, folder):
    inputs = folder.parity / "inputs.safetensors"
    assert runner.call("layer_profile", inputs, "a.q,a.k:x") == "2x3x40 2x3x40"
    assert runner.call("layer_profile", inputs, "c:x") == "2x6x32 2x6x32"
    with pytest.raises(RefusedError, match="without layer:d:x"):
        runner.call("layer_profile", inputs, "d:x")
    with pytest.raises(RefusedError, match="got an input d"):
        runner.call("layer_profile", inputs, "d")


def proof(runner: Runner, rows: list[tuple[str, int, int, int, int, float]], models: list[float], as_json: int) -> str:
    names = (ctypes.c_char_p * len(rows))(*(row[0].encode() for row in rows))
    numbers = (ctypes.c_int64 * (4 * len(rows)))(*(number for row in rows for number in row[1:5]))
    errors = (ctypes.c_double * len(rows))(*(row[5] for row in rows))
    return runner.call("proof", names, numbers, errors, len(rows), (ctypes.c_float * 3)(*models), as_json)


def test_proofs_are_told_as_python_tells_them(runner):
    rows = [("a", 100, 0, 200, 0, 1e-4), ("b", 50, 0, 0, 0, 2e-3)]
    models = [1.0, 1.001, 1.1]
    layers = [LayerParity(*row) for row in rows]
    whole = compare_models(*(np.array([m], np.float32) for m in models))
    expected, found = summary(layers, whole), json.loads(proof(runner, rows, models, 1))
    assert set(found) == set(expected)
    assert [set(row) for row in found["layers"]] == [set(row) for row in expected["layers"]]
    for name in ("layers_compared", "acc_compared", "xq_mismatches", "acc_mismatches"):
        assert found[name] == expected[name]
    for name in ("model_rel_err", "model_cosine", "error_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    text = proof(runner, rows, models, 0)
    assert "layers   2 of 2 compared: 0 of 150 x_q and 0 of 200 acc differ, relative error at most 2.0e-03\n" in text
    assert text.endswith("passed")


@pytest.mark.parametrize(
    ("row", "models"),
    [
        (("c", 10, 1, 10, 0, 0.0), [1.0, 1.0, 1.1]),
        (("c", 10, 0, 10, 1, 0.0), [1.0, 1.0, 1.1]),
        (("c", 10, 0, 10, 0, 0.02), [1.0, 1.0, 1.1]),
        (("c", 10, 0, 10, 0, float("nan")), [1.0, 1.0, 1.1]),
        (("c", 10, 0, 10, 0, 0.0), [1.0, 1.02, 1.1]),
        (("c", 10, 0, 10, 0, 0.0), [float("nan"), 1.0, 1.1]),
    ],
)
def test_proofs_that_fail(runner, row, models):
    text = proof(runner, [("a", 1, 0, 1, 0, 0.0), row], models, 0)
    assert text.endswith("failed")
    assert ("  c: " in text) == (models[:2] == [1.0, 1.0])


def test_the_whole_model(runner, folder):
    output = np.full((2, 5), 2.001, np.float32)

    def compute() -> int:
        fed = load_file(folder.exchange / "inputs.safetensors")
        np.testing.assert_array_equal(fed["hidden_states"], folder.saved.inputs["hidden_states"])
        return 1

    ports = {name: np.zeros_like(value) for name, value in folder.saved.inputs.items()}
    save_file(ports, folder.exchange / "inputs.safetensors")
    save_file({"output": output}, folder.exchange / "outputs.safetensors")
    found = (ctypes.c_double * 6)()
    runner.call("model", folder.parity, folder.exchange, COMPUTE(compute), found)
    expected = compare_models(output, folder.saved.quantized, folder.saved.full)
    np.testing.assert_allclose(list(found)[:3], [expected.rel_err, expected.cosine, expected.error_ratio], rtol=1e-12)
    assert list(found)[3:] == [0, -1, 1]
    # An FP16 run of the quantized model, where there is one, is what an engine is judged by.
    half = np.full((2, 5), 2.1, np.float32)
    save_half(folder.parity.parent, half)
    runner.call("model", folder.parity, folder.exchange, COMPUTE(compute), found)
    ratio = relative_error(output, folder.saved.full) / relative_error(half, folder.saved.full)
    np.testing.assert_allclose(list(found)[3:5], [ratio, relative_error(output, half)], rtol=1e-12)
    assert found[5] == 0
    save_file(ports | {"more": np.zeros(1, np.float32)}, folder.exchange / "inputs.safetensors")
    with pytest.raises(RefusedError, match="without model:more"):
        runner.call("model", folder.parity, folder.exchange, COMPUTE(compute), found)
