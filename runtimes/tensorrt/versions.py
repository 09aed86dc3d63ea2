"""What differs between the TensorRT versions that build and run engines, each difference named once.

8.6 (JetPack 6.0) knows weakly typed networks only: every layer is given the precision that the graph's own Casts imply.
10.x (JetPack 6.1, 7; servers) has strongly typed networks; 11 has nothing else, and no precision flags.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

from qvdit.contract import QvditError

OLDEST = (8, 6)  # tensor names in the runtime API are from 8.5, IPluginV2DynamicExt as built is 8.6's


@functools.cache
def tensorrt() -> Any:
    """The module tensorrt; QvditError where it is missing, broken or too old."""
    try:
        import tensorrt as module

        if not hasattr(module, "__version__"):  # a folder of that name on the path
            raise ImportError("no package", name="tensorrt")
    except ImportError as error:
        missing = "no TensorRT" if error.name == "tensorrt" else f"a TensorRT that does not load ({error})"
        raise QvditError(
            f"{missing} (Python package tensorrt)",
            "TensorRT 8.6 or newer",
            "pip install tensorrt, or on a Jetson: apt install tensorrt python3-libnvinfer",
        ) from None
    if numbers(module.__version__) < OLDEST:
        raise QvditError(f"TensorRT {module.__version__}", "8.6 or newer", "install a newer one")
    return module


def numbers(version: str) -> tuple[int, ...]:
    """'10.3.0.26' → (10, 3, 0, 26)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def strongly_typed(trt: Any) -> bool:
    """Whether networks are typed by their graph alone."""
    return numbers(trt.__version__) >= (10,)


# Building ------------------------------------------------------------------------------------------------------------


def create_network(trt: Any, builder: Any) -> Any:
    """A network with explicit batch, strongly typed where that exists."""
    flags = trt.NetworkDefinitionCreationFlag
    chosen = 0
    if strongly_typed(trt):
        if hasattr(flags, "STRONGLY_TYPED"):  # 11 has no other kind, and may come to drop the flag
            chosen |= 1 << int(flags.STRONGLY_TYPED)
    else:
        chosen |= 1 << int(flags.EXPLICIT_BATCH)  # since 10.0 there is no implicit one
    return builder.create_network(chosen)


def configure(trt: Any, config: Any, network: Any, workspace: int | None, level: int | None, detailed: bool) -> None:
    """Set what every build needs. workspace: bytes; level: 0 (fastest to build) to 5; None leaves TensorRT's own."""
    if hasattr(trt.BuilderFlag, "TF32"):
        # The few products that the graph keeps in float32 steer every token; ten bits of mantissa would undo that.
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if level is not None:
        config.builder_optimization_level = level
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not strongly_typed(trt):
        type_layers(trt, network)
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if any(network.get_layer(i).type == trt.LayerType.QUANTIZE for i in range(network.num_layers)):
            config.set_flag(trt.BuilderFlag.INT8)
        if not _works("cublasLt", (12, 11)) or not _works("cudnn", (8,)):
            config.set_tactic_sources(0)  # else the builder fails where these libraries are missing


def type_layers(trt: Any, network: Any) -> int:
    """Give every layer of a weakly typed network the precision of its own tensors; returns how many got one."""
    floats = {trt.DataType.FLOAT, trt.DataType.HALF}
    free = {trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.PLUGIN_V2, trt.LayerType.CAST}
    free |= {trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE}
    typed = 0
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type in free:
            continue
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        kinds = [tensor.dtype for tensor in (*outputs, *inputs) if tensor.dtype in floats]
        if not kinds:
            continue
        layer.precision = kinds[0]
        for index, tensor in enumerate(outputs):
            if tensor.dtype in floats:
                layer.set_output_type(index, tensor.dtype)
        typed += 1
    return typed


def _works(name: str, majors: tuple[int, ...]) -> bool:
    """Whether NVIDIA's library of a name is there and answers with a version: an empty stand-in does not."""
    for major in majors:
        try:
            version = getattr(ctypes.CDLL(f"lib{name}.so.{major}"), f"{name}GetVersion")
        except (OSError, AttributeError):
            continue
        version.restype = ctypes.c_size_t
        if version() >= 1000:
            return True
    return False


def timing_cache(config: Any, content: bytes) -> bool:
    """Use a timing cache; False where it is another GPU's or version's, and an empty one is used."""
    if content and config.set_timing_cache(config.create_timing_cache(content), False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return not content


# Plugins -------------------------------------------------------------------------------------------------------------


def plugin_creator(trt: Any, name: str, version: str) -> Any:
    """A registered plugin's creator, or None."""
    registry = trt.get_plugin_registry()
    find = (
        getattr(registry, "get_creator", None) or registry.get_plugin_creator
    )  # get_creator from 10.0 on finds V3 too
    return find(name, version, "")


# Running -------------------------------------------------------------------------------------------------------------


def device_memory(engine: Any) -> int:
    """Bytes of scratch memory that a context needs, weights aside."""
    return int(getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size)


def error_node(error: Any) -> str:
    """The node that a parser's error is about: its name from 10.0 on, its index before."""
    name = getattr(error, "node_name", None)
    if callable(name) and name():
        return f"node {name()}"
    return f"node {error.node()}" if error.node() >= 0 else "the model"
