"""A stand-in for TensorRT 8.6's Python module and for CUDA's driver, on the CPU.

Device memory is host memory. A plan is JSON that names its ONNX file and profile; a model's engine answers through the
bundle's ONNX Runtime file, a layers' engine through single layers of the same. What TensorRT was told is recorded.
"""

from __future__ import annotations

import ctypes
import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper

from qvdit.contract.bundle import ORT_MODEL
from qvdit.contract.layer import padded_size


class FakeDriver:
    """libcuda.so.1, its memory on the heap."""

    def __init__(self, memory: int = 1 << 30, devices: int = 1):
        self.memory, self.devices = memory, devices
        self.blocks: dict[int, Any] = {}
        self.streams = 0
        self.launched: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 0  # events, contexts

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"Fake GPU"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value = total._obj.value = self.memory
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        if size.value > self.memory:
            return 2
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.blocks[address.value]
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:  # noqa: N802
        self.streams += 1
        stream._obj.value = self.streams
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    cuMemcpyDtoHAsync_v2 = cuMemcpyDtoDAsync_v2 = cuMemcpyHtoDAsync_v2  # noqa: N815

    def cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:  # noqa: N802
        milliseconds._obj.value = 1.5
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        executable._obj.value = 77
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:  # noqa: N802
        self.launched.append(graph.value)
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = {2: b"out of memory"}.get(status, b"something else")
        return 0


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT8 = np.int8
    INT32 = np.int32
    BOOL = np.bool_


class LayerType(enum.Enum):
    CONSTANT, SHAPE, PLUGIN_V2, CAST, QUANTIZE, DEQUANTIZE, MATRIX_MULTIPLY, ELEMENTWISE, SHUFFLE = range(9)


_OUT_OF_MEMORY = "1: [defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)"
_KINDS = {onnx.TensorProto.FLOAT: DataType.FLOAT, onnx.TensorProto.FLOAT16: DataType.HALF}
_KINDS |= {onnx.TensorProto.INT32: DataType.INT32}


class Tensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...] = ()):
        self.name, self.dtype, self.shape = name, dtype, shape


class Layer:
    """A network's layer, with what it was told."""

    def __init__(self, kind: LayerType, inputs: list[Tensor], outputs: list[Tensor], name: str = ""):
        self.type, self.inputs, self.outputs, self.name = kind, inputs, outputs, name
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.precision: DataType | None = None
        self.output_types: dict[int, DataType] = {}

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def set_output_type(self, index: int, kind: DataType) -> None:
        self.output_types[index] = kind


class CastLayer(Layer):
    """What get_layer's answer becomes when its class is set."""

    to_type: DataType


class ConstantLayer(Layer):
    weights: np.ndarray


class Network:
    def __init__(self, flags: int):
        self.flags = flags
        self.layers: list[Layer] = []
        self.inputs: list[Tensor] = []
        self.path = ""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]


class _Flags(enum.IntEnum):
    EXPLICIT_BATCH = 0


class _BuilderFlag(enum.Enum):
    FP16, INT8, TF32, OBEY_PRECISION_CONSTRAINTS, PREFER_PRECISION_CONSTRAINTS = range(5)


class _Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _ILogger:
    Severity = _Severity

    def __init__(self) -> None:
        pass


class _Cache:
    def __init__(self, content: bytes):
        self.content = content

    def serialize(self) -> bytes:
        return self.content

    def combine(self, other: _Cache, ignore_mismatch: bool) -> bool:
        new = [entry for entry in other.content.split() if entry not in self.content.split()]
        self.content = b" ".join([*self.content.split(), *new])
        return True


class Config:
    def __init__(self) -> None:
        self.flags: set[Any] = {_BuilderFlag.TF32}
        self.profiles: list[Any] = []
        self.pools: dict[Any, int] = {}
        self.tactic_sources: int | None = None
        self.builder_optimization_level = 3
        self.cache: _Cache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self.flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def set_tactic_sources(self, sources: int) -> bool:
        self.tactic_sources = sources
        return True

    def create_timing_cache(self, content: bytes) -> _Cache | None:
        return None if content.startswith(b"damaged") else _Cache(content)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"other"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return 0


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, smallest: Any, common: Any, largest: Any) -> None:
        self.shapes[name] = [list(smallest), list(common), list(largest)]


class _Error:
    def __init__(self, text: str):
        self.text = text

    def desc(self) -> str:
        return self.text

    def node(self) -> int:
        return 3


