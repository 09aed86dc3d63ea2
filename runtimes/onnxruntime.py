"""ONNX Runtime on the CPU: the runtime that runs anywhere."""

from __future__ import annotations

import platform
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

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


def session(model: bytes | Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An inference session on the CPU for a serialized model or a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # A thread that waits spins for 100 µs, then sleeps. Two that spin for longer may come to share a core where
    # something else runs, and stay there, since the scheduler moves threads as they wake: 300 ms a forward pass of
    # wan-shapes on two cores in place of 172. Threads that never spin take 186.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    # Older versions do not know that: there, at least, nobody spins once a run is over.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if saturates():
        # u8 x u8 for 8-bit weights: slower, exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        name = "the model" if isinstance(model, bytes) else str(model)
        text = " ".join(str(error).split())
        raise QvditError(
            f"{name}, which ONNX Runtime refuses ({text})", "a model it can run", "export it again"
        ) from None


class OnnxRuntimeSession:
    """Runs one ONNX file; a context manager, though nothing breaks without ``with``."""

    def __init__(self, path: Path, threads: int | None = None):
        _engine()
        self.path = path
        self._session = session(path, threads)
        self.inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}

    def infer(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Run the model: inputs by diffusers' names → its output. Refuses wrong names and fixed sizes in one line."""
        if set(inputs) != set(self.inputs):
            raise QvditError(f"inputs {sorted(inputs)}", f"{sorted(self.inputs)}", "pass exactly these")
        feed = {}
        sizes: dict[str, int] = {}  # of the named dimensions: one name, one size
        for name, (kind, shape) in self.inputs.items():
            value = np.asarray(inputs[name])
            known = [sizes.get(d, d) for d in shape]
            if not _fits(value.shape, known):
                raise QvditError(f"{name} of shape {value.shape}", f"{tuple(known)}", "export with this size")
            sizes |= {d: s for d, s in zip(shape, value.shape, strict=True) if isinstance(d, str)}
            feed[name] = np.asarray(value, dtype=_DTYPES[kind], order="C")
        return self.infer_impl(feed)

    def infer_impl(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """Run without checks."""
        try:
            return self._session.run(None, feed)[0]
        except Exception as error:  # onnxruntime raises its own classes, without a common base
            shapes = {name: value.shape for name, value in feed.items()}
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
