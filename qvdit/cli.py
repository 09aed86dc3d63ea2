"""The command line: ``qvdit-export``, the one-shot job, and ``qvdit``, its stages and tools."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qvdit import __version__
from qvdit.bench.command import app as bench
from qvdit.contract import ACT_BITS, WEIGHT_BITS, QvditError
from qvdit.contract.errors import in_one_line
from qvdit.contract.video import VideoSize

if TYPE_CHECKING:
    from qvdit.job import Job

console = Console()
errors = Console(stderr=True)

_BITS = (
    f"wXaY: weights of X = {', '.join(map(str, WEIGHT_BITS))} bits, activations of Y = {', '.join(map(str, ACT_BITS))}."
)

Model = Annotated[str, typer.Option(help="A diffusers pipeline's folder, or wan-shapes or latte-shapes (shipped).")]
Out = Annotated[Path, typer.Option(help="The bundle's folder. Finished stages in it are reused.")]
BitsOption = Annotated[str, typer.Option(help=_BITS)]
RecipeOption = Annotated[str, typer.Option(help="The method: a name that `qvdit doctor` lists, or a YAML file.")]
Target = Annotated[str, typer.Option(help="What the bundle is for: onnxruntime, or tensorrt.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="The machine that a TensorRT bundle is for: orin, thor or local. OUT/edge is then a folder to copy to it, "
        "which needs no PyTorch there."
    ),
]
JetPack = Annotated[
    str | None, typer.Option(help="A Jetson's software: 6.0, 6.1 or 6.2 for orin, 7.0 for thor (default: newest).")
]
WeightOnly = Annotated[
    bool,
    typer.Option(
        "--weight-only",
        help="With --target tensorrt: tensorrt/model.int4.onnx as well, INT4 weights for TensorRT 10 and later, "
        "activations in floating point.",
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        help="With --target tensorrt, what computes attention: plugin, many times as fast as TensorRT 8.6's operators, "
        "or tensorrt, which has fused kernels of its own from 10 on."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="With --target tensorrt, what the graph computes in where 16 bits are enough: fp16, with float32 around "
        "values that it may not hold, or bf16, which holds them, for TensorRT 10 and later (not built there yet)."
    ),
]
Prompts = Annotated[Path | None, typer.Option(help="Text file of calibration prompts, one a line (default: shipped).")]
PromptCount = Annotated[int | None, typer.Option(min=1, help="Prompts to sample (default: 4 on a CPU, 48 on a GPU).")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler, for calibration and videos.")]
Records = Annotated[int, typer.Option(min=1, help="Steps recorded of each calibration trajectory.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Frames, height and width of the videos, in pixels, as 17x256x448 (default: the pipeline's own). "
        "Calibration, parity and the report's videos run at this size; ONNX files keep its number of frames."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same bytes, on a CPU.")]
Compute = Annotated[str, typer.Option(help="Where calibration and distillation run: auto, cpu or cuda.")]
DistillSteps = Annotated[
    int | None, typer.Option(min=0, help="Distillation budget; 0 is none (default: the recipe's, 0 on a CPU).")
]
Rank = Annotated[int | None, typer.Option(help="Rank of TQE's run-time term (default: the recipe's).")]
LayerBits = Annotated[
    list[str] | None,
    typer.Option(help="GLOB=BITS for some layers' weights, 16 keeps them: --layer-bits '*.ffn.*=8'. First match wins."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Folder of calibration data and statistics, another bundle's say (default: OUT/work/calibration)."
    ),
]
Videos = Annotated[int, typer.Option(min=1, help="Videos that both models sample for the report.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")]
Bundle = Annotated[Path, typer.Argument(help="A folder that qvdit-export made.")]

app = typer.Typer(
    name="qvdit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-bit video diffusion transformers: calibrate, quantize, export, run, prove. "
    "`qvdit-export` does all of it in one go.",
)
app.add_typer(bench, name="bench")


def _stage_command(last: str) -> Callable[..., None]:
    """A command that runs the job up to a stage."""

    def command(
        model: Model = "wan-shapes",
        out: Out = Path("out"),
        bits: BitsOption = "w4a8",
        recipe: RecipeOption = "qvdit",
        target: Target = "onnxruntime",
        device: Device = None,
        jetpack: JetPack = None,
        weight_only: WeightOnly = False,
        attention: Attention = "plugin",
        precision: Precision = "fp16",
        prompts: Prompts = None,
        prompt_count: PromptCount = None,
        steps: Steps = 20,
        records: Records = 8,
        guidance: Guidance = 2.5,
        size: Size = None,
        seed: Seed = 0,
        compute: Compute = "auto",
        distill_steps: DistillSteps = None,
        rank: Rank = None,
        layer_bits: LayerBits = None,
        calibration: Calibration = None,
        videos: Videos = 3,
        threads: Threads = 2,
    ) -> None:
        from qvdit.job import Job
        from qvdit.settings import JobSettings

        settings = JobSettings(
            model=model,
            out=out,
            bits=bits,
            recipe=recipe,
            target=target,
            device=device,
            jetpack=jetpack,
            weight_only=weight_only,
            attention=attention,
            precision=precision,
            prompts=prompts,
            prompt_count=prompt_count,
            steps=steps,
            records=records,
            guidance=guidance,
            size=None if size is None else VideoSize.parse(size),
            seed=seed,
            compute=compute,
            distillation_steps=distill_steps,
            rank=rank,
            layer_bits=_layer_bits(layer_bits or []),
            calibration=calibration,
            videos=videos,
            threads=threads,
        )
        job = Job(settings)
        with _progress() as observe:
            job.observe = observe
            job.run(last)
        _say_result(job, last)

    return command


_export = _stage_command("quality")
_export.__doc__ = """Quantize a trained video DiT and export it as a proven bundle: the whole job in one command.

    calibrate → statistics → quantize → trace → export → parity → speed → quality → report

    Example:  qvdit-export --target onnxruntime --bits w4a8 --out out/w4a8

    TensorRT, the engine built here:  qvdit-export --target tensorrt --bits w4a8 --out out/w4a8

    TensorRT, a folder to copy to a Jetson:  qvdit-export --target tensorrt --device orin --bits w4a8 --out out/orin

    A killed job goes on where it stopped when it is started again. The result: OUT/onnx (models), OUT/quantized
    (checkpoint), OUT/report.html (look at this), OUT/report.json, OUT/manifest.json; OUT/tensorrt (model and engine) or
    OUT/edge (the folder to copy).
    """
for _name, _last, _help in (
    ("calibrate", "statistics", "Sample the full-precision model, record its inputs and collect statistics."),
    ("quantize", "quantize", "Everything up to the quantized checkpoint in OUT/quantized."),
    ("export", "export", "Everything up to the ONNX files in OUT/onnx."),
):
    app.command(_name, help=_help)(_stage_command(_last))


@app.command()
def run(
    bundle: Bundle,
    out: Annotated[Path, typer.Option(help="The video to write: .webp (lossless), .gif, or .safetensors for latents.")],
    model: Annotated[
        str | None,
        typer.Option(help="The bundle's model: its pipeline's folder (default: the shipped one of its name)."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to sample.")] = (
        "a red circle moving right in front of a blue square circling clockwise on a grey background"
    ),
    steps: Steps = 20,
    guidance: Guidance = 2.5,
    size: Annotated[
        str | None,
        typer.Option(help="Frames, height and width in pixels (default: those that the bundle was made with)."),
    ] = None,
    seed: Seed = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of ONNX Runtime (default: 2 on a CPU, its own choice on a GPU).")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the quantized model runs: cpu, cuda or cuda:N.")] = "cpu",
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs it: onnxruntime on a CPU; on a GPU pytorch (the CUDA kernels), tensorrt (the engine that "
            "`qvdit engine` built) or onnxruntime (default: the first)."
        ),
    ] = None,
) -> None:
    """Sample a video with a bundle's quantized model in its pipeline.

    On a CPU:  qvdit run out/w4a8 --out video.webp

    On a GPU, by its TensorRT engine:  qvdit run out/w4a8 --device cuda --engine tensorrt --out video.webp
    """
    import qvdit.runtimes
    from qvdit.method.calibration import sample
    from qvdit.models.loading import find_model
    from qvdit.videos import check_suffix, write_video

    check_suffix(out)
    asked = None if size is None else VideoSize.parse(size)
    transformer = qvdit.runtimes.load(bundle, threads or (2 if device == "cpu" else None), device, engine=engine)
    if asked is None and transformer.manifest.size is not None:
        asked = VideoSize.parse(transformer.manifest.size)
    source = find_model(model or transformer.manifest.model)
    if transformer.manifest.source != source.fingerprint:
        raise QvditError(
            f"--model {source.name}", f"the model of this bundle ({transformer.manifest.model})", "check --model"
        )
    with console.status("loading"):
        pipeline = _with_transformer(source.load(), transformer, device)
    started = time.monotonic()
    with console.status(f"sampling {steps} steps"):
        video = sample(pipeline, [prompt], steps, guidance, [seed], asked).cpu()  # a GPU may not have finished before
    seconds = time.monotonic() - started
    write_video(video, out)
    console.print(f"wrote {out}, sampled in {seconds:.1f} s", soft_wrap=True)


def _with_transformer(pipeline: Any, transformer: Any, device: str) -> Any:
    """A pipeline with a quantized transformer, its other parts beside that, unless this PyTorch knows no GPU."""
    import torch

    pipeline.transformer = transformer
    text_encoder = getattr(pipeline, "text_encoder", None)
    if text_encoder is not None:
        text_encoder.to(transformer.dtype)  # whose type some pipelines give the latents
    return pipeline.to(device if torch.cuda.is_available() else "cpu")


@app.command()
def parity(
    bundle: Bundle,
    threads: Threads = 2,
    device: Annotated[str, typer.Option(help="Where ONNX Runtime runs: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Check a bundle against the reference run it carries: every layer's integers, then the whole model. No PyTorch."""
    from qvdit.runtimes.parity import tell

    raise typer.Exit(0 if tell(bundle, threads, device, _say_line) else 1)


