"""Cases to measure, written by PyTorch: on a GPU where there is one, where the XL slice takes a minute."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnx
import torch

from qvdit.bench import blocks
from qvdit.bench.tensorrt import cases
from qvdit.contract import Bits, FrameRows, LowBitLayer, StaticInt8Layer
from qvdit.contract.bundle import TENSORRT_LAYERS, TENSORRT_MODEL
from qvdit.contract.kernels import KernelConstants
from qvdit.contract.layer import Layer
from qvdit.contract.parity import LayerReference, SavedParity, save_half, save_reference
from qvdit.export import graph
from qvdit.export.files import save_model
from qvdit.export.tensorrt import TracedModel, export_tensorrt, tensorrt_model
from qvdit.export.trace import trace
from qvdit.job import Job
from qvdit.magnitudes import largest_values
from qvdit.method import quantization, recipe
from qvdit.method.reference import quantized_transformer, sampled_layers
from qvdit.method.statistics import InputStatistics, Statistics
from qvdit.models import ADAPTERS, ModelAdapter, Site
from qvdit.settings import JobSettings, choose_compute
from qvdit.system import tool_versions

Say = Callable[[str], None]

_BITS = {"w8a8": "w8a8", "w4a8": "w4a8", "w4a8_no_tqe": "w4a8", "w3a6": "w3a6"}
XL_BLOCKS = {"latte-xl-block": 1, "latte-xl-slice": 4, "latte-xl": 28}
_TEXT_TOKENS = 120  # that STDiT and Latte read
_TERM = 0.1  # size of beta, where nothing is calibrated: the term is a few percent of the output


@dataclass(frozen=True)
class Settings:
    """What to prepare."""

    models: tuple[str, ...] = cases.USUAL_MODELS
    engines: tuple[str, ...] = cases.ENGINES
    compute: str = "auto"  # auto, cpu or cuda: where PyTorch runs
    seed: int = 0
    also_low: tuple[str, ...] = ()  # operators in FP16 that the export keeps in float32, as LayerNormalization
    layers: bool = True  # what the integers of every layer are compared by; without it a case is little but its model


@dataclass(frozen=True)
class Source:
    """A model, traced once for all of its engines but static INT8's, whose attention is another."""

    name: str
    transformer: Any  # in full precision, on the device it runs on
    adapter: ModelAdapter
    inputs: dict[str, torch.Tensor]  # FP16-representable, on the CPU
    traced: Callable[[bool], Path]  # by whether attention is fusable
    largest: Callable[[bool], dict[str, float]]  # magnitudes of that graph's values, where they were measured
    layers: Callable[[str], tuple[Layer, ...]]  # of an engine's name

    @property
    def sites(self) -> list[Site]:
        return self.adapter.sites(self.transformer)


def prepare(settings: Settings, root: Path, say: Say) -> list[Path]:
    """Write the cases that are not there yet; returns their folders. What cannot be made here is said and left out."""
    torch.backends.cudnn.allow_tf32 = False  # references are float32
    device = choose_compute(settings.compute)
    written = []
    for model in settings.models:
        engines = cases.engines_of(model, settings.engines)
        missing = [engine for engine in engines if not cases.is_current(cases.folder(root, model, engine))]
        if not missing:
            continue
        source = _random(model, root, settings.seed, device) if model in XL_BLOCKS else _shipped(model, root, device)
        full = _output(source.transformer, source.inputs)
        for engine in missing:
            folder = cases.folder(root, model, engine)
            try:
                write(source, engine, full, folder, settings)
            except ImportError as error:  # int8_qdq's recipe needs NVIDIA ModelOpt; the other engines do not
                say(f"left out: {model} as {engine}, which needs a package: {error}")
                continue
            say(f"prepared {folder}")
            written.append(folder)
    return written


def write(source: Source, engine: str, full: np.ndarray, folder: Path, settings: Settings) -> None:
    """One case. full: the output of full precision."""
    layers: tuple[Layer, ...] = () if engine == "fp16" else source.layers(engine)
    kept = {} if len(layers) == len(source.sites) else _full_weights(source)
    fusable = engine != "int8_qdq"
    traced = TracedModel(source.traced(fusable), layers, kept, source.largest(fusable))
    quantized = full
    references: tuple[LayerReference, ...] = ()
    if layers:
        export_tensorrt(traced, folder, also_low=settings.also_low)
        model = quantized_transformer(source.transformer, layers)
        output, references = sampled_layers(model, _on(source.transformer, source.inputs))
        quantized = output.float().cpu().numpy()
        if not settings.layers:
            references = ()
            for path in (folder / TENSORRT_LAYERS).parent.glob(f"{Path(TENSORRT_LAYERS).name}*"):
                path.unlink()
    else:
        save_model(tensorrt_model(traced, also_low=settings.also_low), folder / TENSORRT_MODEL)
        graph.check(str(folder / TENSORRT_MODEL))
        model = copy.deepcopy(source.transformer)
    arrays = {name: tensor.numpy() for name, tensor in source.inputs.items()}
    save_reference(SavedParity(arrays, quantized, full, references), folder)
    save_half(folder, _output(model.half(), {name: tensor.half() for name, tensor in source.inputs.items()}))
    found = cases.Case(source.name, engine, weight_bytes(source, layers), len(layers), tool_versions())
    cases.save(found, folder)


