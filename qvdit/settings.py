"""What a user may choose, and what follows from it: recipe, device, calibration plan, prompts to judge by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qvdit.contract import QvditError
from qvdit.contract.bundle import PRECISIONS
from qvdit.contract.video import VideoSize
from qvdit.export.devices import EdgeDevice, find_device
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationPlan, read_prompts
from qvdit.models.loading import WORLD_PIPELINE, SourceModel
from qvdit.quality import Trial

TARGETS = ("onnxruntime", "tensorrt")
ATTENTIONS = ("plugin", "tensorrt")
_PROMPTS = {"cpu": 4, "cuda": 48}  # sampled for calibration when the user does not say


@dataclass(frozen=True)
class JobSettings:
    """Everything a user may choose; the defaults run the shipped model on two cores in under three minutes."""

    model: str = "wan-shapes"
    out: Path = Path("out")
    bits: str = "w4a8"
    recipe: str = "qvdit"
    target: str = "onnxruntime"
    device: str | None = None  # the machine that the bundle is for: orin, thor or local
    jetpack: str | None = None  # its software, where it is a Jetson; the newest known one when absent
    prompts: Path | None = None  # a text file; the shipped prompts of the reference world when absent
    prompt_count: int | None = None  # how many of them to sample; by device when absent
    steps: int = 20
    records: int = 8
    guidance: float = 2.5
    size: VideoSize | None = None  # of the videos that are sampled; the pipeline's own when absent
    seed: int = 0
    compute: str = "auto"  # where calibration and distillation run
    distillation_steps: int | None = None
    rank: int | None = None
    layer_bits: dict[str, int] = field(default_factory=dict)
    calibration: Path | None = None  # folder of calibration data and statistics, OUT/work/calibration when absent
    videos: int = 3  # sampled by both models for the report
    threads: int = 2
    weight_only: bool = False  # tensorrt/model.int4.onnx as well
    attention: str = "plugin"  # what computes it in a TensorRT engine with the plugin's layers
    precision: str = "fp16"  # of a TensorRT graph, where it has 16 bits


def check_target(target: str) -> None:
    """Refuse a target that there is no builder for."""
    if target not in TARGETS:
        raise QvditError(f"--target {target!r}", f"one of {', '.join(TARGETS)}", "check --target")


def choose_edge(settings: JobSettings) -> EdgeDevice | None:
    """The machine that the bundle is for, where the user names one."""
    if settings.device is None:
        if settings.jetpack is not None:
            raise QvditError(
                f"--jetpack {settings.jetpack} without --device", "--device orin or thor", "name the device"
            )
        return None
    device = find_device(settings.device, settings.jetpack)
    if settings.precision == "bf16" and device.tensorrt == "8.6":
        wrong = f"--precision bf16 for {device.title} with JetPack {device.jetpack}"
        raise QvditError(wrong, "TensorRT 10 or newer, where it has 8.6", "choose fp16, or a newer --jetpack")
    if settings.target != "tensorrt":
        raise QvditError(
            f"--device {device.name} with --target {settings.target}", "--target tensorrt", "leave out one of them"
        )
    return device


def check_graph(settings: JobSettings) -> None:
    """Refuse an ``--attention`` or ``--precision`` that there is not, or that nothing would come of."""
    for option, value, known in (
        ("--attention", settings.attention, ATTENTIONS),
        ("--precision", settings.precision, tuple(PRECISIONS)),
    ):
        if value not in known:
            raise QvditError(f"{option} {value!r}", f"one of {', '.join(known)}", f"check {option}")
        if value != known[0] and settings.target != "tensorrt":
            wrong = f"{option} {value} with --target {settings.target}"
            raise QvditError(wrong, "--target tensorrt", "leave out one of them")


def check_weight_only(settings: JobSettings, recipe: recipes.Recipe) -> None:
    """Refuse ``--weight-only`` where nothing would come of it, whatever the layers are."""
    if settings.weight_only and settings.target != "tensorrt":
        raise QvditError(f"--weight-only with --target {settings.target}", "--target tensorrt", "add it")
    if settings.weight_only and recipe.kind == "static":
        raise QvditError(
            f"--weight-only with recipe {recipe.name}", "4-bit weights", "leave it out, or choose another recipe"
        )


def choose_recipe(settings: JobSettings) -> recipes.Recipe:
    """The recipe, with the user's rank and layer bits in it."""
    chosen = recipes.load(settings.recipe)
    if settings.distillation_steps and not chosen.distillation.steps:
        raise QvditError(
            f"--distill-steps {settings.distillation_steps} with recipe {chosen.name}",
            "a recipe that trains",
            "leave it out, or choose another recipe",
        )
    if chosen.kind == "static" and (settings.layer_bits or settings.rank):
        raise QvditError(
            f"--layer-bits or --rank with recipe {chosen.name}", "neither", "leave them out: its layers are all INT8"
        )
    for glob, bits in settings.layer_bits.items():
        recipes.check_layer_bits(glob, bits)
    if settings.rank is not None:
        if not 0 <= settings.rank <= recipes.MAX_RANK:
            raise QvditError(f"--rank {settings.rank}", f"0 … {recipes.MAX_RANK}", "1 is the paper's")
        chosen = recipes.override(chosen, tqe={"rank": settings.rank})
    asked = settings.layer_bits  # the user's patterns come first, and win where the recipe has the same one
    return dataclasses.replace(chosen, layer_bits={**asked, **{**chosen.layer_bits, **asked}})


