"""Calibration data: the full-precision model's own inputs, recorded while it samples videos.

One shard a prompt, so that an interrupted run goes on where it stopped and more prompts add to what is there.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic
from qvdit.contract.video import VideoSize, described
from qvdit.models import ModelAdapter

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


_FRAMES = ("num_frames", "video_length")
"""What pipelines call the number of frames."""


def no_progress(done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class CalibrationPlan:
    """What to sample: the same plan and model always give the same records."""

    prompts: tuple[str, ...]
    steps: int = 20  # of the sampler
    records: int = 8  # steps recorded of each trajectory, spread evenly over it
    guidance: float = 2.5
    seed: int = 0
    source: str = ""  # digest of the pipeline that samples
    size: VideoSize | None = None  # of the videos; the pipeline's own when absent

    def recorded_steps(self) -> list[int]:
        """Indices of the recorded steps, from the first (most noise) to the last."""
        count = min(self.records, self.steps)
        return [round(i * (self.steps - 1) / max(count - 1, 1)) for i in range(count)]

    def identity(self, index: int) -> dict[str, str]:
        """What the shard of prompt ``index`` depends on; it is written into the shard."""
        fields = {name: value for name, value in described(self).items() if name != "prompts"}
        fields |= {"prompt": self.prompts[index], "seed": self.seed + index}
        # One key: safetensors writes several in no fixed order.
        return {"identity": json.dumps(fields, sort_keys=True)}


@dataclass(frozen=True)
class CalibrationData:
    """Recorded DiT inputs: shards of safetensors, each a prompt's trajectory.

    Every tensor has the records first: [n, …], n = 2 · steps recorded, unconditional and conditional at each.
    """

    shards: tuple[Path, ...]

    def by_step(self, together: int = 1) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """All records shard by shard, a batch for each recorded step, with the step's index in the trajectory.

        ``together``: how many shards, of equal shapes, share a batch, one after the other in it.
        """
        for start in range(0, len(self.shards), together):
            loaded = [load_file(shard) for shard in self.shards[start : start + together]]
            for value in loaded[0]["step"].unique():
                chosen = [{name: tensor[shard["step"] == value] for name, tensor in shard.items()} for shard in loaded]
                names = [name for name in loaded[0] if name != "step"]
                yield int(value), {name: torch.cat([shard[name] for shard in chosen]) for name in names}

    def batches(self, together: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        """As :meth:`by_step`, without the step; every step weighs the same."""
        return (batch for _, batch in self.by_step(together))

    def count(self) -> int:
        """How many :meth:`batches` there are; of every shard the steps alone are read."""
        found = 0
        for shard in self.shards:
            with safe_open(shard, framework="pt") as file:
                found += len(file.get_tensor("step").unique())
        return found

    def some(self, most: int) -> Iterator[dict[str, torch.Tensor]]:
        """``most`` of the batches at most, evenly apart; no more than one shard is in memory at a time."""
        apart = max(1, self.count() // most)
        return itertools.islice(self.batches(), 0, most * apart, apart)

    def groups(self) -> list[dict[str, torch.Tensor]]:
        """All records on the CPU, those of equal shapes in one batch: prompts may differ in length."""
        found: dict[tuple[torch.Size, ...], list[dict[str, torch.Tensor]]] = {}
        for shard in self.shards:
            tensors = load_file(shard)
            tensors.pop("step")
            found.setdefault(tuple(tensors[name].shape[1:] for name in sorted(tensors)), []).append(tensors)
        return [{name: torch.cat([m[name] for m in members]) for name in members[0]} for members in found.values()]


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        found = f"no file {path}" if not path.is_file() else f"{path}, which cannot be read ({error})"
        raise QvditError(found, "a text file with one prompt a line", "check --prompts") from None
    return tuple(line for line in lines if line and not line.startswith("#"))


def shard_path(folder: Path, index: int) -> Path:
    """The file of prompt ``index``."""
    return folder / f"shard-{index:05d}.safetensors"


def record(
    pipeline: Any,
    adapter: ModelAdapter,
    plan: CalibrationPlan,
    folder: Path,
    progress: Progress = no_progress,
    together: int = 1,
) -> CalibrationData:
    """Sample the prompts that have no shard in ``folder`` yet, and return all shards of the plan.

    Shards of another plan or model are replaced (:func:`refuse_foreign` refuses them). ``together``: how many prompts
    are sampled in one batch, by a pipeline that then gives each what it gives it alone, but for float32 rounding.
    """
    shards = [shard_path(folder, index) for index in range(len(plan.prompts))]
    missing = [index for index, shard in enumerate(shards) if not _matches(shard, plan.identity(index))]
    for start in range(0, len(missing), together):
        progress(len(shards) - len(missing) + start, len(shards))
        indices = missing[start : start + together]
        for index, tensors in zip(indices, _record_some(pipeline, adapter, plan, indices), strict=True):
            _check(tensors, plan.prompts[index])
            write_atomic(shards[index], partial(save_file, tensors, metadata=plan.identity(index)))
    progress(len(shards), len(shards))
    return CalibrationData(tuple(shards))


def refuse_foreign(plan: CalibrationPlan, folder: Path) -> None:
    """Raise QvditError if a shard in ``folder`` is not the plan's."""
    for index in range(len(plan.prompts)):
        shard = shard_path(folder, index)
        if shard.exists() and not _matches(shard, plan.identity(index)):
            raise QvditError(
                f"--calibration with {shard}, which is damaged, or recorded from another model or with other settings",
                "calibration data of this job",
                "choose another folder, or the settings it was made with",
            )


