"""The LowBitLinear plugin's library: found, checked against this TensorRT before it is loaded, and loaded once."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvdit.contract import QvditError
from qvdit.contract.files import sha256
from qvdit.runtimes.tensorrt import versions

VARIABLE = "QVDIT_TENSORRT_PLUGIN"  # names the library's file
LIBRARY = "libqvdit_tensorrt.so"
NAME, VERSION = "LowBitLinear", "4"
NODES = (NAME, "HeadwiseAttention", "GatedResidual")
_RUNTIMES = Path(__file__).parents[1]
_PLACES = (_RUNTIMES / "lib" / LIBRARY, _RUNTIMES.parent / "build" / "kernels" / LIBRARY)
_BUILD = f"cmake -S {_RUNTIMES / 'csrc'} -B build/kernels -DQVDIT_TENSORRT_INCLUDE=… && cmake --build build/kernels"
_BUILT_FOR = re.compile(rb"qvdit LowBitLinear (\d+) for TensorRT (\d+\.\d+\.\d+)\0")  # kBuiltFor of csrc/tensorrt


@dataclass(frozen=True)
class PluginLibrary:
    """A library, by what its file says of itself."""

    path: Path
    version: str  # of the node's attributes and of what an engine keeps of it
    tensorrt: str  # whose headers it was compiled against
    sha256: str


def find_library(named: Path | None = None, beside: Path | None = None) -> PluginLibrary:
    """The library: the one named, what QVDIT_TENSORRT_PLUGIN names, in folder ``beside``, or where builds leave it."""
    if named is None and (variable := os.environ.get(VARIABLE)):
        named = Path(variable)
    places = [named] if named else [*([beside / LIBRARY] if beside else []), *_PLACES]
    for place in places:
        if place.is_file():
            return inspect_library(place)
    folders = " or ".join(str(place.parent) for place in places)
    raise QvditError(
        f"no file {named}" if named else f"no plugin {LIBRARY} in {folders}",
        "TensorRT's LowBitLinear plugin",
        f"build it: {_BUILD}; or name it by {VARIABLE}",
    )


def inspect_library(path: Path) -> PluginLibrary:
    """What a library's file says of itself; nothing is loaded."""
    with path.open("rb") as file:
        empty = path.stat().st_size == 0
        found = None if empty else _BUILT_FOR.search(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if found is None:
            raise QvditError(f"{path}", "a build of the LowBitLinear plugin", f"build it: {_BUILD}")
        version, built_for = found[1].decode(), found[2].decode()
    return PluginLibrary(path, version, built_for, sha256(path))


def check_library(library: PluginLibrary, trt: Any) -> None:
    """Refuse a library for another TensorRT: loaded, it would not be found, or would crash."""
    if library.version != VERSION:
        raise QvditError(
            f"{library.path}, version {library.version} of the plugin", f"version {VERSION}", f"build it: {_BUILD}"
        )
    built, here = (versions.numbers(text)[:1] for text in (library.tensorrt, trt.__version__))
    if built != here:
        raise QvditError(
            f"{library.path}, built for TensorRT {library.tensorrt}",
            f"a plugin for TensorRT {trt.__version__}",
            "build it with that version's headers (-DQVDIT_TENSORRT_INCLUDE)",
        )


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kept for good: TensorRT holds the creator


def load_library(library: PluginLibrary, logger: Any) -> None:
    """Load it, which registers the plugin. One process has one: another file of the same plugin is not looked at."""
    trt = versions.tensorrt()
    check_library(library, trt)
    trt.init_libnvinfer_plugins(logger, "")
    if versions.plugin_creator(trt, NAME, VERSION) is None:
        try:
            _load(library.path.resolve())
        except OSError as error:
            raise QvditError(
                f"{library.path} ({error})",
                f"a plugin that loads beside TensorRT {trt.__version__}",
                f"build it: {_BUILD}",
            ) from None
    if versions.plugin_creator(trt, NAME, VERSION) is None:
        raise QvditError(
            f"{library.path}, which registers no {NAME} with TensorRT {trt.__version__}",
            "a plugin for this TensorRT",
            f"build it with its headers: {_BUILD}",
        )


def is_needed(model: Path) -> bool:
    """Whether an ONNX file has nodes of the plugin."""
    with model.open("rb") as file:
        if model.stat().st_size == 0:
            return False
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(NAME.encode()) >= 0
