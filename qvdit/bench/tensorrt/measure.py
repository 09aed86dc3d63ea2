"""Engines of cases, built on this GPU, compared with their references and timed in turns. No PyTorch, Python 3.10."""

from __future__ import annotations

import dataclasses
import gc
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qvdit.bench.tensorrt import cases
from qvdit.bench.tensorrt.results import Results, Row, save
from qvdit.bench.turns import in_turns, summary
from qvdit.contract import QvditError
from qvdit.contract.bundle import TENSORRT_LAYERS, TENSORRT_MODEL
from qvdit.contract.files import finite, read_json, sha256, write_atomic, write_json
from qvdit.contract.parity import SavedParity, load_reference, relative_error
from qvdit.runtimes.tensorrt import plugin, versions
from qvdit.runtimes.tensorrt.build import Builder, BuildOptions, Say
from qvdit.runtimes.tensorrt.device import Device
from qvdit.runtimes.tensorrt.engine import model_hashes
from qvdit.runtimes.tensorrt.parity import LayerEngine
from qvdit.runtimes.tensorrt.session import TensorRtSession, open_device

_PLAN, _FACTS, _PROFILE = "model.plan", "built.json", "profile.json"
REPEATS = 50


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    root: Path  # of the cases
    models: tuple[str, ...] = cases.USUAL_MODELS
    engines: tuple[str, ...] = cases.ENGINES
    repeats: int = REPEATS
    options: BuildOptions = field(default_factory=BuildOptions)
    cuda_graph: bool = True
    device: str = "cuda"
    build_only: bool = False
    profile: bool = False  # leave each engine's time by layer beside it, slowest first


class Watch(Protocol):
    """Who is told of what is measured."""

    def say(self, text: str) -> None: ...

    def measured(self, results: Results, rows: Sequence[Row]) -> None: ...


@dataclass(frozen=True)
class Built:
    """An engine on disk and what its integers were found to be."""

    key: str  # of what it was built from
    seconds: float
    layers_compared: int
    xq_mismatches: int
    acc_mismatches: int
    worst_layer: float | None


def run(settings: Settings, out: Path, command: str, watch: Watch) -> Results:
    """Build what is not built yet, then measure model by model; ``out`` is written after each."""
    device = open_device(settings.device)
    results = about(command, device, settings)
    chosen = {model: _cases(settings, model) for model in settings.models}
    if not any(chosen.values()):
        raise QvditError(
            f"{settings.root} without a case of {', '.join(settings.models)}",
            "cases to measure",
            "prepare them: qvdit bench tensorrt --prepare-only",
        )
    builder = _builder(settings, device, [folder for found in chosen.values() for folder in found], watch.say)
    for folder in (folder for found in chosen.values() for folder in found):
        try:
            _build(folder, builder, watch)
        except QvditError as error:  # one engine less, not the run
            watch.say(f"left out: {folder}: {error}")
    if settings.build_only:
        return results
    for found in chosen.values():
        built = [folder for folder in found if _found(folder, builder) is not None]
        rows = _measure(built, builder, settings) if built else []
        results = dataclasses.replace(results, rows=(*results.rows, *rows))
        save(results, out)
        watch.measured(results, rows)
        for folder in built if settings.profile else []:
            _profile(folder, builder, watch)
    return results


def about(command: str, device: Device, settings: Settings) -> Results:
    """A run without rows yet, on this machine."""
    facts = device.facts()
    found = {"tensorrt": versions.tensorrt().__version__, "python": platform.python_version()}
    first = next((f for model in settings.models for f in _cases(settings, model)), None)
    prepared = cases.load(first)[0].versions if first else {}
    return Results(command, facts.name, facts.driver, {**prepared, **found}, date.today().isoformat())


def _cases(settings: Settings, model: str) -> list[Path]:
    folders = [cases.folder(settings.root, model, engine) for engine in cases.engines_of(model, settings.engines)]
    return [folder for folder in folders if cases.exists(folder)]


# Building ------------------------------------------------------------------------------------------------------------


def _builder(settings: Settings, device: Device, folders: Sequence[Path], say: Say) -> Builder:
    """One for all: blocks repeat from model to model and engine to engine, and so do timings in the cache."""
    options = settings.options
    needed = any(plugin.is_needed(folder / TENSORRT_MODEL) for folder in folders)
    library = plugin.find_library(options.plugin) if needed else None
    return Builder(device, options, options.timing_cache or settings.root / "timing.cache", library, say)


def _key(folder: Path, builder: Builder) -> str:
    """What an engine depends on; the plugin is run from its library, not kept in the engine."""
    hashes = sorted(model_hashes(folder).items())
    level = builder.options.optimization_level
    return repr((versions.tensorrt().__version__, builder.device.facts().name, level, hashes))


def _found(folder: Path, builder: Builder) -> Built | None:
    """The engine that is there, if it is of this model, TensorRT, GPU and level."""
    facts, plan = folder / "tensorrt" / _FACTS, folder / "tensorrt" / _PLAN
    if not (facts.is_file() and plan.is_file()):
        return None
    content: dict[str, Any] = dict(read_json(facts, "what an engine was built from"))
    intact = content.pop("sha256", None) == sha256(plan) and content.get("key") == _key(folder, builder)
    return Built(**content) if intact else None


