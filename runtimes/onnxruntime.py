"""ONNX Runtime: on the CPU the runtime that runs anywhere, on a GPU its CUDA provider."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from qvdit.contract import QvditError

if TYPE_CHECKING:
    import onnxruntime


def _engine() -> object:
    try:
        import onnxruntime
    except ImportError:
        raise QvditError("no onnxruntime", "the package onnxruntime", "pip install onnxruntime") from None
    return onnxruntime


def saturates() -> bool:
    """Whether this CPU's u8 x s8 products saturate: x86 without VNNI adds pairs of them in 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.is_file() or "vnni" not in cpuinfo.read_text(errors="replace")


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """What every session here runs with: threads that sleep while they wait, and exact products."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # A thread that waits spins for 100 µs, then sleeps. Two that spin for longer may come to share a core where
    # something else runs, and stay there, since the scheduler moves threads as they wake: 300 ms a forward pass of
    # wan-shapes on two cores in place of 172. Threads that never spin take 186.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    # Older versions do not know that: there, at least, nobody spins once a run is over.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if saturates():
        # u8 x u8 for 8-bit weights: slower, exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def session(
    model: bytes | Path,
    threads: int | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    soon: bool = False,
) -> onnxruntime.InferenceSession:
    """An inference session for a serialized model or a file, on the CPU or on a GPU: ``cuda`` or ``cuda:N``.

    folder: where the external weights of a serialized model lie. soon: run small readers of a large value before what
    comes after it, so that it is not kept. Bodies must be signed for a GPU, or they run on the CPU:
    :mod:`qvdit.runtimes.signed`.
    """
    import onnxruntime

    options = session_options(threads)
    options.log_severity_level = 3 if device == "cpu" or os.environ.get("QVDIT_DEBUG") else 4
    if soon:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    source = model if isinstance(model, bytes) else str(model)
    try:
        if device == "cpu":
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        from qvdit.runtimes.onnxruntime_cuda import cuda_session

        return cuda_session(source, options, device)
    except QvditError:
        raise
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        name = "the model" if isinstance(model, bytes) else str(model)
        _refuse_no_room(error, device, name)
        text = " ".join(str(error).split())
        raise QvditError(
            f"{name}, which ONNX Runtime refuses ({text})", "a model it can run", "export it again"
        ) from None


def _refuse_no_room(error: Exception, device: str, what: str) -> None:
    if device != "cpu":
        from qvdit.runtimes.onnxruntime_cuda import refuse_no_room

        refuse_no_room(error, device, what)


def _signed(path: Path) -> bytes:
    try:
        from qvdit.runtimes.signed import signed_model
    except ImportError:
        raise QvditError(
            "no onnx", "the package onnx, to make the model's integers signed for a GPU", "pip install onnx"
        ) from None
    return signed_model(path).SerializeToString()


class OnnxRuntimeSession:
    """Runs one ONNX file; a context manager, though nothing breaks without ``with``."""

    def __init__(self, path: Path, threads: int | None = None, device: str = "cpu"):
        _engine()
        self.path, self.device = path, device
        if device == "cpu":
            self._session = session(path, threads)
        else:
            self._session = session(_signed(path), threads, device, path.parent)
        self.inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}

    def infer(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model: inputs by diffusers' names → its output. Refuses wrong names and fixed sizes in one line.

        Numpy arrays give an array; PyTorch's CUDA tensors, which a session on a GPU takes, a tensor on that GPU.
        """
        if set(inputs) != set(self.inputs):
            raise QvditError(f"inputs {sorted(inputs)}", f"{sorted(self.inputs)}", "pass exactly these")
        sizes: dict[str, int] = {}  # of the named dimensions: one name, one size
        for name, (_, shape) in self.inputs.items():
            found = tuple(np.shape(inputs[name]))
            known = [sizes.get(d, d) for d in shape]
            if not _fits(found, known):
                raise QvditError(f"{name} of shape {found}", f"{tuple(known)}", "export with this size")
            sizes |= {d: s for d, s in zip(shape, found, strict=True) if isinstance(d, str)}
        return self.infer_impl(inputs)

    def infer_impl(self, inputs: Mapping[str, Any]) -> Any:
        """Run without checks."""
        kinds = {name: _DTYPES[kind] for name, (kind, _) in self.inputs.items()}
        try:
            if any(getattr(value, "is_cuda", False) for value in inputs.values()):
                from qvdit.runtimes.onnxruntime_cuda import infer_torch

                return infer_torch(self._session, inputs, kinds, self.device)
            feed = {name: np.asarray(inputs[name], dtype=kind, order="C") for name, kind in kinds.items()}
            return self._session.run(None, feed)[0]
        except Exception as error:  # onnxruntime raises its own classes, without a common base
            shapes = {name: tuple(np.shape(value)) for name, value in inputs.items()}
            _refuse_no_room(error, self.device, f"inputs of shapes {shapes}")
            text = " ".join(str(error).split())
            raise QvditError(
                f"inputs of shapes {shapes}, which {self.path} refuses ({text})",
                "sizes it can compute",
                "see that height and width are multiples of the patch size",
            ) from None

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session


def _fits(shape: tuple[int, ...], expected: list[int | str]) -> bool:
    """Whether a shape is the one expected, names standing for any size."""
    return len(shape) == len(expected) and all(
        isinstance(d, str) or d == s for d, s in zip(expected, shape, strict=True)
    )


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