def calibration_plan(settings: JobSettings, source: SourceModel, device: str) -> CalibrationPlan:
    """What to sample for calibration."""
    if settings.prompts is None and source.pipeline != WORLD_PIPELINE:
        raise QvditError(
            f"a {source.pipeline} and no --prompts",
            "a text file of prompts that this model is used with",
            "the shipped ones are for the drawn world: give --prompts FILE",
        )
    if settings.size is not None and source.pipeline == WORLD_PIPELINE:
        refused = f"--size {settings.size} with {source.name}, which samples videos of one size"
        raise QvditError(refused, "its own size", "leave out --size")
    prompts = read_prompts(settings.prompts or shipped_prompts())
    if not prompts:
        raise QvditError("no prompts", "at least one line in the prompts file", "check --prompts")
    if settings.prompt_count and len(prompts) < settings.prompt_count:
        raise QvditError(f"{len(prompts)} prompts", f"the {settings.prompt_count} asked for", "lower --prompt-count")
    return CalibrationPlan(
        prompts[: settings.prompt_count or _PROMPTS[device]],
        settings.steps,
        settings.records,
        settings.guidance,
        settings.seed,
        source.sampling,
        settings.size,
    )


def quality_trial(settings: JobSettings) -> Trial:
    """What to sample for the report: fresh prompts of the drawn world, or the last ones of the user's file."""
    if settings.prompts is None:
        known = read_prompts(shipped_prompts())
        return Trial.fresh(settings.videos, 2026 + settings.seed, settings.steps, settings.guidance, known)
    prompts = read_prompts(settings.prompts)[-settings.videos :]
    trial = Trial.of(prompts, 2026 + settings.seed, settings.steps, settings.guidance)
    return dataclasses.replace(trial, size=settings.size)


def shipped_prompts() -> Path:
    """The calibration prompts of the reference world that come with the package."""
    import qvdit.calib_data

    return Path(qvdit.calib_data.__file__).parent / "shapes.txt"


def choose_compute(name: str) -> str:
    """``auto``, ``cpu`` or ``cuda`` → the device that calibration and distillation run on."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise QvditError(f"--compute {name!r}", "auto, cpu or cuda", "check --compute")
    if name == "cuda" and not torch.cuda.is_available():
        raise QvditError("--compute cuda", "a GPU that PyTorch can see", "use --compute cpu, or install a CUDA build")
    return name
