"""The plugin, compiled for the machine a bundle is for: with nvcc, and for another processor with its compiler.

CUDACXX names nvcc where it is not the one in PATH; QVDIT_TENSORRT_INCLUDES is a path list of TensorRT's include
folders, of which the device's version is taken; QVDIT_CUDART_AARCH64 names libcudart_static.a for aarch64 where nvcc's
own folders have none (the package nvidia-cuda-runtime has it, for aarch64).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic
from qvdit.export.devices import EdgeDevice

LIBRARY = "libqvdit_tensorrt.so"
COMPILER = "aarch64-linux-gnu-g++"


@dataclass(frozen=True)
class Toolchain:
    """What a plugin is compiled with."""

    nvcc: Path
    nvcc_version: str  # major and minor
    tensorrt: Path  # its include folder
    tensorrt_version: str  # major and minor
    architecture: str
    compiler: str | None  # for another processor than this one
    cudart: Path | None  # for another processor: libcudart_static.a

    def describe(self) -> str:
        """One line for the user."""
        return f"nvcc {self.nvcc_version}, sm_{self.architecture}, TensorRT {self.tensorrt_version}"


class MissingToolError(Exception):
    """Why no plugin is compiled here: one clause."""


def find_toolchain(device: EdgeDevice, own_architecture: str | None, own_machine: str) -> Toolchain:
    """The tools for a device; own_architecture: of this machine's GPU. MissingToolError says which is not there."""
    architecture = device.architecture or own_architecture
    if architecture is None:
        raise MissingToolError("no GPU here whose architecture to compile for")
    nvcc = _nvcc()
    version = _nvcc_version(nvcc)
    if device.cuda and int(version.split(".")[0]) > int(device.cuda.split(".")[0]):
        raise MissingToolError(
            f"nvcc {version} makes code for a newer driver than that of JetPack {device.jetpack}, which is CUDA "
            f"{device.cuda}'s: name an nvcc {device.cuda.split('.')[0]} by CUDACXX"
        )
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    if f"sm_{architecture.rstrip('a')}" not in known.split():  # it lists sm_90 for 90a
        raise MissingToolError(f"nvcc {version}, which does not know sm_{architecture}")
    include, found = _headers(device)
    if not shutil.which("cmake"):
        raise MissingToolError("no cmake")
    cross = device.machine != own_machine
    if cross and not shutil.which(COMPILER):
        raise MissingToolError(f"no {COMPILER}: on Debian and Ubuntu, apt install g++-aarch64-linux-gnu")
    return Toolchain(
        nvcc, version, include, found, architecture, COMPILER if cross else None, _cudart(nvcc) if cross else None
    )


def compile_plugin(toolchain: Toolchain, sources: Path, library: Path) -> None:
    """Build the plugin from ``sources``, runtimes/csrc, with its CMakeLists; QvditError where a compiler refuses."""
    with tempfile.TemporaryDirectory(prefix="qvdit-plugin-") as folder:
        build = Path(folder)
        _run(["cmake", "-S", str(sources), "-B", folder, *_options(toolchain, build)])
        _run(["cmake", "--build", folder, "--target", "qvdit_tensorrt", "--parallel", str(os.cpu_count() or 1)])
        write_atomic(library, partial(shutil.copyfile, build / LIBRARY))


def _options(toolchain: Toolchain, build: Path) -> list[str]:
    options = [
        f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
        f"-DQVDIT_ARCHITECTURES={toolchain.architecture}",
        f"-DQVDIT_TENSORRT_INCLUDE={toolchain.tensorrt.resolve()}",
    ]
    if toolchain.compiler is None:
        return options
    assert toolchain.cudart is not None
    # nvcc looks for another processor's toolkit, and for its runtime in order to try itself out; the headers are the
    # same for all processors, and of the libraries only the static runtime is used.
    headers = toolchain.nvcc.resolve().parents[1] / "include"
    file = build / "aarch64.cmake"
    file.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\n"
        f"set(CMAKE_CXX_COMPILER {toolchain.compiler})\nset(CMAKE_CUDA_HOST_COMPILER {toolchain.compiler})\n"
    )
    flags = f"-I{headers} -isystem {headers / 'cccl'} -L{toolchain.cudart.parent}"
    return [
        *options,
        f"-DCMAKE_TOOLCHAIN_FILE={file}",
        f"-DCMAKE_CUDA_FLAGS={flags}",
        f"-DCUDAToolkit_INCLUDE_DIR={headers}",
        f"-DCUDA_CUDART={toolchain.cudart}",
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line] or ["it does not say why"]
        raise QvditError(
            f"a plugin that does not compile ({' '.join(lines[0].split())})",
            "nvcc, a C++ compiler and TensorRT's headers that fit each other",
            "unset CUDACXX or QVDIT_TENSORRT_INCLUDES, and build.sh will compile it on the device",
        )


def _nvcc() -> Path:
    named = os.environ.get("CUDACXX")
    places = [named] if named else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        raise MissingToolError(f"no {named or 'nvcc'}")
    # What lies in PATH may be a script that calls it.
    told = subprocess.run(
        [found, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ _HERE_=(.*)$", told.stderr, re.MULTILINE)
    return Path(top[1]) / "nvcc" if top else Path(found)


def _nvcc_version(nvcc: Path) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    if found is None:
        raise MissingToolError(f"{nvcc}, which does not tell its version")
    return found[1]


def header_version(include: Path) -> str:
    """Major and minor of the TensorRT whose include folder this is; empty where it is none."""
    file = include / "NvInferVersion.h"
    text = file.read_text(errors="replace") if file.is_file() else ""
    found = [
        re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    return ".".join(match[1] for match in found if match)


def _headers(device: EdgeDevice) -> tuple[Path, str]:
    named = [Path(p) for p in os.environ.get("QVDIT_TENSORRT_INCLUDES", "").split(os.pathsep) if p]
    if not named:
        wanted = f" {device.tensorrt}" if device.tensorrt else ""
        raise MissingToolError(f"no headers of TensorRT{wanted}: name their folder by QVDIT_TENSORRT_INCLUDES")
    versions = {header_version(folder): folder for folder in named}
    if device.tensorrt is None:
        found = next((version for version in versions if version), None)
    else:
        found = device.tensorrt if device.tensorrt in versions else None
    if found is None:
        there = ", ".join(sorted(filter(None, versions))) or "none"
        wanted = f", not of {device.tensorrt}" if device.tensorrt else ""
        raise MissingToolError(f"QVDIT_TENSORRT_INCLUDES with headers of TensorRT {there}{wanted}")
    return versions[found], found


def _cudart(nvcc: Path) -> Path:
    named = os.environ.get("QVDIT_CUDART_AARCH64")
    top = nvcc.resolve().parents[1] / "targets"
    places = (
        [Path(named)]
        if named
        else [top / f"{name}-linux" / "lib" / "libcudart_static.a" for name in ("aarch64", "sbsa")]
    )
    for place in places:
        if place.is_file():
            return place.resolve()
    raise MissingToolError(
        f"no {named}"
        if named
        else "no libcudart_static.a for aarch64: name the one of the package nvidia-cuda-runtime "
        "by QVDIT_CUDART_AARCH64"
    )
