"""``qvdit bench``: a command for each benchmark."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvdit.contract import QvditError

app = typer.Typer(no_args_is_help=True, help="Benchmarks that need a GPU.")


@app.callback()
def _several() -> None:
    """Keeps ``kernels`` a subcommand while it is the only one."""


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
    repeats: Annotated[int, typer.Option(min=3, help="Timings of each, taken in turns.")] = 9,
    render: Annotated[
        Path | None, typer.Option(help="Measure nothing: tables, pictures and verdicts of a run's JSON.")
    ] = None,
) -> None:
    """Time the CUDA kernels beside cuBLAS's bf16, int8 and fp8, CUTLASS and an unfused 4-bit linear, on this GPU.

    Prints TOP/s, GB/s and whether the kernels reach what they must; writes OUT after each size, and pictures.
    Medians of repeats taken in turns, on random data, no input from the L2 cache.

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
        settings = bench.Settings(parse(shapes or ("quick" if quick else "all")), blocks, tiles, repeats)
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
