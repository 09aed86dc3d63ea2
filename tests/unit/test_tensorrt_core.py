"""The TensorRT plugin's core, without TensorRT and without a GPU: its kernels are stubs that keep their arguments."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import FrameRows
from qvdit.contract.kernels import Prologue
from qvdit.contract.packing import packed_words
from qvdit.runtimes import cuda

HERE = Path(__file__).parent / "csrc"
PLUGIN = Path(__file__).parents[2] / "runtimes" / "csrc" / "tensorrt"
FLAGS = ("-std=c++17", "-O1", "-fno-exceptions", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
CORES = ("low_bit_core", "attention_core", "residual_core")
CORE = tuple(PLUGIN / f"{name}.cc" for name in ("node", "attributes", *CORES))

LAYER = {
    "in_features": 100,
    "out_features": 256,
    "weight_bits": 4,
    "act_bits": 8,
    "act_symmetric": 1,
    "rank": 0,
    "segment": 256,
    "rows": 0,
    "frames": 0,
    "rotation": 0,
    "prologue": 0,
    "epsilon": 0,
    "y_type": 1,
    "has_zero": 0,
    "has_bias": 0,
    "has_smooth": 0,
    "test_outputs": 0,
}
K_PAD = 128
# Everything that a node can have: two merged linears, 8-bit weights with zero points, asymmetric activations.
FULL = LAYER | {
    "weight_bits": 8,
    "act_symmetric": 0,
    "rank": 3,
    "segment": 128,
    "rows": 1,
    "frames": 4,
    "rotation": 4,
    "prologue": 2,
    "has_zero": 1,
    "has_bias": 1,
    "has_smooth": 1,
}
ATTENTION = {
    "heads": 3,
    "head_size": 16,
    "packed": 0,
    "q_layout": 0,
    "k_layout": 0,
    "v_layout": 0,
    "scale": 1048576000,  # 0.25
}
RESIDUAL = {"gated": 1, "swapped": 0}
# The same as FULL with a LayerNorm and its modulation.
EPSILON = 1e-6


def bits_of(number: float) -> int:
    return struct.unpack("<i", struct.pack("<f", number))[0]


NORMED = FULL | {"prologue": 1, "epsilon": bits_of(EPSILON)}
ROWS = {FrameRows.NONE: 0, FrameRows.SEQUENCE: 1, FrameRows.SPATIAL: 2, FrameRows.TEMPORAL: 3}
MODULATION = ("modulation_scale", "modulation_shift")
INPUTS = ("x", *MODULATION, "words", "weight_scale", "weight_zero", "bias", "inv_smooth", "alpha", "beta", "frame_gain")
PIECES = ("weight", "weight_sum", "x_q", "scale", "zero", "u", "row_sum")
F32, F16, BF16, S32, OTHER = cuda.Dtype.F32, cuda.Dtype.F16, cuda.Dtype.BF16, cuda.Dtype.S32, -1

_SIZE, _INT = ctypes.c_int64, ctypes.c_int32


class Tensor(ctypes.Structure):
    _fields_ = (("type", _INT), ("rank", _INT), ("dims", _SIZE * 8))


class InputPort(ctypes.Structure):
    _fields_ = (("input", _INT), ("name", ctypes.c_char_p), ("type", _INT), ("rank", _INT), ("dims", _SIZE * 3))


class OutputPort(ctypes.Structure):
    _fields_ = (("type", _INT), ("columns", _SIZE))


class Workspace(ctypes.Structure):
    _fields_ = (("offset", _SIZE * len(PIECES)), ("bytes", _SIZE))


def tensor(dtype: int, *dims: int) -> Tensor:
    return Tensor(dtype, len(dims), (_SIZE * 8)(*dims))


class Core:
    """The core and its kernels' records."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        for name in ("core_field_name", "fake_name"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("fake_args", "fake_stream"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.library.fake_reset(b"", 0)
        self.message = ""

    def ask(self, function: str, *arguments: Any) -> bool:
        """A function that refuses; what it says is kept."""
        text = ctypes.create_string_buffer(512)
        done = getattr(self.library, function)(*arguments, text)
        self.message = text.value.decode()
        assert bool(done) == (self.message == "")
        return bool(done)

    def fields(self) -> list[str]:
        return [self.library.core_field_name(i).decode() for i in range(self.library.core_field_count())]

    def read(self, given: dict[str, int]) -> Any | None:
        """Attributes of these names; None if they are refused."""
        names = (ctypes.c_char_p * len(given))(*(name.encode() for name in given))
        values = (_INT * len(given))(*given.values())
        attributes = (_INT * len(self.fields()))()
        return attributes if self.ask("core_read", names, values, len(given), attributes) else None

    def attributes(self, **changes: int) -> Any:
        found = self.read(LAYER | changes)
        assert found is not None, self.message
        return found

    def inputs(self, attributes: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Each input's type and shape."""
        ports = (InputPort * len(INPUTS))()
        count = self.library.core_inputs(attributes, ports)
        assert all(INPUTS[p.input] == p.name.decode() for p in ports[:count])
        return {p.name.decode(): (p.type, tuple(p.dims[: p.rank])) for p in ports[:count]}

    def workspace(self, attributes: Any, rows: int) -> Workspace:
        found = Workspace()
        self.library.core_workspace(attributes, _SIZE(rows), ctypes.byref(found))
        return found

    def tensors(self, attributes: Any, x: Tensor) -> Any:
        """What a well-formed node is given beside x."""
        others = [tensor(dtype, *shape) for dtype, shape in list(self.inputs(attributes).values())[1:]]
        for other in others:  # a modulation for each of x's
            other.dims[0] = x.dims[0] if other.dims[0] == -1 else other.dims[0]
        return (Tensor * (1 + len(others)))(x, *others)

    def check(self, attributes: Any, tensors: Any, known: bool = True) -> bool:
        return self.ask("core_check", attributes, tensors, len(tensors), known)

    def calls(self) -> list[tuple[str, Any]]:
        """The launches' names and arguments, in their order."""
        kinds = {"unpack": cuda.UnpackArgs, "quantize": cuda.QuantizeArgs, "gemm": cuda.GemmArgs}
        names = [self.library.fake_name(i).decode() for i in range(self.library.fake_count())]
        return [(n, kinds[n].from_address(self.library.fake_args(i))) for i, n in enumerate(names)]


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def core_library(shared: Callable[..., Path]) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def build(folder: Path) -> None:
        folder.mkdir()
        drivers = (HERE / f"{name}.cc" for name in ("fake_kernels", *(f"{core}_driver" for core in CORES)))
        sources = [str(s) for s in (*CORE, *drivers)]
        compiled([compiler, *FLAGS, *sources, "-o", str(folder / "libcore.so")])

    return shared("tensorrt-core", build) / "libcore.so"


@pytest.fixture
def core(core_library: Path) -> Core:
    return Core(core_library)


# Attributes


def test_a_nodes_attributes_are_those_of_the_export(core):
    assert core.fields() == list(LAYER)
    assert list(core.attributes()) == list(LAYER.values())
    assert list(core.attributes(**NORMED)) == list(NORMED.values())


def test_unknown_attributes_are_left_alone(core):
    assert list(core.read({"plugin_version": 1} | LAYER | {"other": 5})) == list(LAYER.values())


@pytest.mark.parametrize("name", LAYER)
def test_a_missing_attribute_is_named(core, name):
    assert core.read({n: v for n, v in LAYER.items() if n != name}) is None
    assert core.message == (
        f"got no integer attribute {name}, expected one: export the model again with this plugin's version"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 16385}, "got in_features 16385, expected 1 to 16384: "),
        ({"in_features": 0}, "got in_features 0"),
        ({"out_features": 0, "segment": 1}, "got out_features 0"),
        ({"weight_bits": 5}, "got weight_bits 5, expected 2, 3, 4, 6 or 8: "),
        ({"act_bits": 4}, "got act_bits 4, expected 6 or 8: "),
        ({"act_symmetric": 2}, "got act_symmetric 2, expected 0 or 1"),
        ({"has_zero": -1}, "got has_zero -1, expected 0 or 1"),
        ({"test_outputs": 3}, "got test_outputs 3, expected 0 or 1"),
        ({"segment": 64}, "got segment 64 of out_features 256, expected all of them or a multiple of 128"),
        ({"segment": 0}, "got segment 0"),
        ({"segment": 512}, "got segment 512"),
        ({"rank": 33}, "got rank 33 of each of 1 linears, expected at most 32 in all"),
        ({"rank": 17, "segment": 128}, "got rank 17 of each of 2 linears, expected at most 32 in all"),
        ({"rank": -1}, "got rank -1"),
        ({"rows": 4}, "got rows 4, expected 0 (none), 1 (sequence), 2 (spatial) or 3 (temporal)"),
        ({"frames": -1}, "got frames -1"),
        ({"rotation": 3}, "got rotation 3 of in_features 100, expected 0 or a power of two to 1024 that divides them"),
        ({"rotation": 8}, "got rotation 8 of in_features 100"),
        ({"rotation": 2048, "in_features": 4096}, "got rotation 2048"),
        ({"prologue": 3}, "got prologue 3, expected 0 (none), 1 (LayerNorm) or 2 (GELU)"),
        ({"prologue": -1}, "got prologue -1"),
        ({"epsilon": bits_of(-1e-6)}, "got epsilon -1e-06, expected the bits of a float of 0 or more"),
        ({"epsilon": bits_of(float("inf"))}, "got epsilon inf"),
        ({"epsilon": bits_of(float("nan"))}, "got epsilon nan"),
        ({"y_type": 3}, "got y_type 3, expected 0 (float32), 1 (float16) or 2 (bfloat16)"),
        ({"y_type": -1}, "got y_type -1"),
        ({"frames": 4, "rows": 1}, "got gains of 4 frames with rank 0 and rows 1, expected a rank"),
        ({"frames": 4, "rank": 1}, "got gains of 4 frames with rank 1 and rows 0, expected a rank and rows"),
    ],
)
def test_what_no_kernel_serves_is_refused(core, changes, message):
    assert core.read(LAYER | changes) is None
    assert core.message.startswith(message)
    assert ": " in core.message  # what to do


