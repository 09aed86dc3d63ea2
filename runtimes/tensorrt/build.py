"""A bundle's engine: built from ``tensorrt/model.onnx``, loaded, proven, and only then put in the place of the last."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvdit.contract import QvditError
from qvdit.contract.bundle import (
    ENGINE,
    ENGINE_PARITY,
    TENSORRT_LAYERS,
    TENSORRT_MODEL,
    Manifest,
    precision_of,
    read_manifest,
    verify,
)
from qvdit.contract.files import write_atomic, write_json
from qvdit.contract.parity import load_reference
from qvdit.runtimes.tensorrt import plugin, versions
from qvdit.runtimes.tensorrt.device import Device
from qvdit.runtimes.tensorrt.engine import EngineFacts, Profile, complete_install, install, model_hashes, pending
from qvdit.runtimes.tensorrt.log import logger
from qvdit.runtimes.tensorrt.progress import Report, Say, no_report
from qvdit.runtimes.tensorrt.session import TensorRtSession, open_device

MOST_TEXT_TOKENS = 512  # of the encoders of Wan (512), CogVideoX (226) and Latte (120)


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose."""

    video_sizes: tuple[tuple[int, int], ...] = ()  # height and width of hidden_states; the first is tuned for
    batch: int | None = None  # the largest; None: the example's
    fixed: bool = False  # the example's shapes and no other: quicker to build, and to run
    workspace: int | None = None  # bytes of scratch memory; None: all there is
    optimization_level: int | None = None  # 0 to 5
    timing_cache: Path | None = None  # None: beside the engine
    plugin: Path | None = None
    verbose: bool = False


