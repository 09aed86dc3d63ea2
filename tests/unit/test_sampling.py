"""Sampling from a plan, without PyTorch: what the pipeline makes of the same prompt and noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qvdit.contract import QvditError
from qvdit.contract.plan import FORMAT, read_plan
from qvdit.runtimes.sampling import sample
from qvdit.runtimes.tensorrt.sample import sample_videos

STEPS, PROMPT = 3, "a red circle moving right in front of a blue square circling clockwise on a grey background"


class Session:
    """A PyTorch model as a session."""

    def __init__(self, model: Any):
        self.model = model

    @torch.no_grad()
    def infer(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        return self.model(**tensors, return_dict=False)[0].numpy()


def write_plan(pipeline: Any, guidance: float, path: Path) -> torch.Tensor:
    """The plan of one video, from the pipeline's own parts; returns its noise."""
    noise = torch.randn(1, 3, 16, 32, 32, generator=torch.Generator().manual_seed(5))
    pipeline.scheduler.set_timesteps(STEPS)
    sigmas = pipeline.scheduler.sigmas.numpy()
    condition = pipeline.prompt_table(["", PROMPT] if guidance > 1 else [PROMPT])
    tensors = {
        "latents": noise.numpy(),
        "timesteps": pipeline.scheduler.timesteps.numpy(),
        "keep": np.ones(STEPS, np.float32),
        "gain": sigmas[1:] - sigmas[:-1],
        "encoder_hidden_states": condition.numpy(),
        "guidance": np.array([guidance], np.float32),
        "clamp": np.ones(1, np.float32),
    }
    save_file(tensors, path, metadata={"format": FORMAT})
    return noise


@pytest.mark.parametrize("guidance", [2.5, 1.0])
def test_it_is_the_pipelines_video(guidance: float, tiny_pipeline: Any, tmp_path: Path) -> None:
    noise = write_plan(tiny_pipeline, guidance, tmp_path / "plan")
    found = sample(Session(tiny_pipeline.transformer), read_plan(tmp_path / "plan"))
    expected = tiny_pipeline(PROMPT, STEPS, guidance, latents=noise).frames.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_nan_is_refused(tiny_pipeline: Any, tmp_path: Path) -> None:
    write_plan(tiny_pipeline, 1.0, tmp_path / "plan")
    tiny_pipeline.transformer.proj_out.bias.data[0] = torch.nan
    with pytest.raises(QvditError, match="NaN or Inf after step 1"):
        sample(Session(tiny_pipeline.transformer), read_plan(tmp_path / "plan"))


@pytest.mark.parametrize("damage", ["absent", "text", "version", "missing", "steps", "batch", "scalar"])
def test_a_file_that_is_no_plan(damage: str, tiny_pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    write_plan(tiny_pipeline, 2.5, path)
    tensors, metadata = load_file(path), {"format": FORMAT}
    save = partial(save_file, filename=path)
    if damage == "absent":
        path.unlink()
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "version":
        save(tensors, metadata={"format": "qvdit-plan-0"})
    elif damage == "missing":
        save({name: value for name, value in tensors.items() if name != "gain"}, metadata=metadata)
    elif damage == "steps":
        save(tensors | {"gain": tensors["gain"][1:].copy()}, metadata=metadata)
    elif damage == "scalar":
        save(tensors | {"guidance": np.array(2.5, np.float32)}, metadata=metadata)
    else:
        save(tensors | {"latents": np.zeros((2, 3), np.float32)}, metadata=metadata)
    with pytest.raises(QvditError, match="expected a sampling plan"):
        read_plan(path)


def test_videos_of_two_sizes_are_refused_before_any_is_sampled(tiny_pipeline: Any, tmp_path: Path) -> None:
    write_plan(tiny_pipeline, 1.0, tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    save_file(
        tensors | {"latents": tensors["latents"][..., :16].copy()}, tmp_path / "narrow", metadata={"format": FORMAT}
    )
    with pytest.raises(QvditError, match=r"narrow with latents \[1, 3, 16, 32, 16\]"):
        sample_videos(tmp_path, [tmp_path / "plan", tmp_path / "narrow"], tmp_path / "videos")
