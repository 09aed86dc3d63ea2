"""A runtime against the saved or live PyTorch reference, layer by layer and as a whole. Needs no PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvdit.contract import QvditError
from qvdit.contract.bundle import ORT_MODEL, verify
from qvdit.contract.errors import in_one_line
from qvdit.contract.parity import (
    ERROR_RATIOS,
    LayerParity,
    LayerReference,
    ModelParity,
    compare_layer,
    compare_models,
    load_reference,
)
from qvdit.runtimes import check_device
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession

if TYPE_CHECKING:
    from qvdit.runtimes.layers import LayerModels


def compare_layers(models: LayerModels, references: Iterable[LayerReference]) -> Iterator[LayerParity]:
    """Run every reference's input through the runtime's own layer and compare."""
    for reference in references:
        yield compare_layer(reference, models.run(reference.name, reference.x, reference.tokens_per_frame))


def check_bundle(
    bundle: Path, threads: int | None = None, device: str = "cpu"
) -> tuple[list[LayerParity], ModelParity]:
    """A bundle's own parity check in ONNX Runtime on this machine: every layer, then the whole model. No PyTorch.

    device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    try:
        from qvdit.runtimes.layers import LayerModels
    except ImportError:
        raise QvditError("no onnx", "the package onnx, to look inside the model", "pip install onnx") from None
    saved = load_reference(bundle)
    layers = list(compare_layers(LayerModels(bundle / ORT_MODEL, threads, device), saved.layers))
    with OnnxRuntimeSession(bundle / ORT_MODEL, threads, device) as session:
        output = session.infer(saved.inputs)
    return layers, compare_models(output, saved.quantized, saved.full)


def tell(bundle: Path, threads: int | None, device: str, say: Callable[[str], None] = print) -> bool:
    """:func:`check_bundle` of a bundle whose files are checked first, told line by line; whether it is proven."""
    check_device(device)
    verify(bundle)
    layers, model = check_bundle(bundle, threads, device)
    wrong = [layer for layer in layers if layer.xq_mismatches or layer.acc_mismatches]
    for layer in wrong:
        differ = f"{layer.xq_mismatches} x_q and {layer.acc_mismatches} acc differ"
        say(f"{layer.name}: {differ}, relative error {layer.rel_err:.1e}")
    integers = sum(layer.xq_compared + layer.acc_compared for layer in layers)
    say(f"layers: {len(layers)} compared, {len(wrong)} with integers that differ, {integers:,} integers in all")
    say(
        f"model: relative error {model.rel_err:.2e} to PyTorch's quantized model, cosine {model.cosine:.6f}, "
        f"error against full precision {model.error_ratio:.3f} of the reference's"
    )
    low, high = ERROR_RATIOS
    near = low <= model.error_ratio <= high
    if not near:
        say(f"not proven: that is not within {low} and {high}")
    return near and not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the bundle of a command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qvdit.runtimes.parity", description="Check a bundle against the reference run it carries."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    given = parser.parse_args(arguments)
    try:
        return 0 if tell(given.bundle, given.threads, given.device) else 1
    except (QvditError, OSError) as error:
        print(in_one_line(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