def weight_bytes(source: Source, layers: tuple[Layer, ...]) -> int:
    """What an engine stores for the weights of the linears, biases aside: the constants of their nodes."""
    stored = {layer.name: _stored(layer) for layer in layers}
    shapes = {site.name: source.transformer.get_submodule(site.name).weight.numel() for site in source.sites}
    return sum(stored.get(name, 2 * count) for name, count in shapes.items())


def _stored(layer: Layer) -> int:
    if isinstance(layer, StaticInt8Layer):
        smooth = 0 if layer.inv_smooth is None else layer.inv_smooth.nbytes
        return layer.weight_q.nbytes + layer.weight_scale.nbytes + smooth
    constants = vars(KernelConstants.of([layer]))
    return sum(value.nbytes for field, value in constants.items() if value is not None and field != "bias")


@torch.no_grad()
def _output(model: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return model(**_on(model, inputs), return_dict=False)[0].float().cpu().numpy()


def _on(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _full_weights(source: Source) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    found = {}
    for site in source.sites:
        linear = source.transformer.get_submodule(site.name)
        bias = None if linear.bias is None else linear.bias.detach().float().cpu().numpy()
        found[site.name] = (linear.weight.detach().float().cpu().numpy(), bias)
    return found


def _tracer(
    transformer: Any, adapter: ModelAdapter, inputs: dict[str, torch.Tensor], folder: Path
) -> Callable[[bool], Path]:
    """Traces a model into a folder, once for each form of its attention, when first asked for."""

    @functools.cache
    def traced(fusable: bool) -> Path:
        widths = {site.name: transformer.get_submodule(site.name).out_features for site in adapter.sites(transformer)}
        model = trace(transformer, adapter, widths, inputs, fusable_attention=fusable)
        path = folder / ("traced.onnx" if fusable else "traced-static.onnx")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # one process an engine is quicker: they share it
            save_model(model, path)
        return path

    return traced


# Shipped models: the job's own stages ---------------------------------------------------------------------------------


def _shipped(model: str, root: Path, device: str) -> Source:
    """A trained model; its layers are those that the job makes of it.

    Of a short calibration and without distillation: engines are measured, not the method.
    """
    work = root / "work" / Path(model).name
    job = _job(model, "w4a8", work, device)
    job.run("statistics")
    transformer, adapter, inputs = job.pipeline.transformer, job.source.adapter, job.example()

    def layers(engine: str) -> tuple[Layer, ...]:
        job = _job(model, engine, work, device)
        job.run("quantize")
        return job.layers

    traced = _tracer(transformer, adapter, inputs, work)
    source = Source(model, transformer, adapter, inputs, traced, _unmeasured, layers)

    @functools.cache
    def largest(fusable: bool) -> dict[str, float]:
        baseline = work / ("baseline.onnx" if fusable else "baseline-static.onnx")
        save_model(graph.baseline_model(onnx.load(traced(fusable)), _full_weights(source)), baseline)
        return largest_values(baseline, {name: tensor.numpy() for name, tensor in inputs.items()})

    return dataclasses.replace(source, largest=largest)


def _unmeasured(_: bool) -> dict[str, float]:
    """No value of random weights comes near what FP16 holds: nothing to measure."""
    return {}


def _job(model: str, engine: str, work: Path, device: str) -> Job:
    static = engine == "int8_qdq"
    settings = JobSettings(
        model=model,
        out=work / engine,
        bits="w8a8" if static else _BITS[engine],
        recipe="int8-static" if static else "qvdit",
        target="tensorrt",
        prompt_count=1,
        steps=8,
        records=2,
        compute=device,
        distillation_steps=0,
        rank=0 if engine == "w4a8_no_tqe" else None,
        calibration=work / "calibration",
    )
    return Job(settings)


# Random models of real size -------------------------------------------------------------------------------------------


def _random(model: str, root: Path, seed: int, device: str) -> Source:
    """A Latte of XL size; layers as the recipe would make them for inputs that are white noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = blocks.latte_xl(XL_BLOCKS[model]).eval().requires_grad_(False)
        config = transformer.config
        video = torch.randn(1, config.in_channels, config.video_length, config.sample_size, config.sample_size)
        text = torch.randn(2, _TEXT_TOKENS, blocks.TEXT_FEATURES)
    adapter = next(a for a in ADAPTERS if a.class_name == type(transformer).__name__)
    guided = {"hidden_states": video.repeat(2, 1, 1, 1, 1), "timestep": torch.full((2,), 500.0)}
    inputs = {name: x.half().float() for name, x in {**guided, "encoder_hidden_states": text}.items()}
    transformer.to(device)

    def layers(engine: str) -> tuple[Layer, ...]:
        if engine == "int8_qdq":
            return static_layers(transformer, adapter, inputs)
        return random_layers(transformer, adapter, inputs, Bits.parse(_BITS[engine]), engine != "w4a8_no_tqe", seed)

    traced = _tracer(transformer, adapter, inputs, root / "work" / model)
    return Source(model, transformer, adapter, inputs, traced, _unmeasured, layers)


class _OneRecord:
    """Calibration data of one record: quantization asks it for the number of frames alone."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        self._inputs = inputs

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self._inputs])