class Fake:
    """The module. ``fail``: names of what is to fail; ``noise``: added to a model's output, relative to its size."""

    DataType, LayerType, ILogger, BuilderFlag = DataType, LayerType, _ILogger, _BuilderFlag
    IProfiler = type("IProfiler", (), {})
    ICastLayer, IConstantLayer = CastLayer, ConstantLayer
    NetworkDefinitionCreationFlag = _Flags
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")

    def __init__(self, version: str = "8.6.0"):
        self.__version__ = version
        self.fail: set[str] = set()
        self.noise = 0.0
        self.wrong_integers = 0
        self.creators: set[str] = set()
        self.configs: list[Config] = []
        self.builds: list[Path] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []  # of each build's network

    # What TensorRT offers

    def nptype(self, kind: DataType) -> Any:
        return kind.value

    def init_libnvinfer_plugins(self, log: Any, namespace: str) -> bool:
        return True

    def get_plugin_registry(self) -> Any:
        fake = self

        class Registry:
            def get_plugin_creator(self, name: str, version: str, namespace: str) -> Any:
                return object() if name in fake.creators else None

        return Registry()

    def Builder(self, log: Any) -> Any:  # noqa: N802
        fake = self

        class Builder:
            def create_network(self, flags: int) -> Network:
                return Network(flags)

            def create_builder_config(self) -> Config:
                fake.configs.append(Config())
                return fake.configs[-1]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
                if "strict" in fake.fail and config.get_flag(_BuilderFlag.OBEY_PRECISION_CONSTRAINTS):
                    log.log(_Severity.ERROR, "no implementation obeys reqd. constraints")
                    return None
                if "build" in fake.fail:
                    log.log(_Severity.ERROR, 'LowBitLinear "blocks.0.to_q": got no kernel')
                    log.log(_Severity.ERROR, "10: could not find any implementation")
                    return None
                if "memory" in fake.fail:
                    log.log(_Severity.ERROR, _OUT_OF_MEMORY)
                    return None
                fake.builds.append(Path(network.path))
                fake.shapes.append({tensor.name: tensor.shape for tensor in network.inputs})
                assert config.cache is not None
                config.cache.content += b" " + Path(network.path).stem.encode()
                plan = {"onnx": network.path, "profile": config.profiles[0].shapes}
                return json.dumps(plan | {"level": config.builder_optimization_level}).encode()

        return Builder()

    def OnnxParser(self, network: Network, log: Any) -> Any:  # noqa: N802
        fake = self

        class Parser:
            num_errors = 1

            def parse_from_file(self, path: str) -> bool:
                network.path = path
                model = onnx.load(path, load_external_data=False)
                network.inputs = [Tensor(v.name, _KINDS[v.type.tensor_type.elem_type]) for v in model.graph.input]
                return "parse" not in fake.fail

            def get_error(self, index: int) -> _Error:
                return _Error("no importer for\n this")

        return Parser()

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        fake = self

        class Runtime:
            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                if "deserialize" in fake.fail:
                    log.log(_Severity.ERROR, _OUT_OF_MEMORY)
                    return None
                try:
                    return Engine(fake, json.loads(plan))
                except ValueError:
                    log.log(_Severity.ERROR, "magic tag does not match")
                    return None

        return Runtime()


class Engine:
    device_memory_size = 4096

    def __init__(self, fake: Fake, plan: dict[str, Any]):
        self.fake, self.profile, self.path = fake, plan["profile"], Path(plan["onnx"])
        self.graph = onnx.load(self.path, load_external_data=False).graph
        self.tensors = {v.name: v for v in (*self.graph.input, *self.graph.output)}
        self.num_io_tensors = len(self.tensors)
        self.inputs = {value.name for value in self.graph.input}

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return Fake.TensorIOMode.INPUT if name in self.inputs else Fake.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _KINDS[self.tensors[name].type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return [tuple(shape) for shape in self.profile[name]]

    def create_execution_context(self) -> Any:
        return None if "context" in self.fake.fail else Context(self)


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, np.ndarray] = {}
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        if len(self.engine.inputs) != len(self.shapes):
            return sorted(self.engine.inputs - set(self.shapes))
        for name, value in self.engine.tensors.items():
            if name in self.engine.inputs:
                continue
            if ":" in name:  # of a layers' engine: NODE:x gives the leading dimensions
                known = self.shapes[f"{name.rpartition(':')[0]}:x"]
                dims = value.type.tensor_type.shape.dim
                self.shapes[name] = (*known[:2], *(d.dim_value for d in dims[2:]))
            else:
                self.shapes[name] = self.shapes["hidden_states"]
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if "execute" in self.engine.fake.fail:
            return False
        given = {name: self.view(name).copy() for name in self.engine.inputs}
        for name, value in self.compute(given).items():
            self.view(name)[...] = value
        if self.profiler is not None:
            for layer, ms in (("attention", 2.0), ("mlp", 3.0)):
                self.profiler.report_layer_time(layer, ms)
        return True

    def view(self, name: str) -> np.ndarray:
        shape, kind = self.shapes[name], np.dtype(self.engine.get_tensor_dtype(name).value)
        size = int(np.prod(shape)) * kind.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)

    def compute(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        bundle = self.engine.path.parents[1]
        return self.layers(bundle, given) if self.engine.path.stem == "layers" else self.model(bundle, given)

    def model(self, bundle: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from qvdit.runtimes.onnxruntime import OnnxRuntimeSession

        y = OnnxRuntimeSession(bundle / ORT_MODEL, threads=1).infer(given)
        noise = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
        output = next(name for name in self.engine.tensors if name not in self.engine.inputs)
        return {output: y + self.engine.fake.noise * np.abs(y).max() * noise}

    def layers(self, bundle: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from qvdit.export.plugin import ROWS
        from qvdit.runtimes.layers import LayerModels

        models = LayerModels(bundle / ORT_MODEL, threads=1)
        found = {}
        for node in self.engine.graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            x = given[f"{node.name}:x"].astype(np.float32)
            per_frame = ROWS[values["rows"]].tokens_per_frame(x.shape[1], max(values["frames"], 1))
            parts = [models.run(name, x, per_frame) for name in node.name.split(",")]
            k, taken = x.shape[-1], 0 if values["act_symmetric"] else 128
            stored = np.zeros((len(parts[0].x_q), padded_size((1, k))), np.int8)
            stored[:, :k] = parts[0].x_q - taken
            stored[0, : self.engine.fake.wrong_integers] += 1
            integers = next(name for name in node.output if ":x_q" in name)
            found[integers] = stored.view(np.int32).reshape(*x.shape[:2], -1)
            found[f"{node.name}:y"] = np.concatenate([part.y for part in parts], axis=-1)
            acc = np.concatenate([part.acc for part in parts if part.acc is not None], axis=-1)
            found[f"{node.name}:acc"] = acc.reshape(*x.shape[:2], -1)
        return found