# Serialization


def serialized(core: Core, attributes: Any) -> bytes:
    blob = ctypes.create_string_buffer(core.library.core_blob_bytes())
    core.library.core_serialize(attributes, blob)
    return blob.raw


def restored(core: Core, blob: bytes) -> list[int] | None:
    attributes = (_INT * len(LAYER))()
    data = ctypes.create_string_buffer(blob, len(blob)) if blob else None
    return list(attributes) if core.ask("core_deserialize", data, _SIZE(len(blob)), attributes) else None


@pytest.mark.parametrize("layer", [LAYER, FULL, NORMED], ids=["plain", "full", "normed"])
def test_an_engine_keeps_the_attributes(core, layer):
    assert restored(core, serialized(core, core.attributes(**layer))) == list(layer.values())


def test_every_damaged_bit_is_refused(core):
    blob = serialized(core, core.attributes(**FULL))
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        assert restored(core, bytes(damaged)) is None, bit


def test_every_other_length_is_refused(core):
    blob = serialized(core, core.attributes())
    for length in range(len(blob)):
        assert restored(core, blob[:length]) is None
    assert restored(core, blob + b"\0") is None


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 7, r"got 84 bytes that are no LowBitLinear, .*: build the engine again"),
        (1, 2, r"got a layer of version 2, expected 4: build the engine again with this plugin, or load"),
        (2, 88, r"got 84 bytes that say they are 88, expected 84: build"),
        (3, 64, r"got a damaged layer, expected its checksum to match: build"),
    ],
    ids=["magic", "version", "size", "attribute"],
)
def test_damage_is_named(core, word, value, message):
    blob = bytearray(serialized(core, core.attributes()))
    blob[4 * word : 4 * word + 4] = value.to_bytes(4, "little")
    assert restored(core, bytes(blob)) is None
    assert re.match(message, core.message), core.message