@app.command()
def engine(
    bundle: Bundle,
    video_size: Annotated[
        list[str] | None,
        typer.Option(
            help="Height and width of the model's input, HxW, once for each size; the engine spans them, and is "
            "fastest at the first (default: the example's)."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Largest batch (default: the example's).")] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="The example's shapes and no other: quicker to build and to run.")
    ] = False,
    workspace: Annotated[
        str | None, typer.Option(help="Scratch memory for the build, as 512M or 4G (default: all there is).")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0, fast to build, to 5 (default: TensorRT's own, 3).")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Measurements to reuse (default: timing.cache beside the engine).")
    ] = None,
    plugin: Annotated[
        Path | None,
        typer.Option(
            help="The plugin's library, libqvdit_tensorrt.so (default: what QVDIT_TENSORRT_PLUGIN names, or the one "
            "beside the engine)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU to build and prove on: cuda or cuda:N.")] = "cuda",
    verbose: Annotated[bool, typer.Option("--verbose", help="All that TensorRT says, on stderr.")] = False,
) -> None:
    """Build and prove the TensorRT engine of an exported bundle, on the machine that is to run it. No PyTorch.

    The engine is BUNDLE/tensorrt/model.plan. It gets there once every layer's integers and the whole model have passed
    parity (BUNDLE/tensorrt/parity.json); until then the last one stays.

    One size, quick to build:  qvdit engine out/w4a8 --fixed

    Several:  qvdit engine out/w4a8 --video-size 32x32 --video-size 48x48 --batch 4
    """
    from qvdit.runtimes.tensorrt.build import BuildOptions, build_engine, parse_bytes, parse_size
    from qvdit.runtimes.tensorrt.progress import shown

    options = BuildOptions(
        video_sizes=tuple(map(parse_size, video_size or [])),
        batch=batch,
        fixed=fixed,
        workspace=parse_bytes(workspace),
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        plugin=plugin,
        verbose=verbose,
    )
    with shown() as (say, report):
        build_engine(bundle, options, device, say, report)


@app.command()
def inspect(bundle: Bundle) -> None:
    """Tell what a bundle holds: model, recipe, bits, sizes, every quantized layer."""
    from qvdit.contract import checkpoint
    from qvdit.contract.bundle import verify
    from qvdit.contract.layer import WeightSize

    manifest = verify(bundle)
    layers = checkpoint.load(bundle / "quantized").layers
    size = WeightSize.of(layers)
    console.print(f"{manifest.model} ({manifest.class_name}), recipe {manifest.recipe}, {manifest.bits}")
    console.print(
        f"quantized weights: {size.quantized_bytes:,} bytes, {size.effective_bits:.2f} bits each, everything counted "
        f"({size.nominal_bits:.2f} nominal), {size.quantized_bytes / size.fp16_bytes:.3f} of FP16",
        soft_wrap=True,
    )
    for name in manifest.files:
        console.print(f"  {name}  {(bundle / name).stat().st_size:,} bytes  sha256 ok")
    table = Table("layer", "N x K", "bits", "rank", "kind")
    for layer in layers:
        bits = f"w{layer.weight_bits}a{layer.act_bits}"
        table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", bits, str(layer.rank), layer.kind)
    console.print(table)


@app.command()
def doctor() -> None:
    """Tell what this machine has for each target, and what is missing."""
    import torch

    from qvdit.method import recipe as recipes
    from qvdit.runtimes.onnxruntime import saturates
    from qvdit.system import edge_tools, missing_for_tensorrt, tensorrt_parts, tool_versions

    for name, version in tool_versions().items():
        console.print(f"{name} {version}")
    console.print(f"recipes: {', '.join(recipes.names())}", soft_wrap=True)
    console.print(
        f"cuda: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU that PyTorch can see'}"
    )
    slow = "no VNNI: 8-bit products run unsigned, exact but slower" if saturates() else "fast 8-bit products"
    console.print(f"onnxruntime target: ready, {slow}")
    for line in tensorrt_parts():
        _say_line(line)
    missing = missing_for_tensorrt()
    console.print(
        f"tensorrt target: {'ready' if missing is None else f'no engine can be built here: {missing}'}", soft_wrap=True
    )
    for device, tools in edge_tools().items():
        _say_line(f"plugin for {device}: {tools}")


@app.command()
def compare(
    out: Annotated[
        Path, typer.Option(help="Folder of the table, of its cells (OUT/cells) and of heavy data (OUT/work).")
    ] = Path("out/compare"),
    models: Annotated[
        str, typer.Option(help="Shipped models or pipelines' folders, separated by commas, or all shipped models.")
    ] = "all",
    recipes: Annotated[
        str, typer.Option(help="Recipes or YAML files, separated by commas, or all shipped ones but the static one.")
    ] = "all",
    bits: Annotated[
        str, typer.Option(help="Bit widths, separated by commas.")
    ] = "w8a8,w6a6,w4a8,w4a6,w3a8,w3a6,w2a8,w2a6",
    regimes: Annotated[
        str,
        typer.Option(help="uniform: all layers alike; mlp8: MLP weights at 8 bits, measured at w4a6, w3a8 and w3a6."),
    ] = "uniform,mlp8",
    videos: Annotated[int, typer.Option(min=2, help="Fresh prompts a seed that every cell samples.")] = 256,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of fresh prompts and noise; training happens once.")] = 3,
    prompt_count: PromptCount = None,
    steps: Steps = 20,
    records: Records = 10,
    guidance: Guidance = 2.5,
    compute: Compute = "auto",
    distill_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Budget of every recipe that trains (default: 1000 on a GPU, 0 on a CPU)."),
    ] = None,
    distill_batch: Annotated[int, typer.Option(min=1, help="Batch of every recipe that trains.")] = 32,
    learning_rates: Annotated[
        str, typer.Option(help="Rates that each training recipe tries at w3a6; the best on held-out prompts is used.")
    ] = "2e-4,5e-4,1e-3",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Videos sampled at once, and most calibration prompts in a pass (default: 256 on a GPU, 32 on a CPU).",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Start no cell that would end later; the same command goes on (default: no limit)."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the work, taking turns over the GPUs that are visible.")
    ] = 1,
    cells: Annotated[
        Path | None, typer.Option(help="Folder of finished cells, to be read and added to (default: OUT/cells).")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Sample in PyTorch's simulation even where the CUDA kernels are built.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Measure nothing: write the table and pictures of the finished cells.")
    ] = False,
) -> None:
    """Compare methods fairly: one table of models, recipes and bit widths, all on the same data, prompts and noise.

    Writes OUT/quality.json, OUT/table.md, OUT/widths.png and OUT/bits.png.

    On two cores, in a few minutes:

    qvdit compare --models wan-shapes --recipes rtn,smoothquant --bits w4a8,w2a6 --videos 4 --seeds 1 --prompt-count 2
    --steps 4 --out out/small

    The whole table, on a GPU, in several goes of 25 minutes:

    qvdit compare --minutes 25 --out out/table

    Every cell is saved as it is done, and the same command goes on with those that are missing, the most telling first.
    Videos are sampled with the CUDA kernels where they are built (see qvdit doctor), several times faster.
    One process leaves a GPU idle most of the time: --processes 7 keeps one busy, 14 keep two. Commands started several
    times share the work, too. Cells are small files: copy OUT/cells of several machines into one folder, and

    qvdit compare --render --out out/table

    writes their table without a GPU. Cells of other settings do not mix: the table says how many it leaves out.
    """
    from qvdit.compare import display, job, workers
    from qvdit.compare.settings import CompareSettings

    settings = CompareSettings(
        models=models,
        recipes=recipes,
        bits=bits,
        regimes=regimes,
        videos=videos,
        seeds=seeds,
        prompt_count=prompt_count,
        steps=steps,
        records=records,
        guidance=guidance,
        compute=compute,
        distillation_steps=distill_steps,
        distillation_batch=distill_batch,
        learning_rates=learning_rates,
        batch=batch,
        simulate=simulate,
    )
    places, command = job.Places(out, cells), shlex.join(["qvdit", *sys.argv[1:]])
    with _going_on(), display.bars(errors) as watch:
        if render:
            outcome, found = None, job.render(places, watch)
        elif processes > 1:
            outcome, found = workers.run(settings, places, watch, command, minutes, processes)
        else:
            outcome, found = job.run(settings, places, watch, command, minutes)
    if found:
        for table in display.tables(found):
            console.print(table)
        console.print(f"look at {out / 'table.md'}", soft_wrap=True)
    if outcome is not None:
        display.say_left(console, outcome)
    raise typer.Exit(1 if outcome is not None and outcome.failed else 0)


# Running it --------------------------------------------------------------------------------------------------------


def _layer_bits(options: list[str]) -> dict[str, int]:
    parsed = {}
    for option in options:
        glob, _, bits = option.rpartition("=")
        if not glob or not bits.isdigit():
            raise QvditError(f"--layer-bits {option!r}", "GLOB=BITS", "for example --layer-bits '*.ffn.*=8'")
        parsed[glob] = int(bits)
    return parsed


@contextmanager
def _going_on() -> Iterator[None]:
    """Ctrl-C is no error: what is done is kept."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        raise typer.Exit(130) from None


@contextmanager
def _progress() -> Iterator[Callable[[str], Any]]:
    """A bar for every stage, one below the other."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<11}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:

        @contextmanager
        def observe(stage: str) -> Iterator[Callable[[int, int], None]]:
            task = bars.add_task(stage, total=None)
            with _going_on():
                yield lambda done, total: bars.update(task, completed=done, total=total)
            bars.update(task, completed=1, total=1)

        yield observe


def _say_result(job: Job, last: str) -> None:
    out = job.out
    reused = [name for name, cost in {**job.calibration_stages.costs, **job.stages.costs}.items() if cost.reused]
    if reused:
        console.print(f"reused: {', '.join(reused)}", soft_wrap=True)
    if job.replaced and job.replaced != f"{job.recipe.name} {job.bits}":
        console.print(f"replaced: the {job.replaced} bundle that was in {out}", soft_wrap=True)
    if last == "quality":
        _say_report(json.loads((out / "report.json").read_text()))
        console.print(f"look at {out / 'report.html'}", soft_wrap=True)
    else:
        console.print(f"done up to {last} in {out}; qvdit-export with the same options finishes it", soft_wrap=True)
    if job.edge_device is not None:
        if last == "quality":
            _say_edge(job)
    elif job.settings.target == "tensorrt" and last in ("export", "quality"):
        _build_engine(job)


def _say_report(report: dict[str, Any]) -> None:
    parity_, size, speed, quality = (report[name] for name in ("parity", "size", "speed", "quality"))
    console.print(
        f"parity   {parity_['layers_compared']} of {parity_['layers_total']} layers compared, "
        f"{parity_['xq_mismatches']} x_q and {parity_['acc_mismatches']} acc differ, "
        f"error against full precision {parity_['error_ratio']:.3f} of PyTorch's"
    )
    console.print(
        f"size     {size['ratio']:.3f} of FP16, {size['effective_weight_bits']:.2f} bits a weight, everything counted"
    )
    console.print(
        f"speed    forward {speed['fp32_ms']:.0f} → {speed['quantized_ms']:.0f} ms (spread {speed['spread']:.0%}), "
        f"a 1152 x 4608 linear {speed['linear_fp32_ms']:.0f} → {speed['linear_quantized_ms']:.0f} ms"
    )
    if quality["psnr_db"] is not None:
        full, low = quality["fp"]["scene_consistency"], quality["quantized"]["scene_consistency"]
        console.print(
            f"quality  {quality['videos']} videos: PSNR {quality['psnr_db']:.1f} dB, "
            f"scene consistency {full:.3f} → {low:.3f}"
        )


def _say_edge(job: Job) -> None:
    """Where the device's folder is, and whether it brings a compiled plugin."""
    from qvdit.contract.bundle import DEVICE, EDGE, SAMPLING_PLAN

    folder = job.out / EDGE
    about = json.loads((folder / DEVICE).read_text())
    jetpack = f", JetPack {about['jetpack']}, TensorRT {about['tensorrt']}" if about["jetpack"] else ""
    _say_line(f"edge     {folder} for {about['title']}{jetpack}: copy it there and run ./build.sh in it")
    if about["plugin"]:
        _say_line(f"         with the plugin compiled by {about['plugin']}")
    if about["missing"]:
        _say_line(f"         without a compiled plugin ({about['missing']}): build.sh compiles it on the device")
    if not (folder / SAMPLING_PLAN).is_file():
        _say_line("         without a sampling plan: only pipelines like the shipped models' can be put into numbers")


def _build_engine(job: Job) -> None:
    """Build and prove the engine of an exported bundle, or say what is missing and what to run where it is not."""
    from qvdit.system import missing_for_tensorrt

    static = job.recipe.kind == "static"
    missing = missing_for_tensorrt(with_plugin=not static)
    if missing:
        needs = "TensorRT and a GPU" if static else "TensorRT, a GPU and a build of the LowBitLinear plugin"
        raise QvditError(
            missing,
            f"{needs} to build an engine",
            f"everything up to the engine is in {job.out}: copy it to a machine that has them and run there: "
            f"python -m qvdit.runtimes.tensorrt {shlex.quote(str(job.out))}",
        )
    from qvdit.runtimes.tensorrt.build import BuildOptions, build_engine
    from qvdit.runtimes.tensorrt.progress import shown

    with shown() as (say, report):
        build_engine(job.out, BuildOptions(), say=say, report=report)


def _say_line(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _quiet() -> None:
    """Libraries' chatter is not the user's: our own words are enough."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("QVDIT_DEBUG"):
        warnings.simplefilter("ignore")
        for name in ("diffusers", "transformers", "torch", "modelopt", "onnx_ir", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _guarded(command: Callable[[], Any]) -> None:
    """Run a command; a user's error is one line and exit status 2."""
    _quiet()
    try:
        command()
    except (QvditError, OSError, RuntimeError) as error:
        told = _without_room(error) if isinstance(error, RuntimeError) else error
        if told is None or (not isinstance(error, QvditError) and os.environ.get("QVDIT_DEBUG")):
            raise
        errors.print(in_one_line(told), style="red", soft_wrap=True, highlight=False, markup=False)
        sys.exit(2)


def _without_room(error: RuntimeError) -> QvditError | None:
    """PyTorch's report of a full GPU, for the user to read; None for any other error."""
    if type(error).__name__ != "OutOfMemoryError":  # by name: PyTorch may not be there
        return None
    return QvditError(
        f"a GPU without room ({str(error).splitlines()[0]})",
        "enough free memory on it",
        "end other programs on the GPU, or choose a smaller model or batch",
    )


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        console.print(f"qvdit {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of ``qvdit``."""
    _guarded(app)


def main_export() -> None:
    """Entry point of ``qvdit-export``."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(help=_export.__doc__)(_export)
    _guarded(single)
