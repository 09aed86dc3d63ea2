"""The TensorRT plugin's residual sum, without TensorRT and without a GPU: its kernel is a stub that keeps arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from test_tensorrt_core import BF16, F16, F32, OTHER, RESIDUAL, Core, Tensor, addresses, core_library, tensor

from qvdit.runtimes import cuda

__all__ = ["core_library"]  # a fixture

B, L, K = 6, 5, 24
GATED = (tensor(F32, B, L, K), tensor(F16, B, L, K), tensor(F32, B, 1, K))


class Residual(Core):
    """The residual sum's core and its kernel's records."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.library.residual_field_name.restype = ctypes.c_char_p

    def fields(self) -> list[str]:
        return [self.library.residual_field_name(i).decode() for i in range(self.library.residual_field_count())]

    def validated(self, **changes: int) -> Any | None:
        """Attributes as an array; None if they are refused."""
        values = (ctypes.c_int32 * len(RESIDUAL))(*(RESIDUAL | changes).values())
        return values if self.ask("residual_validate", values) else None

    def restored(self, blob: bytes) -> list[int] | None:
        values = (ctypes.c_int32 * len(RESIDUAL))()
        data = ctypes.create_string_buffer(blob, len(blob)) if blob else None
        return list(values) if self.ask("residual_deserialize", data, ctypes.c_int64(len(blob)), values) else None

    def check_given(self, attributes: dict[str, int], *tensors: Tensor, known: bool = True) -> bool:
        given = (Tensor * len(tensors))(*tensors)
        return self.ask("residual_check", self.validated(**attributes), given, len(tensors), known)

    def launched(self, attributes: dict[str, int], *tensors: Tensor) -> list[dict[str, Any]]:
        """The launches' arguments on made-up addresses."""
        given, inputs, outputs = (Tensor * len(tensors))(*tensors), addresses(3, 0x10000000), addresses(1, 0x20000000)
        done = self.ask("residual_run", self.validated(**attributes), given, inputs, outputs, ctypes.c_void_p(0x77))
        assert done, self.message
        count = self.library.fake_count()
        assert all(self.library.fake_name(i) == b"residual" for i in range(count))
        assert all(self.library.fake_stream(i) == 0x77 for i in range(count))
        made = [cuda.GatedResidualArgs.from_address(self.library.fake_args(i)) for i in range(count)]
        return [{name: getattr(args, name) for name, *_ in cuda.GatedResidualArgs._fields_} for args in made]


@pytest.fixture
def residual(core_library: Path) -> Residual:
    return Residual(core_library)


def test_the_attributes_are_those_of_the_export(residual):
    assert residual.fields() == list(RESIDUAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": 2}, "got gated 2, expected 0 or 1: export the model again"),
        ({"swapped": -1}, "got swapped -1, expected 0 or more: export the model again"),
    ],
)
def test_attributes_that_are_no_node_s_are_refused(residual, changes, message):
    assert residual.validated(**changes) is None
    assert residual.message == message


