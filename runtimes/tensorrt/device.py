"""The GPU through CUDA's driver library: memory, copies, a stream, graphs. It is there wherever a driver is.

Addresses and handles are integers, as TensorRT and PyTorch give and take them.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qvdit.contract import QvditError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit order with the legacy stream
_CAPTURE_THREAD_LOCAL = 1  # other threads may allocate meanwhile
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t


class OutOfMemoryError(QvditError):
    """The GPU has less free memory than was asked for."""


@dataclass(frozen=True)
class Gpu:
    """What an engine depends on."""

    name: str
    compute: str  # "9.0"
    memory: int  # bytes in all
    driver: str


class Driver:
    """The driver library, and one function for each of its functions that is used here."""

    def __init__(self, library: Any):
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; its error becomes a QvditError."""
        status = getattr(self._library, name)(*arguments)
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {status}"
        if status == _OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"{name}: {said}",
                "enough free GPU memory",
                "end other programs on this GPU, or use a smaller video size",
            )
        raise QvditError(f"{name}: {said}", "a working CUDA device", "see that nvidia-smi lists one")

    def integer(self, name: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        """A function's first output, an integer."""
        value = kind()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value or 0


@functools.cache
def driver() -> Driver:
    """The driver, initialized."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise QvditError(
            "no GPU (no libcuda.so.1)", "an NVIDIA GPU and its driver", "run it where there is one"
        ) from None
    found = Driver(library)
    try:
        found.call("cuInit", 0)
        count = found.integer("cuDeviceGetCount")
    except QvditError as error:
        raise QvditError(f"no GPU ({error.got})", "an NVIDIA GPU that works", "see that nvidia-smi lists one") from None
    if count == 0:
        raise QvditError("no GPU", "an NVIDIA GPU", "run it where there is one")
    return found


class Device:
    """One GPU, made current for this thread: its primary context, which TensorRT and PyTorch use as well."""

    def __init__(self, index: int = 0):
        self.driver, self.index = driver(), index
        count = self.driver.integer("cuDeviceGetCount")
        if not 0 <= index < count:
            raise QvditError(f"device cuda:{index}", f"one of the {count} GPUs here", "choose another one")
        self._device = ctypes.c_int(self.driver.integer("cuDeviceGet", index))
        self._context = _pointer(self.driver.integer("cuDevicePrimaryCtxRetain", self._device, kind=_pointer))
        self.make_current()

    def make_current(self) -> None:
        """Make it the current device of the calling thread."""
        self.driver.call("cuCtxSetCurrent", self._context)

    def facts(self) -> Gpu:
        """Name, compute capability, memory and driver."""
        name = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", name, 256, self._device)
        major, minor = (
            self.driver.integer("cuDeviceGetAttribute", attribute, self._device)
            for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR)
        )
        memory = self.driver.integer("cuDeviceTotalMem_v2", self._device, kind=_size)
        return Gpu(name.value.decode(), f"{major}.{minor}", memory, self._driver_version())

    def _driver_version(self) -> str:
        listed = Path("/proc/driver/nvidia/version")
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", listed.read_text()) if listed.is_file() else None
        if found:
            return found.group()
        version = self.driver.integer("cuDriverGetVersion")  # a Jetson's driver comes with its system
        return f"CUDA {version // 1000}.{version % 1000 // 10}, {platform.release()}"

    def free_memory(self) -> int:
        """Bytes that are free now."""
        free, total = _size(), _size()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def close(self) -> None:
        """Give the primary context back."""
        self.driver.call("cuDevicePrimaryCtxRelease_v2", self._device)


class Buffer:
    """Device memory that grows when more is asked for; its address changes then."""

    def __init__(self, device: Device):
        self._driver = device.driver
        self.address, self.size = 0, 0

    def reserve(self, size: int) -> int:
        """An address with room for ``size`` bytes."""
        if size > self.size:
            self.free()
            self.address = self._driver.integer("cuMemAlloc_v2", _size(size), kind=_pointer)
            self.size = size
        return self.address

    def free(self) -> None:
        """Give the memory back."""
        if self.address:
            self._driver.call("cuMemFree_v2", _pointer(self.address))
        self.address, self.size = 0, 0


class Stream:
    """A stream of work, with its copies, events and graphs. A context manager."""

    def __init__(self, device: Device):
        self._driver = device.driver
        self.handle = self._driver.integer("cuStreamCreate", _NON_BLOCKING, kind=_pointer)
        self._event = self._driver.integer("cuEventCreate", _NO_TIMING, kind=_pointer)

    def upload(self, array: np.ndarray, address: int) -> None:
        """Copy a contiguous array to the device; it may be reused at once (pageable memory is staged)."""
        self._driver.call(
            "cuMemcpyHtoDAsync_v2", _pointer(address), _pointer(array.ctypes.data), _size(array.nbytes), self._ptr
        )

    def download(self, address: int, array: np.ndarray) -> None:
        """Copy from the device into a contiguous array, which is valid after :meth:`synchronize`."""
        self._driver.call(
            "cuMemcpyDtoHAsync_v2", _pointer(array.ctypes.data), _pointer(address), _size(array.nbytes), self._ptr
        )

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy on the device."""
        self._driver.call("cuMemcpyDtoDAsync_v2", _pointer(target), _pointer(source), _size(size), self._ptr)

    def synchronize(self) -> None:
        """Wait for everything on it."""
        self._driver.call("cuStreamSynchronize", self._ptr)

    def wait_for(self, other: int) -> None:
        """Let what comes next here wait for what is on another stream now."""
        self._driver.call("cuEventRecord", _pointer(self._event), _pointer(other))
        self._driver.call("cuStreamWaitEvent", self._ptr, _pointer(self._event), 0)

    def precede(self, other: int) -> None:
        """Let what comes next on another stream wait for what is here now."""
        self._driver.call("cuEventRecord", _pointer(self._event), self._ptr)
        self._driver.call("cuStreamWaitEvent", _pointer(other), _pointer(self._event), 0)

    def capture(self, work: Callable[[], None]) -> int:
        """Record what ``work`` starts on this stream as an executable graph; returns its handle."""
        graph, executable = _pointer(), _pointer()
        self._driver.call("cuStreamBeginCapture_v2", self._ptr, _CAPTURE_THREAD_LOCAL)
        try:
            work()
        finally:  # a stream must not be left capturing
            self._driver.call("cuStreamEndCapture", self._ptr, ctypes.byref(graph))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._driver.call("cuGraphDestroy", graph)
        return executable.value or 0

    def discard(self, graph: int) -> None:
        """Free a graph."""
        self._driver.call("cuGraphExecDestroy", _pointer(graph))

    def launch(self, graph: int) -> None:
        """Start a graph."""
        self._driver.call("cuGraphLaunch", _pointer(graph), self._ptr)

    @property
    def _ptr(self) -> ctypes.c_void_p:
        return _pointer(self.handle)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Destroy it."""
        if self.handle:
            self._driver.call("cuEventDestroy_v2", _pointer(self._event))
            self._driver.call("cuStreamDestroy_v2", self._ptr)
            self.handle = 0