# Shapes


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_inputs_follow_the_attributes(core, bits):
    words = (S32, (256, packed_words(100, bits)))
    plain = {"x": (OTHER, (-1, -1)), "words": words, "weight_scale": (F32, (256,))}
    assert core.inputs(core.attributes(weight_bits=bits)) == plain
    assert core.inputs(core.attributes(**FULL | {"weight_bits": bits})) == plain | {
        "weight_zero": (S32, (64,)),
        "bias": (F32, (256,)),
        "inv_smooth": (F32, (100,)),
        "alpha": (F16, (6, 100)),
        "beta": (F16, (3, 256)),
        "frame_gain": (F32, (2, 4)),
    }


def test_one_rank_has_its_outputs_in_float32(core):
    found = core.inputs(core.attributes(**FULL | {"rank": 1}))
    assert (found["alpha"], found["beta"]) == ((F16, (2, 100)), (F32, (1, 256)))


def test_a_modulation_follows_a_float32_x(core):
    found = core.inputs(core.attributes(**NORMED))
    assert list(found.items())[:3] == [
        ("x", (F32, (-1, -1))),
        ("modulation_scale", (F32, (-1, 1, 100))),
        ("modulation_shift", (F32, (-1, 1, 100))),
    ]
    rest = {name: port for name, port in found.items() if name not in ("x", *MODULATION)}
    assert rest == {n: p for n, p in core.inputs(core.attributes(**FULL)).items() if n != "x"}


