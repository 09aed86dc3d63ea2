"""The TensorRT plugin, compiled against every version's headers that are found, and driven as TensorRT drives it.

Headers (never committed; github.com/NVIDIA/TensorRT, tags v8.6.0, v10.3.0, v10.13.0, v11.1): the ``include`` folders
in QVDIT_TENSORRT_INCLUDES, a path list, or build/tensorrt/*/include. A TensorRT that runs here, to register the plugin
with: QVDIT_TENSORRT_LEAN, libnvinfer_lean.so.11, or build/tensorrt/lean, made by
``pip install --no-deps --target build/tensorrt/lean tensorrt_lean_cu13_libs``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tensorrt_core import (
    ATTENTION,
    BF16,
    F16,
    F32,
    FULL,
    HERE,
    LAYER,
    NORMED,
    OTHER,
    PLUGIN,
    RESIDUAL,
    S32,
    Tensor,
    addresses,
    tensor,
)

from qvdit.contract.packing import packed_words
from qvdit.export.cross import header_version
from qvdit.runtimes import cuda

FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-Bsymbolic")
BUILD = Path(__file__).parents[2] / "build" / "tensorrt"
MISSING = "NO TENSORRT HEADERS OF THIS VERSION HERE: THE PLUGIN IS NOT COMPILED FOR IT"
VERSIONS = ("8.6", "10.3", "10.13", "11.1")
LINEAR, CHW4 = 0, 3  # nvinfer1::TensorFormat
TYPES = {F32: 0, F16: 1, S32: 3, BF16: 7}  # nvinfer1::DataType


def includes() -> dict[str, Path]:
    named = [Path(p) for p in os.environ.get("QVDIT_TENSORRT_INCLUDES", "").split(os.pathsep) if p]
    return {header_version(p): p for p in named or sorted(BUILD.glob("*/include"))}


def cuda_include() -> Path | None:
    compiler = shutil.which("nvcc")
    places = [Path(compiler).resolve().parents[1] / "include"] if compiler else []
    places += [Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    return next((p for p in places if (p / "cuda_runtime_api.h").is_file()), None)


def compile_plugin(library: Path, version: str, *options: str) -> None:
    """The plugin on stub kernels, with the driver beside it."""
    include, toolkit, compiler = includes().get(version), cuda_include(), shutil.which("g++") or shutil.which("c++")
    if include is None:
        pytest.skip(f"{MISSING} ({version})")
    if toolkit is None or compiler is None:
        pytest.skip("NO CUDA HEADERS OR NO C++ COMPILER HERE: THE TENSORRT PLUGIN IS NOT COMPILED")
    library.parent.mkdir()
    sources = [HERE / "plugin_driver.cc", HERE / "fake_kernels.cc", *sorted(PLUGIN.glob("*.cc"))]
    system = ["-isystem", str(include), "-isystem", str(toolkit)]
    command = [compiler, *FLAGS, *options, *system, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Driver:
    """The plugin's creator of one TensorRT, and its kernels' records."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        for name in ("plugin_create", "plugin_restore", "plugin_clone", "fake_args"):
            getattr(library, name).restype = ctypes.c_void_p
        for name in ("plugin_message", "fake_name"):
            getattr(library, name).restype = ctypes.c_char_p
        library.plugin_workspace.restype = ctypes.c_int64
        library.fake_reset(b"", 0)
        self.major = library.plugin_tensorrt()

    @property
    def message(self) -> str:
        """The last one logged."""
        return self.library.plugin_message().decode()

    def create(
        self, layer: dict[str, int], name: bytes = b"blocks.0.attn.q", kind: bytes = b"LowBitLinear"
    ) -> Plugin | None:
        names = (ctypes.c_char_p * len(layer))(*(n.encode() for n in layer))
        values = (ctypes.c_int32 * len(layer))(*layer.values())
        made = self.library.plugin_create(kind, name, names, values, len(layer))
        return Plugin(self, made) if made else None

    def plugin(self, **changes: int) -> Plugin:
        made = self.create(LAYER | changes)
        assert made is not None, self.message
        return made

    def attention(self, **changes: int) -> Plugin:
        made = self.create(ATTENTION | changes, b"attn", b"HeadwiseAttention")
        assert made is not None, self.message
        return made

    def residual(self, **changes: int) -> Plugin:
        made = self.create(RESIDUAL | changes, b"sum", b"GatedResidual")
        assert made is not None, self.message
        return made


