"""The machines that a bundle is made for: which TensorRT and CUDA they have, and which code their GPU runs."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from qvdit.contract import QvditError


@dataclass(frozen=True)
class EdgeDevice:
    """One machine with one software."""

    name: str  # orin, thor or local
    title: str
    machine: str  # aarch64 or x86_64
    jetpack: str | None  # NVIDIA's software for Jetsons
    tensorrt: str | None  # major and minor; None: whatever is found
    cuda: str | None  # major and minor of its driver; None: this machine's
    architecture: str | None  # of its GPU, as nvcc counts; None: this machine's


# The newest of a device last. Versions: docs.nvidia.com/jetson/jetpack, release notes of 6.0, 6.1, 6.2 and 7.0.
_JETSONS = (
    EdgeDevice("orin", "Jetson Orin", "aarch64", "6.0", "8.6", "12.2", "87"),
    EdgeDevice("orin", "Jetson Orin", "aarch64", "6.1", "10.3", "12.6", "87"),
    EdgeDevice("orin", "Jetson Orin", "aarch64", "6.2", "10.3", "12.6", "87"),
    EdgeDevice("thor", "Jetson Thor", "aarch64", "7.0", "10.13", "13.0", "110"),
)
NAMES = ("orin", "thor", "local")


def find_device(name: str, jetpack: str | None = None) -> EdgeDevice:
    """A machine by its name; of a Jetson, with the newest JetPack that is known unless one is named."""
    if name not in NAMES:
        raise QvditError(
            f"--device {name!r}",
            f"{', '.join(NAMES)}: the machine that the bundle is for",
            "check --device; --compute chooses where calibration runs",
        )
    known = {device.jetpack: device for device in _JETSONS if device.name == name}
    if jetpack is None:
        return list(known.values())[-1] if known else _local()
    if jetpack not in known:
        expected = f"one of {', '.join(map(str, known))}" if known else "none: this machine is no Jetson to be named"
        raise QvditError(f"--jetpack {jetpack!r} with --device {name}", expected, "check --jetpack")
    return known[jetpack]


def _local() -> EdgeDevice:
    return EdgeDevice("local", "this machine", platform.machine(), None, None, None, None)
