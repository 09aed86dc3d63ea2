"""The TensorRT plugin's attention, without TensorRT and without a GPU: its kernel is a stub, which keeps arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from test_tensorrt_core import ATTENTION, BF16, F16, F32, OTHER, Core, Tensor, addresses, bits_of, core_library, tensor

from qvdit.runtimes import cuda

__all__ = ["core_library"]  # a fixture

HEADS, SIZE = ATTENTION["heads"], ATTENTION["head_size"]
WIDTH = HEADS * SIZE
B, L, S = 2, 5, 7


class Attention(Core):
    """The attention's core and its kernel's records."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.library.attention_field_name.restype = ctypes.c_char_p

    def fields(self) -> list[str]:
        return [self.library.attention_field_name(i).decode() for i in range(self.library.attention_field_count())]

    def validated(self, **changes: int) -> Any | None:
        """Attributes as an array; None if they are refused."""
        values = (ctypes.c_int32 * len(ATTENTION))(*(ATTENTION | changes).values())
        return values if self.ask("attention_validate", values) else None

    def blob(self, **changes: int) -> bytes:
        blob = ctypes.create_string_buffer(self.library.attention_blob_bytes())
        self.library.attention_serialize(self.validated(**changes), blob)
        return blob.raw

    def restored(self, blob: bytes) -> list[int] | None:
        values = (ctypes.c_int32 * len(ATTENTION))()
        data = ctypes.create_string_buffer(blob, len(blob)) if blob else None
        done = self.ask("attention_deserialize", data, ctypes.c_int64(len(blob)), values)
        return list(values) if done else None

    def check_given(self, attributes: dict[str, int], *tensors: Tensor, known: bool = True) -> bool:
        given = (Tensor * len(tensors))(*tensors)
        return self.ask("attention_check", self.validated(**attributes), given, len(tensors), known)

    def launched(self, attributes: dict[str, int], *tensors: Tensor) -> list[dict[str, Any]]:
        """The launches' arguments on made-up addresses."""
        given, inputs, outputs = (Tensor * len(tensors))(*tensors), addresses(3, 0x10000000), addresses(1, 0x20000000)
        done = self.ask("attention_run", self.validated(**attributes), given, inputs, outputs, ctypes.c_void_p(0x77))
        assert done, self.message
        count = self.library.fake_count()
        assert all(self.library.fake_name(i) == b"attention" for i in range(count))
        assert all(self.library.fake_stream(i) == 0x77 for i in range(count))
        made = [cuda.AttentionArgs.from_address(self.library.fake_args(i)) for i in range(count)]
        return [{name: getattr(args, name) for name, *_ in cuda.AttentionArgs._fields_} for args in made]


@pytest.fixture
def attention(core_library: Path) -> Attention:
    return Attention(core_library)


def rows(length: int, parts: int = 1, dtype: int = F16) -> Tensor:
    return tensor(dtype, B, length, parts * WIDTH)


def heads(length: int, first: bool = False, dtype: int = F16) -> Tensor:
    return tensor(dtype, B, HEADS, length, SIZE) if first else tensor(dtype, B, length, HEADS, SIZE)


# Attributes


def test_the_attributes_are_those_of_the_export(attention):
    assert attention.fields() == list(ATTENTION)