def random_layers(
    transformer: Any,
    adapter: ModelAdapter,
    inputs: dict[str, torch.Tensor],
    bits: Bits,
    tqe: bool,
    seed: int = 0,
) -> tuple[LowBitLayer, ...]:
    """Layers of the qvdit recipe's form (zeros, rotation, asymmetry as the bits want them), rounded to nearest.

    Statistics are those of white noise. With TQE: a random term of rank 1, its gain by frame where rows are of frames.
    """
    chosen = recipe.override(
        recipe.load("qvdit"), weights={"clip_by": "weight", "rounding": "nearest"}, tqe={"rank": 0}
    )
    white: dict[int, InputStatistics] = {}
    of_input: dict[str, InputStatistics] = {}
    device = next(transformer.parameters()).device
    for site in adapter.sites(transformer):
        k = transformer.get_submodule(site.name).in_features
        if k not in white:
            one = torch.ones(1, k, device=device)
            white[k] = InputStatistics(one, 0 * one[0], torch.eye(k, device=device))
        of_input[site.shared_input] = white[k]
    job = quantization.QuantizationJob(chosen, bits, 0, seed)
    data: Any = _OneRecord(inputs)
    layers = quantization.quantize(transformer, adapter, Statistics(of_input), data, job)
    if not tqe:
        return tuple(layer for layer in layers if isinstance(layer, LowBitLayer))
    rng, frames = np.random.default_rng(seed), adapter.frames(dict(transformer.config), inputs)
    rows = {site.name: site.rows for site in adapter.sites(transformer)}
    return tuple(_with_term(layer, rows[layer.name], frames, rng) for layer in layers if isinstance(layer, LowBitLayer))


def _with_term(layer: LowBitLayer, rows: FrameRows, frames: int, rng: np.random.Generator) -> LowBitLayer:
    n, k = layer.shape
    return dataclasses.replace(
        layer,
        rows=rows,
        alpha=(rng.standard_normal((k, 1)) / k**0.5).astype(np.float16),
        beta=(_TERM * rng.standard_normal((1, n))).astype(np.float16),
        frame_gain=None if rows is FrameRows.NONE else (0.5 + rng.random(frames)).astype(np.float32),
    )


@torch.no_grad()
def static_layers(
    transformer: Any, adapter: ModelAdapter, inputs: dict[str, torch.Tensor]
) -> tuple[StaticInt8Layer, ...]:
    """Static INT8 by the largest magnitude of one run, without smoothing: nothing that would slow TensorRT's down."""
    peaks: dict[str, float] = {}
    sites = adapter.sites(transformer)
    handles = [
        transformer.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: peaks.update({name: float(args[0].abs().max())})
        )
        for site in sites
    ]
    try:
        transformer(**_on(transformer, inputs), return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_static(site.name, transformer.get_submodule(site.name), peaks[site.name]) for site in sites)


def _static(name: str, linear: Any, peak: float) -> StaticInt8Layer:
    weight = linear.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-8)
    return StaticInt8Layer(
        name=name,
        weight_q=torch.round(weight / scale[:, None]).to(torch.int8).cpu().numpy(),
        weight_scale=scale.cpu().numpy(),
        act_scale=np.array(peak / 127, np.float32),
        bias=None if linear.bias is None else linear.bias.detach().float().cpu().numpy(),
    )