class Plugin:
    """One plugin object."""

    def __init__(self, driver: Driver, address: int):
        self.driver, self.address = driver, ctypes.c_void_p(address)

    def call(self, function: str, *arguments: Any) -> Any:
        return getattr(self.driver.library, function)(self.address, *arguments)

    def restored(self, bit: int = -1) -> Plugin | None:
        """What an engine makes of it; one bit of it damaged."""
        made = self.call("plugin_restore", b"blocks.0.attn.q", bit)
        return Plugin(self.driver, made) if made else None

    def types(self, tensors: Any) -> list[int] | None:
        found = (ctypes.c_int32 * 5)()
        done = self.call("plugin_types", tensors, len(tensors), found)
        return found[: self.call("plugin_outputs")] if done else None

    def shapes(self, tensors: Any) -> list[tuple[int, ...]] | None:
        found = (Tensor * 5)()
        done = self.call("plugin_shapes", tensors, len(tensors), found)
        return [tuple(t.dims[: t.rank]) for t in found[: self.call("plugin_outputs")]] if done else None

    def takes(self, position: int, tensors: Any, outputs: int = 1, form: int = LINEAR) -> bool:
        return bool(self.call("plugin_takes", position, tensors, len(tensors) - outputs, outputs, form))

    def configured(self, tensors: Any) -> bool:
        return bool(self.call("plugin_configure", tensors, len(tensors)))

    def workspace(self, tensors: Any, most: int) -> int:
        return int(self.call("plugin_workspace", tensors, len(tensors), ctypes.c_int64(most)))

    def enqueued(self, tensors: Any) -> bool:
        inputs, outputs = addresses(len(tensors), 0x10000000), addresses(5, 0x20000000)
        workspace, stream = ctypes.c_void_p(0x30000000), ctypes.c_void_p(0x77)
        return bool(self.call("plugin_enqueue", tensors, len(tensors), inputs, outputs, workspace, stream))


def node(x: Tensor, bits: int = 4) -> Any:
    """The inputs of a plain node."""
    return (Tensor * 3)(x, tensor(S32, 256, packed_words(100, bits)), tensor(F32, 256))


def full_node(x: Tensor) -> Any:
    others = [(S32, 64), (F32, 256), (F32, 100), (F32, 6, 100), (F32, 3, 256), (F32, 2, 4)]
    return (Tensor * 9)(*node(x, bits=8), *(tensor(*shape) for shape in others))


def normed_node(x: Tensor, groups: int) -> Any:
    modulation = tensor(F32, groups, 1, 100)
    first, *others = full_node(x)
    return (Tensor * 11)(first, modulation, modulation, *others)


@pytest.fixture(scope="module", params=VERSIONS)
def driver(request: Any, shared: Callable[..., Path]) -> Driver:
    version = request.param
    if version not in includes():
        pytest.skip(f"{MISSING} ({version})")
    name = f"tensorrt-{version}"
    folder = shared(name, lambda folder: compile_plugin(folder / "lib.so", version, "-DFAKE_TENSORRT"))
    return Driver(ctypes.CDLL(str(folder / "lib.so")))


def test_names_and_numbers_of_outputs(driver):
    assert driver.major in (8, 10, 11)
    assert driver.plugin().call("plugin_outputs") == 1
    assert driver.plugin(test_outputs=1).call("plugin_outputs") == 5


def test_a_refused_layer_is_named(driver):
    assert driver.create(LAYER | {"weight_bits": 5}) is None
    assert driver.message == (
        'LowBitLinear "blocks.0.attn.q": got weight_bits 5, expected 2, 3, 4, 6 or 8: quantize it to one of these'
    )
    assert driver.create({n: v for n, v in LAYER.items() if n != "segment"}, b"x" * 2000) is None
    assert "got no integer attribute segment" in driver.message