@pytest.mark.parametrize("size", range(8, 129, 8))
def test_heads_that_the_kernel_serves(attention, size):
    assert attention.validated(head_size=size) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "got heads 0, expected 1 or more"),
        ({"head_size": 12}, "got head_size 12, expected a multiple of 8 to 128: leave this attention to TensorRT"),
        ({"head_size": 136}, "got head_size 136, expected a multiple of 8 to 128"),
        ({"head_size": 0}, "got head_size 0, expected a multiple of 8 to 128"),
        ({"packed": 1}, "got packed 1, expected 0 (none), 2 (k and v) or 3 (q, k and v)"),
        ({"packed": 4}, "got packed 4, expected 0"),
        ({"q_layout": 2}, "got q_layout 2, expected 0 or 1"),
        ({"packed": 2, "k_layout": 1}, "got packed 2 with heads before rows, expected packed ones in layout 0"),
        ({"packed": 3, "q_layout": 1}, "got packed 3 with heads before rows"),
        ({"scale": bits_of(float("inf"))}, "got scale inf, expected the bits of a positive float"),
        ({"scale": bits_of(float("nan"))}, "got scale nan, expected the bits of a positive float"),
        ({"scale": bits_of(-0.25)}, "got scale -0.25, expected the bits of a positive float"),
        ({"scale": 0}, "got scale 0, expected the bits of a positive float"),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused(attention, changes, message):
    assert attention.validated(**changes) is None
    assert attention.message.startswith(message)
    assert ": " in attention.message  # what to do


# Serialization


def test_an_engine_keeps_the_attributes(attention):
    changes = {"packed": 2, "q_layout": 1}
    assert attention.restored(attention.blob(**changes)) == list((ATTENTION | changes).values())


def test_whatever_is_damaged_is_refused(attention):
    blob = attention.blob()
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        assert attention.restored(bytes(damaged)) is None, bit
    for length in range(len(blob)):
        assert attention.restored(blob[:length]) is None
    assert attention.restored(blob + b"\0") is None
    assert attention.restored(bytes(len(blob))) is None
    assert attention.message == "got 44 bytes that are no HeadwiseAttention, expected what this plugin wrote: " + (
        "build the engine again"
    )


# Inputs


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_well_formed_inputs_are_taken(attention, dtype):
    for q in (rows(L, dtype=dtype), heads(L, dtype=dtype)):
        for v in (rows(S, dtype=dtype), heads(S, dtype=dtype)):
            assert attention.check_given({}, q, heads(S, dtype=dtype), v)
    first = {f"{of}_layout": 1 for of in "qkv"}
    assert attention.check_given(first, *(heads(n, True, dtype) for n in (L, S, S)))
    assert attention.check_given({"packed": 2}, rows(L, dtype=dtype), rows(S, 2, dtype))
    assert attention.check_given({"packed": 3}, rows(L, 3, dtype))
    unknown = tensor(dtype, -1, -1, WIDTH)
    assert attention.check_given({}, unknown, heads(S, dtype=dtype), unknown, known=False)


@pytest.mark.parametrize(
    ("attributes", "tensors", "message"),
    [
        ({}, [rows(L), rows(S)], "got 2 inputs, expected the 3 that its attributes name"),
        ({"packed": 3}, [rows(L, 3), rows(S)], "got 2 inputs, expected the 1 that"),
        ({}, [rows(L, dtype=F32)] * 3, "got q of float32, expected float16 or bfloat16"),
        ({}, [rows(L, dtype=OTHER)] * 3, "got q of another type, expected float16 or bfloat16"),
        ({}, [rows(L), rows(S), rows(S, dtype=BF16)], "got v of bfloat16 beside float16, expected one type"),
        (
            {},
            [tensor(F16, B, L, WIDTH + 1), rows(S), rows(S)],
            "got q of [2, 5, 49], expected [B, L, H·D] or [B, L, H, D] with H = 3 and D = 16: export the model again",
        ),
        ({}, [rows(L), heads(S, True), rows(S)], "got k of [2, 3, 7, 16], expected [B, L, H·D] or [B, L, H, D] with"),
        ({"v_layout": 1}, [rows(L), rows(S), rows(S)], "got v of [2, 7, 48], expected [B, H, L, D] with"),
        ({"packed": 2}, [rows(L), rows(S)], "got kv of [2, 7, 48], expected [B, S, 2·H·D] with"),
        ({"packed": 3}, [tensor(F16, B, L, 9, SIZE)], "got qkv of [2, 5, 9, 16], expected [B, L, 3·H·D] with"),
        ({}, [rows(L), rows(S), rows(S + 1)], "got k of [2, 7, 48] and v of [2, 8, 48], expected as many rows of both"),
        (
            {},
            [rows(L), tensor(F16, 1, S, WIDTH), rows(S)],
            "got k of [1, 7, 48] for q of [2, 5, 48], expected one batch",
        ),
        ({}, [rows(L), rows(0), rows(0)], "got k of [2, 0, 48], expected a row or more"),
    ],
)
def test_inputs_that_do_not_fit_are_named(attention, attributes, tensors, message):
    assert not attention.check_given(attributes, *tensors)
    assert attention.message.startswith(message)
    assert ": " in attention.message


