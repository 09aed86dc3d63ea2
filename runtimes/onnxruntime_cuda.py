"""ONNX Runtime's CUDA provider: sessions that are on the GPU or refused, and PyTorch's tensors without copies."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from qvdit.contract import QvditError
from qvdit.runtimes.tensorrt.device import Device, OutOfMemoryError

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
_LIBRARIES = ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")
_WARNING, _FATAL = 2, 4  # severities of its log; the first is its default
_NO_ROOM = re.compile(r"out of memory|failed to allocate memory|ALLOC_FAILED", re.IGNORECASE)


def index_of(device: str) -> int:
    """N of ``cuda:N``; 0 of ``cuda``."""
    return int(device.partition(":")[2] or 0)


def cuda_session(model: bytes | str, options: onnxruntime.SessionOptions, device: str) -> onnxruntime.InferenceSession:
    """A session on one GPU. QvditError where there is none, or where ONNX Runtime would quietly take the CPU."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise QvditError(
            f"onnxruntime {onnxruntime.__version__}, which has no CUDA provider",
            "the package onnxruntime-gpu in its place",
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu",
        )
    Device(index_of(device))  # which says what is wrong with the GPU, if anything is
    _preload(onnxruntime)
    chosen = {
        "device_id": str(index_of(device)),
        "use_tf32": "0",  # float32 means float32
        "cudnn_conv_algo_search": "HEURISTIC",  # not by timing: the same algorithm each time
    }
    with _quiet(onnxruntime):
        made = onnxruntime.InferenceSession(
            model, options, providers=[(PROVIDER, chosen), "CPUExecutionProvider"], enable_fallback=0
        )
    if PROVIDER not in made.get_providers():
        raise QvditError(
            f"a CUDA provider that does not load ({_why(onnxruntime)})",
            "the CUDA and cuDNN libraries that it was built with",
            "pip install 'onnxruntime-gpu[cuda,cudnn]', or a PyTorch for the same CUDA",
        )
    return made


def _preload(onnxruntime: ModuleType) -> None:
    """Load the CUDA libraries that come as Python packages, with PyTorch for example, wherever those are."""
    if not hasattr(onnxruntime, "preload_dlls"):
        return
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()  # beside onnxruntime, and where the system looks
        for folder in sorted(folder for root in roots for folder in root.glob("*/lib")):
            onnxruntime.preload_dlls(directory=str(folder))


@contextlib.contextmanager
def _quiet(onnxruntime: ModuleType) -> Iterator[None]:
    """Without its own words about a library that does not load, which a session's options do not reach."""
    if os.environ.get("QVDIT_DEBUG"):
        yield
        return
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _why(onnxruntime: ModuleType) -> str:
    """Why the provider's library did not load, in the loader's words.

    Only for a library that ONNX Runtime could not load: loaded by us first, it would never learn who its host is.
    """
    folder = Path(onnxruntime.__file__ or "").parent / "capi"
    try:
        for name in _LIBRARIES:
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL("libcudnn.so.9")  # which it opens when it starts
    except OSError as error:
        return str(error)
    return "QVDIT_DEBUG=1 shows what ONNX Runtime says"


def refuse_no_room(error: Exception, device: str, what: str) -> None:
    """Raise OutOfMemoryError if that is what an error of ONNX Runtime says."""
    if device != "cpu" and _NO_ROOM.search(str(error)):
        free = Device(index_of(device)).free_memory()
        raise OutOfMemoryError(
            f"no room on {device} for {what}",
            f"enough free GPU memory; {free:,} bytes are free beside what this session holds",
            "end other programs on this GPU, or use a smaller video or batch",
        ) from None


def infer_torch(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Any], kinds: Mapping[str, Any], device: str
) -> Any:
    """Run on PyTorch's CUDA tensors, by name; kinds: numpy's dtype of each. The output is a tensor on the GPU."""
    torch = sys.modules["torch"]
    index = index_of(device)
    place = torch.device("cuda", index)
    tensors = {
        name: value.detach().to(place, getattr(torch, np.dtype(kinds[name]).name)).contiguous()
        for name, value in inputs.items()
    }
    binding = session.io_binding()
    for name, tensor in tensors.items():
        binding.bind_input(name, "cuda", index, kinds[name], tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cuda", index)
    torch.cuda.current_stream(place).synchronize()  # ONNX Runtime has a stream of its own, and waits for it at the end
    session.run_with_iobinding(binding)
    (value,) = binding.get_outputs()
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    return torch.from_numpy(value.numpy()).to(place)