def parse_size(text: str) -> tuple[int, int]:
    """HxW."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise QvditError(f"--video-size {text!r}", "HEIGHTxWIDTH", "for example --video-size 32x32")
    return int(match[1]), int(match[2])


def parse_bytes(text: str | None) -> int | None:
    """512M, 4G or a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None:
        raise QvditError(f"--workspace {text!r}", "a size in bytes", "for example --workspace 4G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


@dataclass(frozen=True)
class Built:
    """What came of a build."""

    facts: EngineFacts
    parity: dict[str, Any]


# Profiles ------------------------------------------------------------------------------------------------------------


def make_profile(
    inputs: Mapping[str, Sequence[int | str]], example: Mapping[str, Sequence[int]], options: BuildOptions
) -> Profile:
    """Shapes from the video sizes asked for; the example's is always among them, since parity runs it.

    inputs: the manifest's, with names for what varies. example: the shapes of the saved reference.
    """
    if options.batch is not None and options.batch < 1:
        raise QvditError(f"--batch {options.batch}", "1 or more", "check --batch")
    if options.fixed:
        return _fixed_profile(example, options)
    found = {name: size for key, dims in inputs.items() for name, size in zip(dims, example[key], strict=True)}
    ranges = {name: (size, size, size) for name, size in found.items() if isinstance(name, str)}
    if "batch" in ranges:
        batch = options.batch or found["batch"]
        ranges["batch"] = (1, batch, max(batch, found["batch"]))  # a guided pass may come in two halves
    if "text_tokens" in ranges:
        size = found["text_tokens"]
        ranges["text_tokens"] = (1, size, max(size, MOST_TEXT_TOKENS))
    if options.video_sizes:
        for axis, name in enumerate(("height", "width")):
            if name not in ranges:
                raise QvditError(
                    f"--video-size for a model of one size ({list(example['hidden_states'])})",
                    "no size",
                    "leave it out",
                )
            sizes = [size[axis] for size in options.video_sizes]
            ranges[name] = (min(*sizes, found[name]), sizes[0], max(*sizes, found[name]))
    return {
        key: [[ranges[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
        for key, dims in inputs.items()
    }


def _fixed_profile(example: Mapping[str, Sequence[int]], options: BuildOptions) -> Profile:
    """The example's shapes and no other: parity runs them."""
    if options.video_sizes or options.batch:
        raise QvditError("--fixed with --video-size or --batch", "one of them", "leave out --fixed")
    return {key: [list(shape)] * 3 for key, shape in example.items()}


# Building ------------------------------------------------------------------------------------------------------------


class Builder:
    """Builds engines on one GPU: one logger, one plugin, one timing cache for all of them."""

    def __init__(
        self,
        device: Device,
        options: BuildOptions,
        cache: Path,
        library: plugin.PluginLibrary | None,
        say: Say = print,
        report: Report = no_report,
    ):
        self.trt = versions.tensorrt()
        self.device, self.options, self.cache, self.say, self.report = device, options, cache, say, report
        self.log = logger(options.verbose)
        if library is not None:
            plugin.load_library(library, self.log)

    def build(self, model: Path, shapes_of: Callable[[str], list[list[int]]], level: int | None) -> bytes:
        """A serialized engine of an ONNX file; shapes_of: an input's smallest, most common and largest shape."""
        self.device.make_current()
        builder = self.trt.Builder(self.log)
        network = versions.create_network(self.trt, builder)
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(str(model)):
            raise self._parse_error(model, parser)
        profile = {network.get_input(i).name: shapes_of(network.get_input(i).name) for i in range(network.num_inputs)}
        versions.fix_shapes(network, profile)
        config = builder.create_builder_config()
        versions.configure(self.trt, config, network, self.options.workspace, level, self.options.verbose)
        watched = versions.watch(self.trt, config, self.report)
        shapes = builder.create_optimization_profile()
        for name, sizes in profile.items():
            shapes.set_shape(name, *sizes)
        config.add_optimization_profile(shapes)
        versions.timing_cache(config, self.cache.read_bytes() if self.cache.is_file() else b"")
        plan = builder.build_serialized_network(network, config)
        if plan is None and versions.relax(self.trt, config):
            self.say(f"no engine with every type as asked for ({self.log.why()}): trying with types as wishes")
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise QvditError(
                f"{model}, which TensorRT does not build ({self.log.why()})",
                "a model that this TensorRT and the plugin take, and enough GPU memory "
                f"({self.device.free_memory():,} bytes are free)",
                "do what the reason says; --verbose shows all of it",
            )
        del watched
        self._keep_cache(config)
        return bytes(plan)

    def _parse_error(self, model: Path, parser: Any) -> QvditError:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        where = versions.error_node(errors[0]) if errors else "the model"
        reasons = "; ".join(dict.fromkeys([*(" ".join(error.desc().split()) for error in errors[:3]), self.log.why()]))
        return QvditError(
            f"{model}, which TensorRT does not parse at {where} ({reasons})",
            "nodes that this TensorRT and the plugin know",
            "export the model again; --verbose shows more",
        )

    def _keep_cache(self, config: Any) -> None:
        """Add this build's measurements to the file's, which other builds may have added to meanwhile."""
        with _held(self.cache):
            content = versions.merged_timing_cache(config, self.cache.read_bytes() if self.cache.is_file() else b"")
            if content is not None:
                write_atomic(self.cache, lambda path: path.write_bytes(content))


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock that stands for a file; .NAME.lock stays beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, be it by the end of the process
        yield


def build_engine(
    bundle: Path, options: BuildOptions, device: str = "cuda", say: Say = print, report: Report = no_report
) -> Built:
    """Build and prove a bundle's engine; the one that is there stays until the new one has passed.

    say: is told of every step; report: how far it is, where TensorRT tells.
    QvditError says what is missing, what TensorRT refused or what parity found.
    """
    from qvdit.runtimes.tensorrt.parity import check_engine, refuse_failed

    read_manifest(bundle)  # before anything that is missing here is complained of
    trt = versions.tensorrt()
    gpu = open_device(device)
    manifest = _exported(bundle)
    _check_precision(manifest, trt)
    complete_install(bundle)
    library = _library(bundle, options)
    saved = load_reference(bundle)
    profile = make_profile(manifest.inputs, {name: value.shape for name, value in saved.inputs.items()}, options)
    cache = options.timing_cache or (bundle / ENGINE).with_name("timing.cache")
    _refuse_unwritable(bundle / ENGINE, cache)
    builder = Builder(gpu, options, cache, library, say, report)
    here = gpu.facts()
    say(f"TensorRT {trt.__version__} on {here.name}: building {bundle / ENGINE}")
    start = time.monotonic()
    plan = builder.build(bundle / TENSORRT_MODEL, profile.__getitem__, options.optimization_level)
    seconds = time.monotonic() - start
    say(f"built in {seconds:.0f} s, {len(plan):,} bytes")
    with TensorRtSession(plan, gpu, builder.log) as session:
        facts = EngineFacts(
            tensorrt=trt.__version__,
            gpu=here.name,
            compute=here.compute,
            driver=here.driver,
            profile=profile,
            onnx_sha256=model_hashes(bundle),
            plugin_sha256=library.sha256 if library else None,
            plugin_version=library.version if library else None,
            plugin_tensorrt=library.tensorrt if library else None,
            optimization_level=options.optimization_level,
            workspace=options.workspace,
            build_seconds=round(seconds, 2),
            engine_sha256=hashlib.sha256(plan).hexdigest(),
            engine_bytes=len(plan),
            device_bytes=session.device_bytes,
        )
        parity = check_engine(bundle, saved, session, builder, say)
    write_json(pending(bundle / ENGINE_PARITY), parity)
    refuse_failed(parity, pending(bundle / ENGINE_PARITY))
    install(bundle, plan, facts)
    return Built(facts, parity)


def _refuse_unwritable(*files: Path) -> None:
    """Before minutes are spent on what could not be kept."""
    for file in files:
        folder = next(path for path in file.absolute().parents if path.exists())
        if file.is_dir() or not os.access(folder, os.W_OK):
            raise QvditError(f"{file}, which cannot be written", "a file in a folder of yours", "check the path")


def _exported(bundle: Path) -> Manifest:
    manifest = verify(bundle)
    for name in (TENSORRT_MODEL, TENSORRT_LAYERS):
        if name not in manifest.files:
            raise QvditError(
                f"{bundle}, which has no {name}", "a bundle for TensorRT", "export it with --target tensorrt"
            )
    return manifest


def _check_precision(manifest: Manifest, trt: Any) -> None:
    if precision_of(manifest) == "bf16" and not versions.strongly_typed(trt):
        raise QvditError(
            f"a graph in BF16 for TensorRT {trt.__version__}",
            "TensorRT 10 or newer",
            "export it without --precision bf16",
        )


def _library(bundle: Path, options: BuildOptions) -> plugin.PluginLibrary | None:
    if not plugin.is_needed(bundle / TENSORRT_MODEL):
        return None
    return plugin.find_library(options.plugin, (bundle / ENGINE).parent)