def test_zero_points_fill_whole_words(core):
    assert core.inputs(core.attributes(out_features=257, segment=257, has_zero=1))["weight_zero"] == (S32, (65,))


def test_outputs(core):
    ports = (OutputPort * 5)()
    assert core.library.core_outputs(core.attributes(), ports) == 1
    assert core.library.core_outputs(core.attributes(test_outputs=1), ports) == 5
    found = [(port.type, port.columns) for port in ports]
    assert found == [(F16, 256), (S32, K_PAD // 4), (F32, 0), (S32, 0), (S32, 256)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_well_formed_inputs_are_taken(core, dtype):
    for layer in (LAYER, FULL):
        attributes = core.attributes(**layer)
        assert core.check(attributes, core.tensors(attributes, tensor(dtype, 2, 8, 100)))
        assert core.check(attributes, core.tensors(attributes, tensor(dtype, -1, -1, 100)), known=False)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tensor(F16, 2, 8, 64), "got x of [2, 8, 64], expected [..., L, 100]: "),
        (tensor(F16, 100), "got x of [100], expected [..., L, 100]"),
        (tensor(OTHER, 8, 100), "got x of another type, expected float16, bfloat16 or float32: cast it"),
        (tensor(S32, 8, 100), "got x of int32"),
        (tensor(F16, 1 << 16, 1 << 15, 100), "got x of [65536, 32768, 100], expected less than 2147483647 rows"),
        (tensor(F16, 1 << 62, 1 << 62, 100), "got x of ["),
    ],
)
def test_an_x_that_does_not_fit(core, x, message):
    attributes = core.attributes()
    assert not core.check(attributes, core.tensors(attributes, x))
    assert core.message.startswith(message)


@pytest.mark.parametrize("position", range(1, len(INPUTS)))
def test_an_input_that_does_not_fit_is_named(core, position):
    attributes = core.attributes(**NORMED)
    name = INPUTS[position]
    tensors = core.tensors(attributes, tensor(F32, 2, 8, 100))
    last = tensors[position].rank - 1
    tensors[position].dims[last] += 1
    assert not core.check(attributes, tensors)
    assert core.message.startswith(f"got {name} of [")
    assert "export the model again" in core.message
    tensors[position].dims[last] -= 1
    other, called = (F32, "float32") if tensors[position].type == F16 else (F16, "float16")
    tensors[position].type = other
    assert not core.check(attributes, tensors)
    assert core.message.startswith(f"got {name} of {called}, expected ")


def test_another_number_of_inputs_is_refused(core):
    attributes = core.attributes(has_bias=1)
    tensors = core.tensors(attributes, tensor(F16, 8, 100))
    assert not core.ask("core_check", attributes, tensors, 3, 1)
    assert core.message.startswith("got 3 inputs, expected the 4 that its attributes name")


def normed(core: Core, attributes: Any, x: Tensor, scale: int, shift: int) -> Any:
    """The inputs of a node whose modulations have so many rows."""
    tensors = core.tensors(attributes, x)
    tensors[1].dims[0], tensors[2].dims[0] = scale, shift
    return tensors


@pytest.mark.parametrize("rows", [1, 2])
def test_a_modulation_of_every_group_or_of_all(core, rows):
    attributes = core.attributes(**NORMED)
    assert core.check(attributes, normed(core, attributes, tensor(F32, 2, 8, 100), rows, rows))
    assert core.check(attributes, normed(core, attributes, tensor(F32, -1, -1, 100), rows, rows), known=False)
    assert core.check(attributes, normed(core, attributes, tensor(F32, 2, 8, 100), -1, rows), known=False)


