"""Videos of engines beside PyTorch's, from the same prompts and noise; TensorRT 8.6 and PyTorch share no Python.

    videos.py plan DIR [--count 8] [--steps 20]    # a CPU will do: DIR/MODEL/NNN.safetensors and DIR/MODEL/prompts.txt
    videos.py pytorch DIR OUT BUNDLE …             # on the GPU: OUT/MODEL-full, OUT/NAME-pytorch (FP16, the kernels)
    python -m qvdit.runtimes.tensorrt.sample BUNDLE --out OUT/NAME-engine.safetensors DIR/MODEL/*.safetensors
    videos.py judge DIR OUT BUNDLE …               # OUT/videos.json: PSNR and measurements from the pixels

NAME is the bundle's folder, MODEL its model.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

import qvdit.runtimes
from qvdit.contract.bundle import read_manifest
from qvdit.contract.files import write_atomic, write_json
from qvdit.contract.plan import read_plan, save_plan
from qvdit.half import infer
from qvdit.method.calibration import read_prompts
from qvdit.models.loading import find_model
from qvdit.quality import Trial, means, measurements
from qvdit.reference import measure
from qvdit.runtimes.sampling import sample

GUIDANCE = 2.5


class PyTorch:
    """A transformer on the GPU as a session."""

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    @torch.no_grad()
    def infer(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Run it, as :func:`qvdit.half.infer`."""
        return infer(self.model, inputs, self.dtype)


def plan(folder: Path, count: int, steps: int) -> None:
    """Write the plans of every shipped model, for prompts that calibration does not use."""
    from qvdit.export.plan import plan_sampling
    from qvdit.method import calibration
    from qvdit.settings import shipped_prompts

    trial = Trial.fresh(count, 2026, steps, GUIDANCE, read_prompts(shipped_prompts()))
    for name in ("wan-shapes", "latte-shapes"):
        pipeline = find_model(name).load()
        for index, (prompt, seed) in enumerate(zip(trial.prompts, trial.seeds, strict=True)):
            run = partial(calibration.sample, prompts=[prompt], steps=steps, guidance=GUIDANCE, seeds=[seed])
            save_plan(plan_sampling(pipeline, run, GUIDANCE, clamp=True), folder / name / f"{index:03}.safetensors")
        (folder / name / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in trial.prompts))


def sampled(session: Any, plans: Path, out: Path) -> None:
    """Sample every plan of a folder into one file."""
    videos = np.concatenate([sample(session, read_plan(path)) for path in sorted(plans.glob("*.safetensors"))])
    write_atomic(out, partial(save_file, {"videos": np.ascontiguousarray(videos, np.float32)}))
    print(f"{out}: {len(videos)} videos", flush=True)


def pytorch(plans: Path, out: Path, bundles: list[Path]) -> None:
    """PyTorch's videos: of each model in full precision, of each bundle in FP16 on the kernels."""
    for name in sorted({read_manifest(bundle).model for bundle in bundles}):
        sampled(PyTorch(find_model(name).load("cuda").transformer, torch.float32), plans / name, full(out, name))
    for bundle in bundles:
        model = qvdit.runtimes.load(bundle, device="cuda", dtype="float16")
        sampled(PyTorch(model, torch.float16), plans / read_manifest(bundle).model, of(out, bundle, "pytorch"))


def full(out: Path, model: str) -> Path:
    """Where a model's own videos are."""
    return out / f"{model}-full.safetensors"


def of(out: Path, bundle: Path, kind: str) -> Path:
    """Where a bundle's videos are."""
    return out / f"{bundle.name}-{kind}.safetensors"


def judge(plans: Path, out: Path, bundles: list[Path]) -> None:
    """Measure what is there of each bundle."""
    rows = []
    for bundle in bundles:
        model = read_manifest(bundle).model
        prompts = tuple(read_prompts(plans / model / "prompts.txt"))
        trial = Trial(prompts, tuple(range(len(prompts))), 0, GUIDANCE)
        files = {"full": full(out, model), "pytorch": of(out, bundle, "pytorch"), "engine": of(out, bundle, "engine")}
        videos = {name: torch.from_numpy(load_file(path)["videos"]) for name, path in files.items() if path.is_file()}
        pairs = [(a, b) for a, b in (("engine", "pytorch"), ("engine", "full"), ("pytorch", "full"))]
        row: dict[str, Any] = {"bundle": bundle.name, "videos": len(prompts)}
        for a, b in pairs:
            if a in videos and b in videos:
                row[f"psnr_db_{a}_{b}"] = measure.psnr(videos[a], videos[b]).mean().item()
        row |= {name: means(measurements(value, trial)) for name, value in videos.items()}
        rows.append(row)
        shown = ", ".join(f"{key[8:]} {value:.2f} dB" for key, value in row.items() if key.startswith("psnr"))
        print(f"{bundle.name}: {shown}", flush=True)
    write_json(out / "videos.json", rows)


def main() -> None:
    """One of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("plan")
    made.add_argument("plans", type=Path)
    made.add_argument("--count", type=int, default=8)
    made.add_argument("--steps", type=int, default=20)
    for name in ("pytorch", "judge"):
        made = commands.add_parser(name)
        made.add_argument("plans", type=Path)
        made.add_argument("out", type=Path)
        made.add_argument("bundles", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "plan":
        plan(given.plans, given.count, given.steps)
    else:
        (pytorch if given.command == "pytorch" else judge)(given.plans, given.out, given.bundles)


if __name__ == "__main__":
    main()