def test_an_engine_keeps_the_attributes_and_refuses_damage(residual):
    blob = ctypes.create_string_buffer(residual.library.residual_blob_bytes())
    residual.library.residual_serialize(residual.validated(swapped=3), blob)
    assert residual.restored(blob.raw) == [1, 3]
    for bit in range(8 * len(blob.raw)):
        damaged = bytearray(blob.raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert residual.restored(bytes(damaged)) is None, bit
    assert residual.restored(b"") is None


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_well_formed_inputs_are_taken(residual, dtype):
    whole, x = tensor(F32, B, L, K), tensor(dtype, B, L, K)
    assert residual.check_given({"gated": 0}, whole, x)
    assert residual.check_given({}, whole, x, tensor(F32, B, 1, K))
    assert residual.check_given({}, whole, x, tensor(F32, 1, 1, K))
    assert residual.check_given({"swapped": 3}, whole, x, tensor(F32, B, 1, K))
    unknown = tensor(F32, -1, -1, K)
    assert residual.check_given({"swapped": 3}, unknown, x, tensor(F32, -1, 1, K), known=False)


@pytest.mark.parametrize(
    ("attributes", "tensors", "message"),
    [
        ({}, GATED[:2], "got 2 inputs, expected the 3 that its attributes name: export"),
        ({"gated": 0}, GATED, "got 3 inputs, expected the 2 that its attributes name: export"),
        ({}, [tensor(F16, B, L, K), *GATED[1:]], "got residual of float16, expected float32: export"),
        ({}, [GATED[0], tensor(F32, B, L, K), GATED[2]], "got x of float32, expected float16 or bfloat16: export"),
        ({}, [*GATED[:2], tensor(OTHER, B, 1, K)], "got gate of another type, expected float32: export"),
        (
            {},
            [tensor(F32, 1, L, K), *GATED[1:]],
            "got x of [6, 5, 24] for a residual of [1, 5, 24], expected [B, L",
        ),
        ({}, [tensor(F32, L, K), *GATED[1:]], "got residual of [5, 24] for a residual of [5, 24], expected [B, L, K]"),
        (
            {},
            [*GATED[:2], tensor(F32, 2, 1, K)],
            "got gate of [2, 1, 24] for a residual of [6, 5, 24], expected [B, 1, K] or [1, 1, K] for [B, L, K]: ",
        ),
        ({}, [*GATED[:2], tensor(F32, B, L, K)], "got gate of [6, 5, 24] for a residual of [6, 5, 24], expected [B, 1"),
        ({"swapped": 4}, GATED, "got a residual of [6, 5, 24], expected [B · 4, L, K]: give it a video of the size"),
    ],
)
def test_inputs_that_do_not_fit_are_named(residual, attributes, tensors, message):
    assert not residual.check_given(attributes, *tensors)
    assert residual.message.startswith(message)


def test_more_rows_than_the_kernel_counts_are_refused(residual):
    many = [tensor(F32, 1 << 20, 1 << 12, K), tensor(F16, 1 << 20, 1 << 12, K)]
    assert not residual.check_given({"gated": 0}, *many)
    assert "expected less than 2147483647 rows: lower the batch" in residual.message


# Wiring: which pointer goes where


def test_what_the_kernel_is_given(residual):
    (args,) = residual.launched({}, *GATED)
    pointers = {name: args[name] for name in ("residual", "x", "gate", "y")}
    assert pointers == {"residual": 0x10000000, "x": 0x10010000, "gate": 0x10020000, "y": 0x20000000}
    assert (args["m"], args["k"], args["x_dtype"], args["rows_per_gate"]) == (B * L, K, F16, L)
    assert (args["swapped"], args["swapped_inner"]) == (0, 0)


def test_one_gate_for_all_and_none(residual):
    (args,) = residual.launched({}, *GATED[:2], tensor(F32, 1, 1, K))
    assert args["rows_per_gate"] == B * L
    residual.library.fake_reset(b"", 0)
    (args,) = residual.launched({"gated": 0}, tensor(F32, B, L, K), tensor(BF16, B, L, K))
    assert (args["gate"], args["rows_per_gate"], args["x_dtype"]) == (None, 0, BF16)


def test_swapped_axes(residual):
    (args,) = residual.launched({"swapped": 3}, *GATED)
    assert (args["swapped"], args["swapped_inner"]) == (3, L)


@pytest.mark.parametrize("shape", [(0, L, K), (B, 0, K)])
def test_no_rows_launch_nothing(residual, shape):
    assert residual.launched({"gated": 0}, tensor(F32, *shape), tensor(F16, *shape)) == []


def test_the_kernels_refusal_is_passed_on(residual):
    residual.library.fake_reset(b"residual", int(cuda.Status.OK))
    with pytest.raises(AssertionError, match="got arguments that no kernel takes"):
        residual.launched({}, *GATED)
    residual.library.fake_reset(b"", 0)
