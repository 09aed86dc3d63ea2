"""PyTorch's 16-bit run of a bundle's quantized model on the CUDA kernels: what a TensorRT engine is measured by.

    python -m qvdit.half BUNDLE …

It leaves ``parity/half.safetensors`` beside the reference that the export left. An engine computes in FP16 as well, or
in BF16 where the bundle's graph does, so its error against full precision belongs beside this one's rather than beside
the float32 reference's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import qvdit.runtimes
from qvdit.contract import QvditError
from qvdit.contract.bundle import PRECISIONS, precision_of, read_manifest
from qvdit.contract.errors import in_one_line
from qvdit.contract.parity import ModelParity, compare_models, load_reference, save_half


@torch.no_grad()
def run_half(bundle: Path, device: str = "cuda") -> ModelParity:
    """Run the quantized model in 16 bits on a bundle's saved inputs, keep its output there and compare it."""
    dtype = PRECISIONS[precision_of(read_manifest(bundle))]
    model = qvdit.runtimes.load(bundle, device=device, dtype=dtype)
    saved = load_reference(bundle)
    output = infer(model, saved.inputs, getattr(torch, dtype))
    save_half(bundle, output)
    return compare_models(output, saved.quantized, saved.full)


def infer(model: torch.nn.Module, inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float16) -> np.ndarray:
    """A drop-in on numpy arrays, as a session takes and gives them: float32. Time steps are not rounded."""
    device = next(model.parameters()).device
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(device, None if name == "timestep" else dtype)
        for name, value in inputs.items()
    }
    return model(**tensors, return_dict=False)[0].float().cpu().numpy()


def main() -> int:
    """Run every bundle named; the exit status."""
    made = argparse.ArgumentParser(prog="python -m qvdit.half", description=__doc__.splitlines()[0])
    made.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="a folder that qvdit-export made")
    try:
        for bundle in made.parse_args().bundles:
            found = run_half(bundle)
            name = precision_of(read_manifest(bundle)).upper()
            print(
                f"{bundle}: {name} run, relative error {found.rel_err:.2e} to the quantized model's float32 run, error "
                f"against full precision {found.error_ratio:.4f} of its",
                flush=True,
            )
    except (QvditError, OSError) as error:
        print(in_one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