def test_outputs_have_types_and_shapes(driver):
    plain, tested = driver.plugin(), driver.plugin(test_outputs=1)
    assert plain.types(node(tensor(F16, -1, -1, 100))) == plain.types(node(tensor(F32, -1, -1, 100))) == [TYPES[F16]]
    assert driver.plugin(y_type=F32).types(node(tensor(F16, -1, -1, 100))) == [TYPES[F32]]
    assert driver.plugin(**NORMED).types(normed_node(tensor(F32, -1, -1, 100), -1)) == [TYPES[F16]]
    assert plain.shapes(node(tensor(F16, -1, -1, 100))) == [(-1, -1, 256)]
    assert tested.types(node(tensor(F32, 2, -1, 100))) == [TYPES[t] for t in (F16, S32, F32, S32, S32)]
    assert tested.shapes(node(tensor(F32, 2, -1, 100))) == [(2, -1, 256), (2, -1, 32), (2, -1), (2, -1), (2, -1, 256)]


def test_formats(driver):
    for dtype in (F32, F16, BF16):
        plugin = driver.plugin(y_type=dtype)
        tensors = (Tensor * 4)(*node(tensor(dtype, 2, 8, 100)), tensor(dtype, 2, 8, 256))
        served = dtype != BF16 or driver.major >= 10
        assert plugin.takes(0, tensors) == plugin.takes(3, tensors) == served
        assert not plugin.takes(0, tensors, form=CHW4)
        assert plugin.takes(1, tensors)
        assert plugin.takes(2, tensors)
        tensors[0].type, tensors[3].type = F16, F16  # y's type is its own
        assert plugin.takes(0, tensors)
        assert plugin.takes(3, tensors) == (dtype == F16)
    tensors[1].type, tensors[2].type, tensors[3].type = F32, F16, F32
    assert not any(plugin.takes(position, tensors) for position in (1, 2, 3))


def test_formats_of_a_node_with_a_layernorm(driver):
    """TensorRT 8.6 chooses among formats; a float32 x must not be narrowed."""
    plugin = driver.plugin(**NORMED)
    tensors = (Tensor * 12)(*normed_node(tensor(F32, 2, 8, 100), 2), tensor(F16, 2, 8, 256))
    assert all(plugin.takes(position, tensors) for position in range(12))
    for position in (0, 1, 2):
        tensors[position].type = F16
        assert not plugin.takes(position, tensors)


def test_an_x_of_integers_is_refused(driver):
    plugin = driver.plugin()
    tensors = (Tensor * 4)(*node(tensor(OTHER, 2, 8, 100)), tensor(OTHER, 2, 8, 256))
    assert not plugin.takes(0, tensors)
    assert plugin.types(tensors) is None or driver.major < 10
    assert 'q": got x of another type, expected float16, bfloat16 or float32: cast it' in driver.message