@pytest.mark.parametrize(
    ("x", "scale", "shift"),
    [
        (tensor(F32, 2, 8, 100), 3, 3),
        (tensor(F32, 2, 8, 100), 1, 2),
        (tensor(F32, 2, 8, 100), 2, 1),
        (tensor(F32, 1, 8, 100), 2, 2),
        (tensor(F32, 8, 100), 8, 8),
        (tensor(F32, 2, 2, 4, 100), 2, 2),
    ],
)
def test_a_modulation_that_does_not_belong_to_x(core, x, scale, shift):
    attributes = core.attributes(**NORMED)
    assert not core.check(attributes, normed(core, attributes, x, scale, shift))
    assert core.message.startswith(f"got modulations of [{scale}, 1, 100] and [{shift}, 1, 100] for x of [")
    assert core.message.endswith("expected [G, 1, K] for [G, L, K], or [1, 1, K]: export the model again")


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_layernorm_reads_float32(core, dtype):
    attributes = core.attributes(**NORMED)
    assert not core.check(attributes, core.tensors(attributes, tensor(dtype, 2, 8, 100)))
    assert re.match("got x of b?float16, expected float32: export", core.message)


# Frames


@given(st.sampled_from([r for r in FrameRows if r is not FrameRows.NONE]), st.integers(1, 9), st.integers(1, 50))
def test_tokens_per_frame_are_those_of_the_contract(core_library, rows, frames, tokens):
    core = Core(core_library)
    attributes = core.attributes(rank=1, rows=ROWS[rows], frames=frames)
    length, found = frames * tokens, _SIZE()
    assert core.ask("core_tokens", attributes, _SIZE(length), ctypes.byref(found))
    assert found.value == rows.tokens_per_frame(length, frames)


def test_a_sequence_must_hold_its_frames(core):
    attributes = core.attributes(rank=1, rows=ROWS[FrameRows.SEQUENCE], frames=4)
    assert core.check(attributes, core.tensors(attributes, tensor(F16, 2, 8, 100)))
    assert core.check(attributes, core.tensors(attributes, tensor(F16, 2, 9, 100)), known=False)
    assert not core.check(attributes, core.tensors(attributes, tensor(F16, 2, 9, 100)))
    assert core.message.startswith("got a sequence of 9 tokens, expected 4 frames of one size: ")


# Workspace


