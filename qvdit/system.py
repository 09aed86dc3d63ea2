"""What this machine has: versions of the tools, and what is missing for each target."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOOLS = (
    "qvdit",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "nvidia-modelopt",
    "numpy",
    "safetensors",
)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle."""
    return {name: found for name in TOOLS if (found := _version(name)) is not None}


def cpu_name() -> str:
    """The processor's model, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def missing_for_tensorrt(with_plugin: bool = True) -> str | None:
    """What keeps this machine from building a TensorRT engine, or None."""
    from qvdit.contract import QvditError
    from qvdit.runtimes.tensorrt import device, plugin, versions

    try:
        module = versions.tensorrt()
        device.driver()
        if with_plugin:
            plugin.check_library(plugin.find_library(), module)
    except QvditError as error:
        return error.got
    return None


def tensorrt_parts() -> list[str]:
    """TensorRT's version and the plugin's file, as far as they are here; no line for what is not."""
    from qvdit.contract import QvditError
    from qvdit.runtimes.tensorrt import plugin, versions

    found = []
    with contextlib.suppress(QvditError):
        found.append(f"tensorrt {versions.tensorrt().__version__}")
    with contextlib.suppress(QvditError):
        library = plugin.find_library()
        found.append(f"tensorrt plugin {library.path}, version {library.version} for TensorRT {library.tensorrt}")
    return found


def edge_tools() -> dict[str, str]:
    """What compiles the plugin for each Jetson here, or why nothing does: it goes along as sources then."""
    from qvdit.export.cross import MissingToolError, find_toolchain
    from qvdit.export.devices import find_device

    found = {}
    for device in map(find_device, ("orin", "thor")):
        try:
            tools = find_toolchain(device, None, platform.machine()).describe()
        except MissingToolError as reason:
            tools = f"not compiled here: {reason}"
        found[f"{device.title}, JetPack {device.jetpack}"] = tools
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