@pytest.mark.parametrize("x", [tensor(F16, -1, -1, 100), tensor(F16, 2, 8, 100)], ids=["dynamic", "static"])
def test_a_well_formed_node_is_built(driver, x):
    assert driver.plugin().configured(node(x))
    assert driver.plugin(**FULL).configured(full_node(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_node_with_a_layernorm_is_built_and_run(driver, groups):
    plugin = driver.plugin(**NORMED)
    assert plugin.shapes(normed_node(tensor(F32, 2, -1, 100), groups)) == [(2, -1, 256)]
    assert plugin.configured(normed_node(tensor(F32, -1, -1, 100), -1))
    assert plugin.configured(normed_node(tensor(F32, 2, 8, 100), groups))
    assert not plugin.configured(normed_node(tensor(F32, 2, 8, 100), 3))
    assert "got modulations of [3, 1, 100] and [3, 1, 100] for x of [2, 8, 100]" in driver.message
    driver.library.fake_reset(b"", 0)
    assert plugin.restored().enqueued(normed_node(tensor(F32, 2, 8, 100), groups))
    quantize = cuda.QuantizeArgs.from_address(driver.library.fake_args(0))
    assert (quantize.modulation_scale, quantize.modulation_shift) == (0x10010000, 0x10020000)
    assert quantize.rows_per_modulation == 16 // groups


def test_wrong_shapes_end_the_build(driver):
    plugin = driver.plugin()
    assert not plugin.configured(node(tensor(F16, -1, -1, 64)))
    assert driver.message.endswith("q\": got x of [?, ?, 64], expected [..., L, 100]: give it the layer's input")
    assert not plugin.configured(node(tensor(F16, -1, -1, 100), bits=8))
    assert "got words of [256, 32], expected [256, 16]: export the model again" in driver.message
    refused = driver.plugin()
    assert refused.shapes(node(tensor(F16, -1, 64))) is None or driver.major < 10
    assert "got x of [?, 64]" in driver.message
    if driver.major < 10:  # shapes cannot fail there: no format will be found
        assert not refused.takes(0, node(tensor(F16, 8, 100)), outputs=0)
        assert not Plugin(driver, refused.call("plugin_clone")).takes(0, node(tensor(F16, 8, 100)), outputs=0)


def test_a_sequence_that_does_not_hold_its_frames(driver):
    plugin = driver.plugin(**FULL)
    assert not plugin.configured(full_node(tensor(F16, 2, 9, 100)))
    assert "got a sequence of 9 tokens, expected 4 frames of one size" in driver.message
    assert plugin.configured(full_node(tensor(F16, 2, 8, 100)))
    assert not plugin.enqueued(full_node(tensor(F16, 2, 9, 100)))


def test_a_gpu_without_kernels_ends_the_build(driver):
    plugin = driver.plugin()
    driver.library.fake_reset(b"", int(cuda.Status.NO_KERNEL))
    assert not plugin.configured(node(tensor(F16, -1, -1, 100)))
    assert "q\": got no kernel (the kernel's own words), expected one for this GPU: build the plugin" in driver.message
    driver.library.fake_reset(b"", 0)
    assert plugin.configured(node(tensor(F16, -1, -1, 100)))


def test_an_engine_keeps_its_plugins(driver):
    original = driver.plugin(**FULL | {"test_outputs": 1})
    again = original.restored()
    assert again is not None
    assert again.call("plugin_outputs") == 5
    for bit in range(0, 84 * 8, 7):
        assert original.restored(bit) is None
        assert driver.message.startswith('LowBitLinear "blocks.0.attn.q": got ')
    for plugin in (original, again):
        plugin.call("plugin_destroy")


def test_the_workspace_is_that_of_the_largest_shape(driver):
    plugin, static = driver.plugin(), 256 * 128
    small, large = (plugin.workspace(node(tensor(F16, -1, 8, 100)), most) for most in (1, 64))
    assert static + 8 * 132 < small < large
    assert large - small >= 63 * 8 * 132 - 512
    assert plugin.workspace(node(tensor(F16, 64, 8, 100)), 1) == large


@pytest.mark.parametrize("restored", [False, True], ids=["built", "from an engine"])
def test_enqueue_launches_the_kernels(driver, restored):
    plugin = driver.plugin(**FULL)
    plugin = plugin.restored() if restored else plugin
    driver.library.fake_reset(b"", 0)
    assert plugin.enqueued(full_node(tensor(F16, 2, 8, 100)))
    assert_launched(driver)
    driver.library.fake_reset(b"gemm", 0)
    assert not plugin.enqueued(full_node(tensor(F16, 2, 8, 100)))
    assert "q\": got arguments that no kernel takes (the kernel's own words)" in driver.message


def assert_launched(driver: Driver) -> None:
    library = driver.library
    assert [library.fake_name(i) for i in range(library.fake_count())] == [b"quantize", b"unpack", b"gemm"]
    gemm = cuda.GemmArgs.from_address(library.fake_args(2))
    assert (gemm.m, gemm.n, gemm.rank, gemm.segment, gemm.y, gemm.y_dtype) == (16, 256, 3, 128, 0x20000000, F16)
    assert (gemm.weight_scale, gemm.beta) == (0x10020000, 0x10070000)


# Attention

HEADS_FIRST = {"q_layout": 1, "packed": 2}


def attended(length: int = 8, keys: int = 6, dtype: int = F16) -> Any:
    """q, k and v of three heads of 16 features."""
    return (Tensor * 3)(*(tensor(dtype, 2, rows, 48) for rows in (length, keys, keys)))


def test_a_refused_attention_is_named(driver):
    assert driver.create(ATTENTION | {"head_size": 12}, b"attn", b"HeadwiseAttention") is None
    assert driver.message.startswith('HeadwiseAttention "attn": got head_size 12, expected a multiple of 8 to 128: ')


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_attentions_result_is_of_its_queries_type_and_rows(driver, dtype):
    if dtype == BF16 and driver.major < 10:
        return
    plugin = driver.attention()
    assert plugin.call("plugin_outputs") == 1
    assert plugin.types(attended(dtype=dtype)) == [TYPES[dtype]]
    assert plugin.shapes((Tensor * 3)(*[tensor(dtype, -1, -1, 48)] * 3)) == [(-1, -1, 48)]
    packed = driver.attention(packed=3)
    assert packed.shapes((Tensor * 1)(tensor(dtype, 2, -1, 144))) == [(2, -1, 48)]
    first = driver.attention(**HEADS_FIRST)
    assert first.shapes((Tensor * 2)(tensor(dtype, 2, 3, 8, 16), tensor(dtype, 2, 6, 96))) == [(2, 8, 48)]


def test_values_that_are_not_of_a_type_yet(driver):
    """TensorRT 8.6 calls what will be float16 float32 until it builds."""
    plugin = driver.attention()
    driver.library.plugin_configure(plugin.address, attended(dtype=F32), 3)
    before = driver.message
    assert plugin.types(attended(dtype=F32)) == (None if driver.major >= 10 else [TYPES[F16]])
    assert driver.major >= 10 or driver.message == before
    assert plugin.types(attended(dtype=OTHER)) is None or driver.major < 10
    assert "got q of another type, expected float16 or bfloat16" in driver.message


def test_formats_of_attention(driver):
    plugin = driver.attention()
    for dtype in (F16, BF16):
        tensors = (Tensor * 4)(*attended(dtype=dtype), tensor(dtype, 2, 8, 48))
        served = dtype != BF16 or driver.major >= 10
        assert all(plugin.takes(position, tensors) == served for position in range(4))
        assert not any(plugin.takes(position, tensors, form=CHW4) for position in range(4))
    tensors[1].type = tensors[3].type = F16 if driver.major >= 10 else F32
    assert not plugin.takes(1, tensors)
    assert not plugin.takes(3, tensors)
    tensors[0].type = F32
    assert not plugin.takes(0, tensors)


def test_attention_is_built_and_run(driver):
    plugin = driver.attention()
    dynamic = (Tensor * 3)(*[tensor(F16, -1, -1, 48)] * 3)
    assert plugin.configured(dynamic)
    assert plugin.configured(attended())
    assert plugin.workspace(dynamic, 64) == 0
    assert not plugin.configured((Tensor * 3)(*attended()[:2], tensor(F16, 2, 7, 48)))
    assert "got k of [2, 6, 48] and v of [2, 7, 48], expected as many rows of both" in driver.message
    for run in (plugin, plugin.restored()):
        driver.library.fake_reset(b"", 0)
        assert run.enqueued(attended())
        assert [driver.library.fake_name(i) for i in range(driver.library.fake_count())] == [b"attention"]
    driver.library.fake_reset(b"attention", 0)
    assert not plugin.enqueued(attended())
    assert driver.message.startswith('HeadwiseAttention "')
    driver.library.fake_reset(b"", 0)


def test_an_engine_keeps_its_attention(driver):
    original = driver.attention(**HEADS_FIRST)
    for bit in range(0, 44 * 8, 7):
        assert original.restored(bit) is None
        assert driver.message.startswith('HeadwiseAttention "blocks.0.attn.q": got ')
    assert original.restored().enqueued((Tensor * 2)(tensor(F16, 2, 3, 8, 16), tensor(F16, 2, 6, 96)))
    driver.library.fake_reset(b"", 0)


# Residual sums


def summed(batch: int = 6, rows: int = 5) -> Any:
    """A residual, x and a gate of 24 features."""
    shapes = ((F32, batch, rows, 24), (F16, batch, rows, 24), (F32, batch, 1, 24))
    return (Tensor * 3)(*(tensor(*shape) for shape in shapes))


def test_a_residual_sum_is_built_and_run(driver):
    plugin = driver.residual()
    assert plugin.call("plugin_outputs") == 1
    assert plugin.types(summed()) == [TYPES[F32]]
    assert plugin.shapes(summed(-1, -1)) == [(-1, -1, 24)]
    assert plugin.configured(summed(-1, -1))
    assert plugin.configured(summed())
    assert plugin.workspace(summed(-1, -1), 64) == 0
    tensors = (Tensor * 4)(*summed(), tensor(F32, 6, 5, 24))
    assert all(plugin.takes(position, tensors) for position in range(4))
    for position in range(4):
        tensors[position].type = F32 if position == 1 else F16
        assert not plugin.takes(position, tensors)
    for run in (plugin, plugin.restored()):
        driver.library.fake_reset(b"", 0)
        assert run.enqueued(summed())
        assert [driver.library.fake_name(i) for i in range(driver.library.fake_count())] == [b"residual"]
    assert not plugin.enqueued((Tensor * 3)(*summed()[:2], tensor(F32, 2, 1, 24)))
    assert driver.message.startswith('GatedResidual "')
    assert "got gate of [2, 1, 24] for a residual of [6, 5, 24]" in driver.message
    driver.library.fake_reset(b"", 0)


def test_a_swapped_residual_sum_is_of_another_shape(driver):
    plugin = driver.residual(swapped=3)
    assert plugin.shapes(summed()) == [(10, 3, 24)]
    assert plugin.shapes(summed(-1, 5)) == [(-1, 3, 24)]
    assert driver.create(RESIDUAL | {"swapped": -1}, b"sum", b"GatedResidual") is None
    assert driver.message.startswith('GatedResidual "sum": got swapped -1, expected 0 or more: ')


# Under a TensorRT that runs here


def lean_runtime() -> Path | None:
    named = os.environ.get("QVDIT_TENSORRT_LEAN")
    return Path(named) if named else next(iter(sorted(BUILD.glob("*/*/libnvinfer_lean.so.*"))), None)


def test_the_plugin_registers_with_a_real_runtime(tmp_path):
    """Its library, loaded, puts it into the registry; it is created, kept, restored and run from there."""
    lean = lean_runtime()
    if lean is None or not lean.is_file():
        pytest.skip("NO LEAN TENSORRT 11 HERE: THE PLUGIN IS REGISTERED WITH NO REAL REGISTRY")
    compile_plugin(tmp_path / "plugin" / "lib.so", "11.1")
    script = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_tensorrt_plugin as tests
try:
    ctypes.CDLL({str(lean)!r}, mode=ctypes.RTLD_GLOBAL)
except OSError as error:
    sys.exit(f"skip: {{error}}")
driver = tests.Driver(ctypes.CDLL({str(tmp_path / "plugin" / "lib.so")!r}))
assert driver.library.plugin_has_creator(b"LowBitLinear")
assert driver.library.plugin_has_creator(b"HeadwiseAttention")
assert driver.library.plugin_has_creator(b"GatedResidual")
assert driver.library.qvdit_register_plugins() == 1
assert driver.create(tests.LAYER | {{"act_bits": 4}}) is None
plugin = driver.plugin(**tests.FULL)
tensors = tests.full_node(tests.tensor(tests.F16, 2, 8, 100))
assert plugin.types(tensors) == [1] and plugin.configured(tensors)
assert plugin.restored(40) is None
assert plugin.restored().enqueued(tensors)
tests.assert_launched(driver)
for made, tensors in ((driver.attention(), tests.attended()), (driver.residual(), tests.summed())):
    driver.library.fake_reset(b"", 0)
    assert made.types(tensors) and made.configured(tensors) and made.restored().enqueued(tensors)
    assert driver.library.fake_count() == 1
print("registered")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.stderr.startswith("skip:"):
        pytest.skip(f"THE LEAN TENSORRT DOES NOT LOAD HERE: {done.stderr[6:]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "registered\n"
    assert 'LowBitLinear "blocks.0.attn.q": got act_bits 4' in done.stderr