# Wiring: which pointer goes where

SEPARATE = (0x10000000, 0x10010000, 0x10020000)


def strides(args: dict[str, Any], of: str) -> tuple[int, int, int]:
    return args[f"{of}_batch"], args[f"{of}_row"], args[f"{of}_head"]


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_separate_inputs(attention, dtype):
    (args,) = attention.launched({}, rows(L, dtype=dtype), heads(S, dtype=dtype), rows(S, dtype=dtype))
    assert (args["batch"], args["heads"], args["rows"], args["keys"], args["head_size"]) == (B, HEADS, L, S, SIZE)
    assert (args["q"], args["k"], args["v"], args["y"]) == (*SEPARATE, 0x20000000)
    assert strides(args, "q") == (L * WIDTH, WIDTH, SIZE)
    assert strides(args, "k") == strides(args, "v") == (S * WIDTH, WIDTH, SIZE)
    assert (args["scale"], args["dtype"]) == (0.25, dtype)


def test_heads_before_rows(attention):
    attributes = {"q_layout": 1, "v_layout": 1}
    (args,) = attention.launched(attributes, heads(L, True), rows(S), heads(S, True))
    assert (args["rows"], args["keys"]) == (L, S)
    assert strides(args, "q") == (L * WIDTH, SIZE, L * SIZE)
    assert strides(args, "k") == (S * WIDTH, WIDTH, SIZE)
    assert strides(args, "v") == (S * WIDTH, SIZE, S * SIZE)


def test_keys_and_values_side_by_side(attention):
    (args,) = attention.launched({"packed": 2, "q_layout": 1}, heads(L, True), rows(S, 2))
    assert (args["q"], args["k"], args["v"]) == (SEPARATE[0], SEPARATE[1], SEPARATE[1] + 2 * WIDTH)
    assert (args["rows"], args["keys"]) == (L, S)
    assert strides(args, "q") == (L * WIDTH, SIZE, L * SIZE)
    assert strides(args, "k") == strides(args, "v") == (S * 2 * WIDTH, 2 * WIDTH, SIZE)


def test_all_side_by_side(attention):
    (args,) = attention.launched({"packed": 3}, rows(L, 3))
    assert (args["q"], args["k"], args["v"]) == tuple(SEPARATE[0] + 2 * part * WIDTH for part in range(3))
    assert (args["rows"], args["keys"]) == (L, L)
    assert all(strides(args, of) == (L * 3 * WIDTH, 3 * WIDTH, SIZE) for of in "qkv")


@pytest.mark.parametrize("q", [tensor(F16, 0, L, WIDTH), tensor(F16, B, 0, WIDTH)], ids=["batch", "rows"])
def test_no_queries_launch_nothing(attention, q):
    keys = tensor(F16, q.dims[0], S, WIDTH)
    assert attention.launched({}, q, keys, keys) == []


def test_the_kernels_refusal_is_passed_on(attention):
    attention.library.fake_reset(b"attention", int(cuda.Status.OK))
    with pytest.raises(AssertionError, match="got arguments that no kernel takes"):
        attention.launched({"packed": 3}, rows(L, 3))
    attention.library.fake_reset(b"", 0)