def expected_pieces(layer: dict[str, int], rows: int) -> dict[str, int]:
    """Bytes of each piece that there is."""
    n, ranks = layer["out_features"], layer["out_features"] // layer["segment"] * layer["rank"]
    own, asymmetric = not layer["test_outputs"], not layer["act_symmetric"]
    k_pad = -(-layer["in_features"] // 32) * 32
    sizes = {
        "weight": n * k_pad,
        "weight_sum": 4 * n * asymmetric,
        "x_q": rows * k_pad * own,
        "scale": 4 * rows * own,
        "zero": 4 * rows * own * asymmetric,
        "u": 4 * rows * ranks,
        "row_sum": 4 * rows * (layer["has_zero"] and layer["weight_bits"] == 8),
    }
    return {name: size for name, size in sizes.items() if size}


layers = st.builds(
    lambda **changes: LAYER | changes,
    in_features=st.integers(1, 16384),
    out_features=st.just(384),
    segment=st.sampled_from([128, 384]),
    weight_bits=st.sampled_from([2, 3, 4, 6, 8]),
    rank=st.integers(0, 10),
    act_symmetric=st.integers(0, 1),
    has_zero=st.integers(0, 1),
    test_outputs=st.integers(0, 1),
)


@given(layers, st.integers(1, 1 << 20), st.integers(0, 1000))
def test_the_workspace_holds_its_pieces(core_library, layer, rows, more):
    core = Core(core_library)
    attributes = core.attributes(**layer)
    layout = core.workspace(attributes, rows)
    offsets = {name: at for name, at in zip(PIECES, layout.offset, strict=True) if at >= 0}
    sizes = expected_pieces(layer, rows)
    assert offsets.keys() == sizes.keys()
    end = 0
    for name, at in sorted(offsets.items(), key=lambda item: item[1]):
        assert at % 256 == 0
        assert at >= end
        end = at + sizes[name]
    assert end + 255 <= layout.bytes <= end + 256 * (len(sizes) + 1)  # wherever TensorRT's begins
    assert core.workspace(attributes, rows + more).bytes >= layout.bytes


# Wiring: which pointer goes where


def addresses(count: int, start: int) -> Any:
    return (ctypes.c_void_p * count)(*(start + 0x10000 * i for i in range(count)))


def launched(
    core: Core, layer: dict[str, int], dims: tuple[int, ...] = (2, 8, 100), dtype: int = F16, groups: int | None = None
) -> Any:
    """Run a node on made-up addresses: its launches, its inputs, outputs and pieces by name.

    groups: rows of the modulation; as many as x has unless given.
    """
    attributes = core.attributes(**layer)
    names = list(core.inputs(attributes))
    inputs, outputs = addresses(len(names), 0x10000000), addresses(5, 0x20000000)
    base = 0x30000010  # TensorRT promises no alignment
    descriptions = core.tensors(attributes, tensor(dtype, *dims))
    if groups is not None:
        descriptions[1].dims[0] = descriptions[2].dims[0] = groups
    done = core.ask("core_run", attributes, descriptions, inputs, outputs, ctypes.c_void_p(base), ctypes.c_void_p(0x77))
    assert done, core.message
    rows = 1
    for extent in dims[:-1]:
        rows *= extent
    layout = core.workspace(attributes, rows)
    pieces = {name: 0x30000100 + at for name, at in zip(PIECES, layout.offset, strict=True) if at >= 0}
    assert all(core.library.fake_stream(i) == 0x77 for i in range(core.library.fake_count()))
    return core.calls(), dict(zip(names, inputs, strict=True)), list(outputs), pieces


def values(arguments: ctypes.Structure) -> dict[str, Any]:
    """What is set in a launch's arguments."""
    fields = {name: getattr(arguments, name) for name, *_ in arguments._fields_}
    return {name: value for name, value in fields.items() if value is not None}


def test_a_plain_node(core):
    calls, given, outputs, pieces = launched(core, LAYER)
    assert [name for name, _ in calls] == ["quantize", "unpack", "gemm"]
    quantize, unpack, gemm = (values(arguments) for _, arguments in calls)
    assert pieces.keys() == {"weight", "x_q", "scale"}
    assert unpack == {
        "words": given["words"],
        "n": 256,
        "k": 100,
        "bits": 4,
        "reserved": 0,
        "weight": pieces["weight"],
    }
    absent = ("frames", "rotation", "ranks_per_gain", "rank", "modulation_stride", "rows_per_modulation")
    nothing = dict.fromkeys(absent, 0)
    assert quantize == nothing | {
        "x": given["x"],
        "m": 16,
        "k": 100,
        "x_dtype": F16,
        "prologue": Prologue.PLAIN,
        "act_bits": 8,
        "symmetric": 1,
        "epsilon": 0.0,
        "tokens_per_frame": 1,
        "x_q": pieces["x_q"],
        "scale": pieces["scale"],
    }
    assert gemm == {
        "x_q": pieces["x_q"],
        "weight": pieces["weight"],
        "m": 16,
        "n": 256,
        "k_pad": K_PAD,
        "scale": pieces["scale"],
        "weight_scale": given["weight_scale"],
        "rank": 0,
        "segment": 256,
        "y": outputs[0],
        "y_dtype": F16,
        "tile": cuda.Tile.AUTO,
        "beta_dtype": F32,
        "reserved": 0,
    }


@pytest.mark.parametrize("y_type", [F32, F16, BF16])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_y_is_of_its_own_type(core, dtype, y_type):
    calls, *_ = launched(core, LAYER | {"y_type": y_type}, dtype=dtype)
    assert (calls[0][1].x_dtype, calls[2][1].y_dtype) == (dtype, y_type)


def test_a_full_node(core):
    calls, given, _, pieces = launched(core, FULL)
    quantize, unpack, gemm = (arguments for _, arguments in calls)
    assert pieces.keys() == set(PIECES)
    assert (unpack.zero, unpack.weight_sum) == (given["weight_zero"], pieces["weight_sum"])
    assert (quantize.inv_smooth, quantize.alpha) == (given["inv_smooth"], given["alpha"])
    assert (quantize.rank, quantize.ranks_per_gain) == (6, 3)  # of both linears, of one
    assert (quantize.frames, quantize.frame_gain, quantize.tokens_per_frame) == (4, given["frame_gain"], 2)
    assert (quantize.rotation, quantize.prologue) == (4, Prologue.GELU)
    assert (quantize.symmetric, quantize.zero, quantize.u) == (0, pieces["zero"], pieces["u"])
    assert quantize.row_sum == pieces["row_sum"]
    assert (gemm.zero, gemm.weight_sum) == (pieces["zero"], pieces["weight_sum"])
    assert (gemm.weight_zero, gemm.row_sum) == (given["weight_zero"], pieces["row_sum"])
    assert (gemm.u, gemm.beta, gemm.rank, gemm.segment) == (pieces["u"], given["beta"], 3, 128)
    assert (gemm.bias, gemm.beta_dtype) == (given["bias"], F16)


@pytest.mark.parametrize(
    ("dims", "groups", "rows"),
    [((2, 8, 100), 2, 8), ((2, 8, 100), 1, 16), ((1, 8, 100), 1, 8), ((8, 100), 1, 8), ((2, 2, 4, 100), 1, 16)],
)
def test_a_node_with_a_layernorm(core, dims, groups, rows):
    calls, given, _, pieces = launched(core, NORMED, dims, F32, groups)
    quantize, _, gemm = (arguments for _, arguments in calls)
    assert (quantize.x, quantize.x_dtype, quantize.prologue) == (given["x"], F32, Prologue.LAYERNORM)
    assert (quantize.modulation_scale, quantize.modulation_shift) == (given[MODULATION[0]], given[MODULATION[1]])
    assert (quantize.modulation_stride, quantize.rows_per_modulation) == (100, rows)
    assert bits_of(quantize.epsilon) == bits_of(EPSILON)
    assert (quantize.inv_smooth, quantize.alpha) == (given["inv_smooth"], given["alpha"])
    assert (gemm.y_dtype, gemm.bias, gemm.u) == (F16, given["bias"], pieces["u"])


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_narrower_weights_lose_their_zero_points_while_unpacked(core, bits):
    calls, given, _, pieces = launched(core, FULL | {"weight_bits": bits})
    quantize, unpack, gemm = (arguments for _, arguments in calls)
    assert unpack.zero == given["weight_zero"]
    assert quantize.row_sum is gemm.row_sum is gemm.weight_zero is None
    assert "row_sum" not in pieces


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (2, 8), (3, 1)], ids=["sequence", "spatial", "temporal"])
def test_rows_belong_to_frames(core, rows, tokens):
    calls, *_ = launched(core, LAYER | {"rank": 1, "rows": rows, "frames": 4})
    assert calls[0][1].tokens_per_frame == tokens
    assert calls[0][1].m == 16


