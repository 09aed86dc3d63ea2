"""What differs between the TensorRT versions that build and run engines, each difference named once.

8.6 (JetPack 6.0) knows weakly typed networks only: every layer is given the precision that the graph's own Casts imply.
10.x (JetPack 6.1, 7; servers) has strongly typed networks; 11 has nothing else, and no precision flags.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from typing import Any

from qvdit.contract import QvditError
from qvdit.runtimes.tensorrt.progress import Report, monitor

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
        if any(layer.type == trt.LayerType.QUANTIZE for layer in _layers(network)):
            config.set_flag(trt.BuilderFlag.INT8)
            # What INT8 kernels there are for a product decides in which type it ends.
            config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        else:
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if not _works("cublasLt", (12, 11)) or not _works("cudnn", (8,)):
            config.set_tactic_sources(0)  # else the builder fails where these libraries are missing


def watch(trt: Any, config: Any, report: Report) -> Any:
    """Have a build report its progress, from 10 on; what is returned must live as long as the build."""
    if not hasattr(config, "progress_monitor"):
        return None
    made = monitor(trt, report)
    config.progress_monitor = made
    return made


# What only moves values. Told to give HALF, fused with another of its kind, it is refused by the one backend that may
# run it ("Mismatched type for tensor …, f32 vs. expected type:f16"): TensorRT keeps float32 between layers.
_MOVES = {"SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "IDENTITY", "PADDING", "SCATTER", "SELECT"}


def relax(trt: Any, config: Any) -> bool:
    """Let a build that failed stray from the types where there is no other way; False where that changes nothing."""
    strict = getattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS", None)
    if strict is None or not config.get_flag(strict):
        return False
    config.clear_flag(strict)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    return True


def fix_shapes(network: Any, profile: dict[str, list[list[int]]]) -> None:
    """Make the extents of inputs constant where a profile has one size: all that is computed from them goes away."""
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        smallest, _, largest = profile[tensor.name]
        tensor.shape = tuple(low if low == high else -1 for low, high in zip(smallest, largest, strict=True))


def type_layers(trt: Any, network: Any) -> int:
    """Give every layer of a weakly typed network the precision of its own tensors; returns how many got one."""
    types, floats = tensor_types(trt, network), _floats(trt)
    free = {trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.PLUGIN_V2, trt.LayerType.CAST}
    free |= {trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE}
    typed = 0
    dequantized: set[str] = set()
    for layer in _layers(network):
        inputs, outputs = _inputs(layer), _outputs(layer)
        if layer.type == trt.LayerType.DEQUANTIZE:
            dequantized |= {tensor.name for tensor in outputs}
        # A product of dequantized tensors is what TensorRT has INT8 kernels for.
        if layer.type in free or (inputs and all(tensor.name in dequantized for tensor in inputs)):
            continue
        kinds = [kind for tensor in (*outputs, *inputs) if (kind := types.get(tensor.name, tensor.dtype)) in floats]
        if not kinds or (kinds[0] == trt.DataType.HALF and layer.type.name in _MOVES):
            continue
        layer.precision = kinds[0]
        for index, tensor in enumerate(outputs):
            if types[tensor.name] in floats:
                layer.set_output_type(index, types[tensor.name])
        typed += 1
    return typed


def tensor_types(trt: Any, network: Any) -> dict[str, Any]:
    """The type of every tensor of a network, by name, as the graph it was parsed from has them.

    8.6 calls all floating-point tensors but inputs FLOAT until an engine is built. Its constants and Casts know better;
    everything else goes on in the type of its first floating-point input.
    """
    floats = _floats(trt)
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    types = {tensor.name: tensor.dtype for tensor in inputs}
    for layer in _layers(network):
        given = [types.get(tensor.name, tensor.dtype) for tensor in _inputs(layer)]
        kind = _own_type(trt, layer) or next((kind for kind in given if kind in floats), trt.DataType.FLOAT)
        for index, tensor in enumerate(_outputs(layer)):
            # Only the first output of a plugin is of that type; the others are for tests.
            follows = tensor.dtype in floats and not (index and layer.type == trt.LayerType.PLUGIN_V2)
            types[tensor.name] = kind if follows else tensor.dtype
    return types


def _own_type(trt: Any, layer: Any) -> Any:
    """The type that a layer has of itself, or None where its inputs decide."""
    if layer.type == trt.LayerType.CAST:
        layer.__class__ = trt.ICastLayer  # get_layer knows no kinds; Polygraphy does the same
        return layer.to_type
    if layer.type == trt.LayerType.CONSTANT and layer.get_output(0).dtype in _floats(trt):
        layer.__class__ = trt.IConstantLayer
        kind = str(layer.weights.dtype)  # numpy's, or TensorRT's where numpy has no such type
        return trt.DataType.HALF if kind in ("float16", "DataType.HALF") else None
    if layer.type == trt.LayerType.PLUGIN_V2 and _normalizes(trt, layer):
        return trt.DataType.HALF
    return trt.DataType.FLOAT if layer.type == trt.LayerType.DEQUANTIZE else None


def _normalizes(trt: Any, plugin: Any) -> bool:
    """Whether a plugin's node is a layer that normalizes its float32 x: a modulation follows that, then integers.

    Integers follow any other layer's x at once, and there are none where attention or a residual sum is computed.
    """
    kinds = [tensor.dtype for tensor in _inputs(plugin)]
    return len(kinds) > 1 and kinds[1] in _floats(trt) and any(kind not in _floats(trt) for kind in kinds)


def _floats(trt: Any) -> set[Any]:
    return {trt.DataType.FLOAT, trt.DataType.HALF}


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _inputs(layer: Any) -> list[Any]:
    return [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(i) for i in range(layer.num_outputs)]


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
    """Use a timing cache; False where it is damaged, another GPU's or version's, and an empty one is used."""
    cache = config.create_timing_cache(content) if content else None  # None: TensorRT cannot read it
    if cache is not None and config.set_timing_cache(cache, False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return not content


def merged_timing_cache(config: Any, others: bytes) -> bytes | None:
    """A build's timing cache and what others measured; None where the build kept none."""
    cache = config.get_timing_cache()
    if cache is None:
        return None
    other = config.create_timing_cache(others) if others else None
    if other is not None:
        cache.combine(other, False)  # of another version: left out
    return bytes(cache.serialize())


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
    newer = hasattr(engine, "device_memory_size_v2")  # from 10.1 on; 11 has no other
    return int(engine.device_memory_size_v2 if newer else engine.device_memory_size)


def error_node(error: Any) -> str:
    """The node that a parser's error is about: its name from 10.0 on, its index before."""
    name = getattr(error, "node_name", None)
    if callable(name) and name():
        return f"node {name()}"
    return f"node {error.node()}" if error.node() >= 0 else "the model"