def _build(folder: Path, builder: Builder, watch: Watch) -> None:
    """Build an engine and compare its layers, unless that was done."""
    if _found(folder, builder) is not None:
        return
    saved = load_reference(folder)
    watch.say(f"building {folder}")
    start = time.monotonic()
    plan = builder.build(folder / TENSORRT_MODEL, _fixed(saved).__getitem__, builder.options.optimization_level)
    built = Built(_key(folder, builder), round(time.monotonic() - start, 1), 0, 0, 0, None)
    built = _compare_layers(folder, saved, builder, built) if (folder / TENSORRT_LAYERS).is_file() else built
    path = folder / "tensorrt" / _PLAN
    write_atomic(path, lambda temporary: temporary.write_bytes(plan))
    write_json(path.with_name(_FACTS), {**dataclasses.asdict(built), "sha256": sha256(path)})
    differ = f"{built.xq_mismatches} x_q and {built.acc_mismatches} acc differ in {built.layers_compared} layers"
    watch.say(f"built in {built.seconds:.0f} s, {len(plan):,} bytes; {differ}")


def _fixed(saved: SavedParity) -> dict[str, list[list[int]]]:
    """A profile of one size, the reference's."""
    return {name: [list(value.shape)] * 3 for name, value in saved.inputs.items()}


def _compare_layers(folder: Path, saved: SavedParity, builder: Builder, built: Built) -> Built:
    layers = LayerEngine(folder, saved.layers, builder)
    try:
        compared = layers.compare()
    finally:
        layers.close()
    counted = [layer for layer in compared if layer.acc_compared]
    return dataclasses.replace(
        built,
        layers_compared=len(counted),
        xq_mismatches=sum(layer.xq_mismatches for layer in counted),
        acc_mismatches=sum(layer.acc_mismatches for layer in counted),
        worst_layer=finite(max(layer.rel_err for layer in compared)),
    )


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """An engine that is ready to be timed."""

    folder: Path
    saved: SavedParity
    session: TensorRtSession
    device_bytes: int
    output: np.ndarray


def _measure(folders: Sequence[Path], builder: Builder, settings: Settings) -> list[Row]:
    """The rows of one model, its engines loaded beside each other and timed in turns."""
    with ExitStack() as stack:
        loaded = [_load(folder, builder, settings, stack) for folder in folders]
        timers = {one.folder: one.session.timer(one.saved.inputs) for one in loaded}
        times = in_turns(timers, settings.repeats)
        return [_row(one, times[one.folder], builder, settings) for one in loaded]


def _profile(folder: Path, builder: Builder, watch: Watch) -> None:
    plan, inputs = (folder / "tensorrt" / _PLAN).read_bytes(), load_reference(folder).inputs
    with TensorRtSession(plan, builder.device, builder.log) as session:
        spent = session.layer_times(inputs)
    slowest = sorted(spent.items(), key=lambda item: -item[1])
    path = folder / _PROFILE
    write_json(path, [{"layer": name, "ms": round(ms, 5)} for name, ms in slowest])
    watch.say(f"{path}: {sum(spent.values()):.2f} ms in {len(spent)} layers")


def _load(folder: Path, builder: Builder, settings: Settings, stack: ExitStack) -> _Loaded:
    saved = load_reference(folder)
    gc.collect()
    before = builder.device.free_memory()
    plan = (folder / "tensorrt" / _PLAN).read_bytes()
    session = stack.enter_context(TensorRtSession(plan, builder.device, builder.log, settings.cuda_graph))
    output = session.infer(saved.inputs)
    return _Loaded(folder, saved, session, before - builder.device.free_memory(), output)


def _row(loaded: _Loaded, times: Sequence[float], builder: Builder, settings: Settings) -> Row:
    case, half = cases.load(loaded.folder)
    saved, built = loaded.saved, _found(loaded.folder, builder)
    assert built is not None
    ms, spread = summary(times)
    error, quantized = relative_error(loaded.output, saved.full), relative_error(saved.quantized, saved.full)
    return Row(
        model=case.model,
        engine=case.engine,
        ms=ms,
        spread=spread,
        engine_bytes=(loaded.folder / "tensorrt" / _PLAN).stat().st_size,
        weight_bytes=case.weight_bytes,
        device_bytes=loaded.device_bytes,
        rel_err=finite(relative_error(loaded.output, half)),
        error_ratio=finite(error / max(relative_error(half, saved.full), 1e-30)),
        error_ratio_float32=finite(error / quantized) if case.layers and quantized else None,
        layers_compared=built.layers_compared,
        xq_mismatches=built.xq_mismatches,
        acc_mismatches=built.acc_mismatches,
        worst_layer=built.worst_layer,
        build_seconds=built.seconds,
        cuda_graph=settings.cuda_graph,
        plugin_version=plugin.VERSION if plugin.is_needed(loaded.folder / TENSORRT_MODEL) else None,
    )
