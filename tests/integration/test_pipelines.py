"""``pipe.transformer = …``: pipelines sample the same from a runtime as from PyTorch's quantized transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qvdit.runtimes
from qvdit.contract import checkpoint
from qvdit.contract.bundle import Manifest
from qvdit.contract.parity import relative_error
from qvdit.contract.video import VideoSize
from qvdit.export import graph
from qvdit.export.files import save_model
from qvdit.method.calibration import CalibrationPlan, record
from qvdit.method.reference import quantized_transformer
from qvdit.models import LatteAdapter, WanAdapter
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession
from qvdit.runtimes.transformer import RuntimeTransformer

STEPS = 2


@pytest.fixture(scope="module")
def wan_pair(bundle: Path, wan_model: Any) -> tuple[Any, Any]:
    """The quantized Wan in PyTorch, and the bundle's runtime."""
    layers = checkpoint.load(bundle / "quantized").layers
    return quantized_transformer(wan_model, layers), qvdit.runtimes.load(bundle, threads=1)


@pytest.fixture(scope="module")
def latte_pair(traced_latte: Any, latte_model: Any, rtn_layers: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    """The quantized Latte in PyTorch, and a runtime of the same layers."""
    layers = rtn_layers(latte_model, 4, rank=1)
    path = tmp_path_factory.mktemp("latte") / "model.onnx"
    save_model(graph.quantized_model(traced_latte, layers, "integer"), path)
    manifest = Manifest(
        model="tiny-latte",
        source="",
        family="latte",
        class_name="LatteTransformer3DModel",
        source_config=dict(latte_model.config),
        recipe="rtn",
        bits="w4a8",
        target="onnxruntime",
        inputs={},
        frames=4,
        versions={},
        files={},
    )
    return quantized_transformer(latte_model, layers), RuntimeTransformer(OnnxRuntimeSession(path, 1), manifest)


def assert_same(sample: Any, full: Any, quantized: Any, runtime: Any) -> None:
    """The runtime samples what the quantized transformer samples, and neither what full precision does."""
    expected = sample(quantized)
    found = sample(runtime)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.isfinite().all()
    distance = relative_error(expected.numpy(), sample(full).numpy())
    assert distance > 1e-3
    assert relative_error(found.numpy(), expected.numpy()) < 0.1 * distance


def text(batch: int, tokens: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, tokens, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pixel_pipeline(guidance: float, wan_folder: Path, wan_pair: Any, wan_model: Any) -> None:
    from qvdit.reference import world
    from qvdit.reference.pipeline import PixelVideoPipeline

    pipe = PixelVideoPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = [world.EXAMPLE, world.EXAMPLE.replace("red", "cyan")]

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        generator = torch.Generator().manual_seed(5)
        return pipe(prompts, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator).frames

    assert_same(sample, wan_model, *wan_pair)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (128, 320)])
def test_wan_pipeline(guidance: float, height: int, width: int, wan_pair: Any, wan_model: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=wan_model,
    )
    pipe.set_progress_bar_config(disable=True)

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        return pipe(
            height=height,
            width=width,
            num_frames=61,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5),
            prompt_embeds=text(1, 6, 64, seed=1),
            negative_prompt_embeds=text(1, 6, 64, seed=2),
            output_type="latent",
        ).frames

    assert sample(wan_model).shape == (1, 3, 16, height // 8, width // 8)
    assert_same(sample, wan_model, *wan_pair)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_latte_pipeline(guidance: float, latte_pair: Any, latte_model: Any) -> None:
    from diffusers import DDIMScheduler, LattePipeline

    pipe = LattePipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=latte_model, scheduler=DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        return pipe(
            negative_prompt=None,
            video_length=4,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5),
            prompt_embeds=text(1, 6, 24, seed=1),
            negative_prompt_embeds=text(1, 6, 24, seed=2),
            mask_feature=False,
            output_type="latent",
        ).frames

    assert sample(latte_model).shape == (1, 4, 4, 8, 8)
    assert_same(sample, latte_model, *latte_pair)


def test_calibration_at_a_size(wan_model: Any, latte_model: Any, tmp_path: Path) -> None:
    """diffusers' pipelines sample the frames, the height and the width that are asked for, by their own names."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LattePipeline, WanPipeline

    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    wan = WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=wan_model)
    latte = LattePipeline(**parts, scheduler=DDIMScheduler(), transformer=latte_model)
    for pipe, adapter, features, size, latents in (
        (wan, WanAdapter(), 64, VideoSize(61, 128, 320), (3, 16, 16, 40)),
        (latte, LatteAdapter(), 24, VideoSize(4, 48, 64), (4, 4, 6, 8)),
    ):
        pipe.set_progress_bar_config(disable=True)
        pipe.encode_prompt = lambda *_, features=features, **__: (text(1, 6, features, 1), text(1, 6, features, 2))
        plan = CalibrationPlan(("a cat",), steps=2, records=2, size=size)
        data = record(pipe, adapter, plan, tmp_path / adapter.family)
        shapes = {tuple(batch["hidden_states"].shape[1:]) for batch in data.batches()}
        assert shapes == {latents}
