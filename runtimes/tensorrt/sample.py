"""Samples videos with a bundle's engine, without PyTorch, from sampling plans.

python -m qvdit.runtimes.tensorrt.sample BUNDLE --out videos.safetensors PLAN …
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic
from qvdit.contract.plan import read_plan
from qvdit.runtimes.sampling import sample
from qvdit.runtimes.tensorrt.arguments import add_device_argument, exit_status
from qvdit.runtimes.tensorrt.session import TensorRtSession


def sample_videos(bundle: Path, plans: list[Path], out: Path, device: str = "cuda", cuda_graph: bool = False) -> None:
    """Write ``videos`` [V, …], float32, one a plan in their order; all are of one size."""
    read = [read_plan(path) for path in plans]
    for path, plan in zip(plans, read, strict=True):
        if plan.latents.shape != read[0].latents.shape:
            raise QvditError(
                f"{path} with latents {list(plan.latents.shape)}",
                f"{list(read[0].latents.shape)}, as in {plans[0]}",
                "sample videos of each size on their own",
            )
    with TensorRtSession.of_bundle(bundle, device, cuda_graph) as session:
        videos = [sample(session, plan) for plan in read]
    tensors = {"videos": np.ascontiguousarray(np.concatenate(videos), np.float32)}
    write_atomic(out, partial(save_file, tensors))


def main(arguments: list[str] | None = None) -> int:
    """Sample; returns the exit status."""
    made = argparse.ArgumentParser(prog="python -m qvdit.runtimes.tensorrt.sample", description=__doc__.splitlines()[0])
    made.add_argument("bundle", type=Path, help="a bundle with an engine")
    made.add_argument("plans", type=Path, nargs="+", help="one a video, as OUT/edge/sample/plan.safetensors")
    made.add_argument("--out", type=Path, required=True, help="safetensors file of the videos, in the plans' order")
    add_device_argument(made)
    made.add_argument("--cuda-graph", action="store_true", help="replay the engine's launches as one")
    given = made.parse_args(arguments)
    return exit_status(lambda: _sample(given))


def _sample(given: argparse.Namespace) -> None:
    start = time.monotonic()
    sample_videos(given.bundle, given.plans, given.out, given.device, given.cuda_graph)
    print(f"{len(given.plans)} videos in {time.monotonic() - start:.1f} s: {given.out}")


if __name__ == "__main__":
    sys.exit(main())