@pytest.mark.parametrize("symmetric", [0, 1])
def test_the_test_mode_returns_the_integers(core, symmetric):
    calls, _, outputs, pieces = launched(core, FULL | {"act_symmetric": symmetric, "test_outputs": 1})
    assert [name for name, _ in calls] == ["quantize", "unpack", "gemm", "gemm"]
    quantize, _, gemm, again = (arguments for _, arguments in calls)
    assert [quantize.x_q, quantize.scale, quantize.zero] == outputs[1:4]
    assert not pieces.keys() & {"x_q", "scale", "zero"}
    assert [gemm.x_q, gemm.scale, gemm.zero] == [outputs[1], outputs[2], None if symmetric else outputs[3]]
    assert (gemm.y, gemm.y_dtype) == (outputs[0], F16)
    assert (again.y, again.y_dtype) == (outputs[4], S32)
    same = values(gemm) | {"y": again.y, "y_dtype": S32}
    assert values(again) == same


def test_no_rows_launch_nothing(core):
    calls, *_ = launched(core, LAYER, dims=(0, 8, 100))
    assert calls == []


@pytest.mark.parametrize("kernel", ["quantize", "unpack", "gemm"])
def test_a_kernels_refusal_is_passed_on(core, kernel):
    core.library.fake_reset(kernel.encode(), 0)
    attributes = core.attributes()
    tensors = core.tensors(attributes, tensor(F16, 8, 100))
    inputs, outputs, null = addresses(3, 0x10000000), addresses(1, 0x20000000), ctypes.c_void_p()
    assert not core.ask("core_run", attributes, tensors, inputs, outputs, null, null)
    assert "the kernel's own words" in core.message
    assert [name for name, _ in core.calls()][-1] == kernel


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (cuda.Status.NO_KERNEL, "got no kernel (the kernel's own words), expected one for this GPU: build the plugin"),
        (cuda.Status.CUDA, "got a CUDA error (the kernel's own words), expected a working device: "),
    ],
)
def test_a_device_without_kernels_is_refused(core, status, message):
    assert core.ask("core_device")
    core.library.fake_reset(b"", int(status))
    assert not core.ask("core_device")
    assert core.message.startswith(message)