def _matches(shard: Path, identity: dict[str, str]) -> bool:
    try:
        with safe_open(shard, framework="pt") as file:
            return file.metadata() == identity
    except (FileNotFoundError, SafetensorError, OSError):
        return False


def _record_some(
    pipeline: Any, adapter: ModelAdapter, plan: CalibrationPlan, indices: list[int]
) -> list[dict[str, torch.Tensor]]:
    """Sample a video of each prompt and keep the transformer's inputs at the plan's steps, prompt by prompt."""
    wanted = set(plan.recorded_steps())
    times: list[float] = []  # the time steps seen so far, in order: their count is the index of the current one
    kept: list[dict[str, torch.Tensor]] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(adapter.inputs, args, strict=False)), **kwargs}
        time = inputs["timestep"].flatten()[0].item()
        if not times or times[-1] != time:
            times.append(time)
        if len(times) - 1 in wanted:
            batch = inputs["hidden_states"].shape[0]
            row = {name: inputs[name].detach().cpu().clone() for name in adapter.inputs}
            row["timestep"] = row["timestep"].expand(batch).clone()
            row["step"] = torch.full((batch,), len(times) - 1)
            kept.append(row)

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        prompts, seeds = zip(*((plan.prompts[index], plan.seed + index) for index in indices), strict=True)
        sample(pipeline, list(prompts), plan.steps, plan.guidance, list(seeds), plan.size)
    finally:
        handle.remove()
    # A batch has a row of every prompt, or all unconditional rows before all conditional ones.
    return [
        {name: torch.cat([row[name][place :: len(indices)] for row in kept]).contiguous() for name in kept[0]}
        for place in range(len(indices))
    ]


def sample(
    pipeline: Any, prompts: list[str], steps: int, guidance: float, seeds: list[int], size: VideoSize | None = None
) -> Any:
    """Call a diffusers video pipeline with the arguments it knows; one seed a prompt, drawn on the CPU.

    QvditError where the pipeline refuses them, or has no other size than its own.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    known = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {
        "prompt": prompts,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": generators if len(generators) > 1 else generators[0],
    }
    if "output_type" in known:
        arguments["output_type"] = "latent"
    if size is not None:
        frames = next((name for name in _FRAMES if name in known), None)
        if frames is None or not {"height", "width"} <= set(known):
            refused = f"--size {size} with a {type(pipeline).__name__}, which samples videos of one size"
            raise QvditError(refused, "its own size", "leave out --size")
        arguments |= {frames: size.frames, "height": size.height, "width": size.width}
    try:
        return pipeline(**arguments).frames
    except ValueError as error:
        refused = f"{prompts[0]!r}, which the pipeline refuses ({' '.join(str(error).split())})"
        raise QvditError(refused, "a prompt and settings that it takes", "see what it says") from None


def _check(tensors: dict[str, torch.Tensor], prompt: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise QvditError(
                f"NaN or Inf in {name} while sampling {prompt!r}",
                "finite calibration data",
                "the full-precision model does not sample this prompt: check the model in its own pipeline first",
            )
