"""A TensorRT engine that runs: numpy arrays or PyTorch's CUDA tensors in, the same kind out."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qvdit.contract import QvditError
from qvdit.runtimes.tensorrt import engine as engines
from qvdit.runtimes.tensorrt import plugin, versions
from qvdit.runtimes.tensorrt.device import Buffer, Device, OutOfMemoryError, Stream
from qvdit.runtimes.tensorrt.log import logger

Shape = tuple[int, ...]


class TensorRtSession:
    """Runs one engine on one GPU. A context manager; without ``with``, call :meth:`close`.

    Its buffers are reused: numpy results are copies, and so are PyTorch's where a CUDA graph is used. One thread at a
    time.
    """

    def __init__(self, plan: bytes, device: Device, log: Any = None, cuda_graph: bool = False):
        """Deserialize an engine; the plugin that it needs must have been loaded. cuda_graph: replay launches as one."""
        trt = versions.tensorrt()
        self.device, self._log = device, log or logger()
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            why = self._log.why()
            if "out of memory" in why.lower():
                raise OutOfMemoryError(
                    f"no room for the engine ({why})",
                    f"{len(plan):,} bytes of free GPU memory and more, of which {device.free_memory():,} are there",
                    "end other programs on this GPU, or quantize to fewer bits",
                )
            raise QvditError(
                f"an engine that TensorRT {trt.__version__} refuses ({why})",
                "one that was built by it, here",
                "build it again: qvdit engine, or python -m qvdit.runtimes.tensorrt",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise OutOfMemoryError(
                f"no room to run the engine ({self._log.why()})",
                f"{self.device_bytes:,} bytes of free GPU memory, of which {device.free_memory():,} are there",
                "end other programs on this GPU, or build for a smaller video size",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs: dict[str, np.dtype] = {name: self._type(name) for name in inputs}
        self.outputs: dict[str, np.dtype] = {name: self._type(name) for name in names if name not in inputs}
        self.profile: engines.Profile = {
            name: [list(shape) for shape in self._engine.get_tensor_profile_shape(name, 0)] for name in inputs
        }
        self._stream = Stream(device)
        self._buffers = {name: Buffer(device) for name in names}
        self._cuda_graph = cuda_graph
        self._graphs: dict[tuple[tuple[Shape, int], ...], int] = {}  # by the inputs' and outputs' shapes and addresses

    @classmethod
    def of_bundle(
        cls,
        bundle: Path,
        device: str = "cuda",
        cuda_graph: bool = False,
        plugin_library: Path | None = None,
        verbose: bool = False,
    ) -> TensorRtSession:
        """The session of a bundle's own engine, which must be of this TensorRT, this GPU and this model."""
        trt = versions.tensorrt()
        facts = engines.read_facts(bundle)
        gpu = open_device(device)
        engines.check_facts(facts, trt.__version__, gpu.facts(), engines.model_hashes(bundle))
        log = logger(verbose)
        if facts.plugin_version is not None:
            library = plugin.find_library(plugin_library, (bundle / engines.ENGINE).parent)
            if library.version != facts.plugin_version:
                raise QvditError(
                    f"{library.path}, version {library.version} of the plugin",
                    f"version {facts.plugin_version}, which the engine was built with",
                    "build the engine again with this plugin",
                )
            plugin.load_library(library, log)
        return cls(engines.read_engine(bundle, facts), gpu, log, cuda_graph)

    def _type(self, name: str) -> np.dtype:
        return np.dtype(versions.tensorrt().nptype(self._engine.get_tensor_dtype(name)))

    @property
    def device_bytes(self) -> int:
        """Scratch memory that the engine needs, weights aside."""
        return versions.device_memory(self._engine)

    # Running ---------------------------------------------------------------------------------------------------------

    def infer(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model: inputs by name → its output; refuses wrong names, shapes and sizes outside the profile."""
        outputs = self.infer_all(inputs)
        return outputs[next(iter(self.outputs))]

    def infer_all(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """:meth:`infer` with every output, by name."""
        if set(inputs) != set(self.inputs):
            raise QvditError(f"inputs {sorted(inputs)}", f"{sorted(self.inputs)}", "pass exactly these")
        for name, value in inputs.items():
            self._check_shape(name, tuple(value.shape))
        return self.infer_impl(inputs)

    def _check_shape(self, name: str, shape: Shape) -> None:
        smallest, _, largest = self.profile[name]
        fits = len(shape) == len(largest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not fits:
            span = [str(low) if low == high else f"{low}…{high}" for low, high in zip(smallest, largest, strict=True)]
            raise QvditError(
                f"{name} of shape {list(shape)}",
                f"[{', '.join(span)}], for which the engine was built",
                "build it for this size: --video-size",
            )

    def infer_impl(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run without checks."""
        self.device.make_current()
        with_torch = any(hasattr(value, "data_ptr") and value.is_cuda for value in inputs.values())
        return self._infer_torch(inputs) if with_torch else self._infer_numpy(inputs)

    def _infer_numpy(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(inputs[name], dtype=kind, order="C") for name, kind in self.inputs.items()}
        addresses = {name: self._buffers[name].reserve(max(array.nbytes, 1)) for name, array in arrays.items()}
        shapes = self._shape({name: array.shape for name, array in arrays.items()})
        found = {name: np.empty(shapes[name], kind) for name, kind in self.outputs.items()}
        addresses |= {name: self._buffers[name].reserve(max(array.nbytes, 1)) for name, array in found.items()}
        for name, array in arrays.items():
            self._stream.upload(array, addresses[name])
        self._execute(addresses)
        for name, array in found.items():
            self._stream.download(addresses[name], array)
        self._stream.synchronize()
        return found

    def _infer_torch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        torch = sys.modules["torch"]
        place = torch.device("cuda", self.device.index)
        kinds = {name: getattr(torch, kind.name) for name, kind in (self.inputs | self.outputs).items()}
        tensors = {name: inputs[name].to(place, kinds[name]).contiguous() for name in self.inputs}
        shapes = self._shape({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        found = {name: torch.empty(shapes[name], dtype=kinds[name], device=place) for name in self.outputs}
        theirs = torch.cuda.current_stream(place).cuda_stream
        self._stream.wait_for(theirs)
        addresses = {name: tensor.data_ptr() for name, tensor in (tensors | found).items()}
        if self._cuda_graph:  # a graph keeps its addresses
            sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in (tensors | found).items()}
            own = {name: self._buffers[name].reserve(max(size, 1)) for name, size in sizes.items()}
            for name in tensors:
                self._stream.copy(addresses[name], own[name], sizes[name])
            self._execute(own)
            for name in found:
                self._stream.copy(own[name], addresses[name], sizes[name])
        else:
            self._execute(addresses)
        self._stream.precede(theirs)
        # Their allocator may hand a tensor's memory to other work on their stream, which waits for ours.
        return found

    def _shape(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Tell the context the inputs' shapes; returns the outputs'."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                self._refuse(shapes)
        missing = self._context.infer_shapes()
        if missing:
            self._refuse(shapes)
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}

    def _execute(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if self._cuda_graph:
            self._stream.launch(self._graph(addresses))
        else:
            self._enqueue()

    def _graph(self, addresses: Mapping[str, int]) -> int:
        """The graph of a run at these addresses, recorded when it is first asked for."""
        key = tuple((tuple(self._context.get_tensor_shape(name)), address) for name, address in addresses.items())
        if key not in self._graphs:
            self._enqueue()  # what happens once only, as a first run's set-up, must not be recorded
            self._stream.synchronize()
            self._graphs[key] = self._stream.capture(self._enqueue)
        return self._graphs[key]

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            self._refuse({name: tuple(self._context.get_tensor_shape(name)) for name in self.inputs})

    def _refuse(self, shapes: Mapping[str, Shape]) -> None:
        listed = {name: list(shape) for name, shape in shapes.items()}
        raise QvditError(
            f"inputs of shapes {listed}, which the engine cannot run ({self._log.why()})",
            "sizes it can compute",
            "see that height and width are multiples of the patch size",
        )

    def timer(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs the model once, on inputs that are on the device already: ms between two CUDA events."""
        self.infer_all(inputs)
        work: Callable[[], None] = self._enqueue
        if self._cuda_graph:
            graph = self._graph({name: buffer.address for name, buffer in self._buffers.items()})
            work = functools.partial(self._stream.launch, graph)

        def run() -> float:
            self.device.make_current()
            return self._stream.elapsed(work)

        return run

    def layer_times(self, inputs: Mapping[str, np.ndarray], runs: int = 3) -> dict[str, float]:
        """Milliseconds a run of every layer of the engine, as TensorRT counts them; runs are slower meanwhile."""
        profiler = _profiler()
        self.infer_all(inputs)
        self._context.profiler = profiler
        for _ in range(runs):
            self._enqueue()
            self._stream.synchronize()
        return {name: spent / runs for name, spent in profiler.spent.items()}

    def close(self) -> None:
        """Free the engine's memory."""
        if self._engine is None:
            return
        self.device.make_current()
        for graph in self._graphs.values():
            self._stream.discard(graph)
        self._graphs.clear()
        self._stream.close()
        for buffer in self._buffers.values():
            buffer.free()
        self._context = self._engine = self._runtime = None

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _profiler() -> Any:
    """A TensorRT profiler that adds up: ``spent``, ms by layer."""
    trt = versions.tensorrt()

    class Profiler(trt.IProfiler):  # type: ignore[name-defined,misc]  # the base is there only where TensorRT is
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.spent: dict[str, float] = {}

        def report_layer_time(self, layer: str, ms: float) -> None:
            self.spent[layer] = self.spent.get(layer, 0.0) + ms

    return Profiler()


def open_device(name: str) -> Device:
    """The GPU of a name: cuda or cuda:N."""
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise QvditError(f"device {name!r}", "cuda or cuda:N", "TensorRT runs on a GPU alone: choose one")
    return Device(int(match[1] or 0))
