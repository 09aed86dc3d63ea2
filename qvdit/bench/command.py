"""``qvdit bench``: a command for each benchmark."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvdit.contract import QvditError

app = typer.Typer(no_args_is_help=True, help="Benchmarks that need a GPU.")


@app.command()
def kernels(
    out: Annotated[Path, typer.Option(help="The JSON to write; pictures go beside it.")] = Path(
        "out/bench/kernels.json"
    ),
    shapes: Annotated[
        str | None, typer.Option(help="Sizes of linears: MxNxK,…, all, quick or none (default: all).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A handful of sizes: --shapes quick.")] = False,
    blocks: Annotated[bool, typer.Option(help="Whole transformer blocks too; they need diffusers.")] = True,
    tiles: Annotated[bool, typer.Option("--tiles", help="The GEMM with every tile too.")] = False,
    sustained: Annotated[
        bool, typer.Option(help="The products of many rows also by themselves, until the clocks settle.")
    ] = True,
    repeats: Annotated[int, typer.Option(min=3, help="Timings of each, taken in turns.")] = 9,
    render: Annotated[
        Path | None, typer.Option(help="Measure nothing: tables, pictures and verdicts of a run's JSON.")
    ] = None,
) -> None:
    """Time the CUDA kernels beside cuBLAS's bf16, int8 and fp8, CUTLASS and an unfused 4-bit linear, on this GPU.

    Prints TOP/s, GB/s and whether the kernels reach what they must; writes OUT after each size, and pictures.
    Medians of repeats taken in turns, on random data, no input from the L2 cache; of many rows' products also by
    themselves, since in turns all run at what clocks they leave each other within the GPU's power limit.

    qvdit bench kernels --quick --no-blocks --out out/bench/quick.json

    qvdit bench kernels --render out/bench/kernels.json
    """
    from qvdit.bench import display, plots, results
    from qvdit.bench import kernels as bench
    from qvdit.bench.shapes import parse

    if quick and shapes is not None:
        raise QvditError("--quick and --shapes", "one of them", "leave one out")
    console, path = display.console(), render or out
    if render is None:
        settings = bench.Settings(parse(shapes or ("quick" if quick else "all")), blocks, tiles, repeats, sustained)
        command = shlex.join(["qvdit", *sys.argv[1:]])
        try:
            found = bench.run(settings, out, command, display.Lines(console))
        except KeyboardInterrupt:
            console.print(f"stopped; what was measured is in {out}: --render draws it", soft_wrap=True)
            raise typer.Exit(130) from None
    else:
        found = results.load(render)
    display.show(found, console)
    pictures = plots.write(found, path)
    console.print(f"look at {', '.join(map(str, (path, *pictures)))}", soft_wrap=True)


@app.command()
def tensorrt(
    cases: Annotated[Path, typer.Option(help="Folder of the prepared models and of their engines.")] = Path(
        "out/bench/tensorrt"
    ),
    out: Annotated[Path, typer.Option(help="The JSON to write; pictures go beside it.")] = Path(
        "out/bench/tensorrt.json"
    ),
    models: Annotated[
        str,
        typer.Option(
            help="Of wan-shapes, latte-shapes, and latte-xl-block, -slice and latte-xl (1, 4 and 28 blocks twice)."
        ),
    ] = "wan-shapes,latte-shapes,latte-xl-slice",
    engines: Annotated[str, typer.Option(help="Which engines.")] = "fp16,int8_qdq,w8a8,w4a8,w4a8_no_tqe,w3a6",
    repeats: Annotated[int, typer.Option(min=4, help="Timings of each, taken in turns.")] = 50,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="TensorRT's: 0, fast to build, to 5 (default: TensorRT's own, 3).")
    ] = None,
    plugin: Annotated[Path | None, typer.Option(help="libqvdit_tensorrt.so, where it is not found by itself.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0,
    compute: Annotated[str, typer.Option(help="Where PyTorch prepares: auto, cpu or cuda.")] = "auto",
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Write the cases, for a Python that has TensorRT but no PyTorch.")
    ] = False,
    layers: Annotated[bool, typer.Option(help="Prepare what the integers of every layer are compared by.")] = True,
    also_fp16: Annotated[
        str,
        typer.Option(
            help="Operators prepared in FP16 that are float32 otherwise, as LayerNormalization (other CASES)."
        ),
    ] = "",
    render: Annotated[
        Path | None, typer.Option(help="Measure nothing: tables, pictures and verdicts of a run's JSON.")
    ] = None,
) -> None:
    """Time engines of the same models beside each other: FP16, TensorRT's static INT8, and ours, on this GPU.

    Builds each, compares its layers' integers and its output with PyTorch's, and times all of a model in turns (CUDA
    graphs, CUDA events). What is prepared or built already in CASES is used again.

    Where TensorRT's Python has no PyTorch (8.6):

    qvdit bench tensorrt --prepare-only

    python3.10 -m qvdit.bench.tensorrt out/bench/tensorrt --out out/bench/tensorrt.json

    qvdit bench tensorrt --render out/bench/tensorrt.json
    """
    from qvdit.bench import display as terminal
    from qvdit.bench.tensorrt import cases as known
    from qvdit.bench.tensorrt import display, plots, results

    console = terminal.console()
    chosen = (
        known.parse(models, known.MODELS, "--models"),
        known.parse(engines, known.ENGINES, "--engines"),
    )
    lines = display.Lines(console)
    if render is None:
        from qvdit.bench.tensorrt import prepare

        if not prepare_only:  # minutes of preparing would come to nothing
            from qvdit.runtimes.tensorrt import session, versions

            session.open_device("cuda").close()
            versions.tensorrt()
        also_low = tuple(filter(None, also_fp16.split(",")))
        prepare.prepare(prepare.Settings(*chosen, compute, seed, also_low, layers), cases, lines.say)
        if prepare_only:
            return
        from qvdit.bench.tensorrt import measure
        from qvdit.runtimes.tensorrt.build import BuildOptions

        options = BuildOptions(optimization_level=optimization_level, plugin=plugin)
        settings = measure.Settings(cases, *chosen, repeats, options)
        found = measure.run(settings, out, shlex.join(["qvdit", *sys.argv[1:]]), lines)
    else:
        found = results.load(render)
    display.show(found, console)
    pictures = plots.write(found, render or out)
    console.print(f"look at {', '.join(map(str, (render or out, *pictures)))}", soft_wrap=True)
