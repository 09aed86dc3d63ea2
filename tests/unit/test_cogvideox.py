"""CogVideoX: joint text and video tokens, positions as constants, and a pipeline that calls a runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qvdit.contract import FrameRows
from qvdit.contract.bundle import Manifest
from qvdit.contract.parity import relative_error
from qvdit.export import graph
from qvdit.export.files import save_model
from qvdit.export.trace import trace
from qvdit.method.reference import quantized_transformer
from qvdit.models import CogVideoXAdapter
from qvdit.models.cogvideox import rotary_embedding
from qvdit.runtimes.onnxruntime import OnnxRuntimeSession, session
from qvdit.runtimes.transformer import RuntimeTransformer
from tests.conftest import cogvideox

ADAPTER = CogVideoXAdapter()


def pipeline(transformer: Any) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, height: int = 64, width: int = 64, frames: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return pipe(
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=generator,
        prompt_embeds=torch.randn(1, 4, 24, generator=generator),
        negative_prompt_embeds=torch.randn(1, 4, 24, generator=generator),
        output_type="latent",
    ).frames


def test_joint_rows_have_no_gain_and_modulation_stays(cogvideox_model: Any) -> None:
    sites = ADAPTER.sites(cogvideox_model)
    assert {site.rows for site in sites} == {FrameRows.NONE}
    linears = {n for n, m in cogvideox_model.named_modules() if isinstance(m, torch.nn.Linear)}
    left = linears - {site.name for site in sites}
    assert {name.split(".")[-1] if "blocks" not in name else name.split(".")[2] for name in left} == {
        "norm1",
        "norm2",
        "text_proj",
        "linear_1",
        "linear_2",
        "linear",
        "proj_out",
    }
    assert len(sites) == 12


@pytest.mark.parametrize("patch_time", [None, 2], ids=["1.0", "1.5"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 48)])
def test_rotary_embedding_is_the_pipelines(patch_time: int | None, height: int, width: int) -> None:
    model = cogvideox(patch_size_t=patch_time, patch_bias=patch_time is None)
    given: list[tuple[torch.Size, tuple[torch.Tensor, torch.Tensor]]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((kwargs["hidden_states"].shape, kwargs["image_rotary_emb"])),
        with_kwargs=True,
        prepend=True,
    )
    sample(pipeline(model), height, width)
    handle.remove()
    shape, expected = given[0]
    assert shape == (2, 4, 4, height // 8, width // 8)
    for found, wanted in zip(rotary_embedding(model.config, shape, torch.device("cpu")), expected, strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_forward_needs_its_inputs_alone(cogvideox_model: Any, example_inputs: Any) -> None:
    inputs = example_inputs((4, 4, 8, 8), 24)
    rotary = rotary_embedding(cogvideox_model.config, inputs["hidden_states"].shape, torch.device("cpu"))
    alone, told = (cogvideox_model(**inputs, **more).sample for more in ({}, {"image_rotary_emb": rotary}))
    assert torch.equal(alone, told)
    turned = (rotary[0].flip(0), rotary[1].flip(0))
    assert relative_error(cogvideox_model(**inputs, image_rotary_emb=turned).sample.numpy(), told.numpy()) > 1e-3


def full_weights(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    linears = {site.name: model.get_submodule(site.name) for site in ADAPTER.sites(model)}
    return {name: (linear.weight.numpy(), linear.bias.numpy()) for name, linear in linears.items()}


VARIANTS: dict[str, Callable[[], Any]] = {
    "rotary": cogvideox,
    "table": lambda: cogvideox(use_rotary_positional_embeddings=False),
    "1.5": lambda: cogvideox(patch_size_t=2, patch_bias=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_graph_is_the_model_at_other_batches(variant: str, traced_cogvideox: Any, example_inputs: Any) -> None:
    model, inputs = VARIANTS[variant](), example_inputs((4, 4, 8, 8), 24)
    weights = full_weights(model)
    widths = {name: len(weight) for name, (weight, _) in weights.items()}
    traced = traced_cogvideox if variant == "rotary" else trace(model, ADAPTER, widths, inputs)
    assert [value.name for value in traced.graph.input] == list(ADAPTER.inputs)
    assert not {node.op_type for node in traced.graph.node} & {"ScatterND", "ScatterElements"}
    baseline = graph.baseline_model(traced, weights)
    onnx.checker.check_model(baseline, full_check=True)
    inputs = example_inputs((4, 4, 8, 8), 24, batch=3, seed=2)
    found = session(baseline.SerializeToString(), 1).run(None, {name: x.numpy() for name, x in inputs.items()})[0]
    assert relative_error(found, model(**inputs).sample.numpy()) < 1e-5


def test_pipeline_samples_from_a_runtime(
    traced_cogvideox: Any, cogvideox_model: Any, rtn_layers: Any, tmp_path: Any
) -> None:
    """``pipe.transformer = …``: the pipeline's rotary embedding is the exported one, other sizes are refused."""
    from qvdit.contract import QvditError

    layers = rtn_layers(cogvideox_model, 4, rank=1)
    save_model(graph.quantized_model(traced_cogvideox, layers, "integer"), tmp_path / "model.onnx")
    config = dict(cogvideox_model.config)
    manifest = Manifest(
        "tiny", "", "cogvideox", ADAPTER.class_name, config, "rtn", "w4a8", "onnxruntime", {}, 4, {}, {}
    )
    runtime = RuntimeTransformer(OnnxRuntimeSession(tmp_path / "model.onnx", 1), manifest)
    full = sample(pipeline(cogvideox_model))
    expected = sample(pipeline(quantized_transformer(cogvideox_model, layers)))
    pipe = pipeline(cogvideox_model)
    pipe.transformer = runtime
    distance = relative_error(expected.numpy(), full.numpy())
    assert distance > 1e-3
    assert relative_error(sample(pipe).numpy(), expected.numpy()) < 0.1 * distance
    with pytest.raises(QvditError, match="hidden_states of shape"):
        sample(pipe, height=32)
