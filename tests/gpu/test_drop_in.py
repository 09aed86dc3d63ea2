"""``qvdit.runtimes.load(bundle, device="cuda")`` against the eager quantized transformer, and in pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvdit.runtimes
from qvdit.compare import sampling
from qvdit.contract import checkpoint
from qvdit.contract.bundle import read_manifest
from qvdit.contract.parity import relative_error
from qvdit.method.reference import quantized_transformer
from qvdit.models import ADAPTERS
from qvdit.runtimes.torch_linear import KernelLinear
from qvdit.runtimes.torch_transformer import load_transformer

pytestmark = pytest.mark.unguarded  # whole models, compiled and captured
FAMILIES = ("wan", "latte")
WIDTHS = [(2, 6), (3, 6), (4, 8), (8, 8)]


@pytest.fixture(scope="module")
def bundle_of(wide_models: Any, rtn_layers: Any, drop_in_bundle: Any, tmp_path_factory: Any) -> Callable[..., Path]:
    """``bundle_of(family, bits, act_bits, symmetric)``: a random model's, rank 1, every layer its own gains."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(family: str, bits: int = 4, act_bits: int = 8, symmetric: bool = True) -> Path:
        path = folder / f"{family}-w{bits}a{act_bits}-{symmetric}"
        if not path.exists():
            model = wide_models[family]
            layers = rtn_layers(model, 4, bits=bits, act_bits=act_bits, symmetric=symmetric, rank=1)
            for index, layer in enumerate(layers):
                if layer.frame_gain is not None:
                    layer.frame_gain[:] += 0.1 * index
            drop_in_bundle(path, model, layers)
        return path

    return make


def on_gpu(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs as a pipeline hands them over: the time step stays as it is."""
    return {name: value.cuda() if name == "timestep" else value.to("cuda", dtype) for name, value in inputs.items()}


@torch.no_grad()
def run(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return model(**inputs, return_dict=False)[0].float().cpu().numpy()


def eager(full: Any, bundle: Path) -> Any:
    """The reference: PyTorch's quantized transformer, on the GPU."""
    return quantized_transformer(full, checkpoint.load(bundle / "quantized").layers).cuda()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_the_quantized_transformer(family, bits, act_bits, symmetric, bundle_of, wide_models, wide_inputs):
    """Up to float32 rounding, which flips an integer here and there: far less than what quantization does."""
    bundle, inputs = bundle_of(family, bits, act_bits, symmetric), on_gpu(wide_inputs[family])
    full = run(copy.deepcopy(wide_models[family]).cuda(), inputs)
    expected = run(eager(wide_models[family], bundle), inputs)
    model = qvdit.runtimes.load(bundle, device="cuda", dtype="float32")
    assert {parameter.device.type for parameter in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert relative_error(run(model, inputs), expected) < 0.1 * relative_error(expected, full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "act_bits"), [(3, 6), (4, 8)])
def test_half_precision(family, dtype, bits, act_bits, bundle_of, wide_models, wide_inputs):
    """The error against full precision is the reference's, within 10 %."""
    bundle, inputs = bundle_of(family, bits, act_bits), on_gpu(wide_inputs[family])
    full = run(copy.deepcopy(wide_models[family]).cuda(), inputs)
    reference = relative_error(run(eager(wide_models[family], bundle), inputs), full)
    model = qvdit.runtimes.load(bundle, device="cuda", dtype=dtype)
    found = relative_error(run(model, on_gpu(wide_inputs[family], model.dtype)), full)
    assert 0.9 < found / reference < 1.1


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_projections_change_nothing(family, bundle_of, wide_models, wide_inputs):
    bundle, inputs = bundle_of(family), on_gpu(wide_inputs[family])
    full = run(copy.deepcopy(wide_models[family]).cuda(), inputs)
    made = {
        fuse: load_transformer(bundle, read_manifest(bundle), torch.device("cuda"), torch.float32, fuse)
        for fuse in (True, False)
    }
    counts = {
        fuse: sum(len(m.names) > 1 for m in model.modules() if isinstance(m, KernelLinear))
        for fuse, model in made.items()
    }
    assert counts == {True: {"wan": 4, "latte": 3}[family], False: 0}
    together, apart = (run(made[fuse], inputs) for fuse in (True, False))
    assert relative_error(together, apart) < 0.1 * relative_error(apart, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_compile(family, bundle_of, wide_models, wide_inputs):
    bundle = bundle_of(family)
    model = qvdit.runtimes.load(bundle, device="cuda")
    inputs = on_gpu(wide_inputs[family], model.dtype)
    expected = run(model, inputs)
    full = run(copy.deepcopy(wide_models[family]).cuda(), on_gpu(wide_inputs[family]))
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(run(compiled, inputs), expected) < 0.5 * relative_error(expected, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_cuda_graph(family, bundle_of, wide_inputs):
    model = qvdit.runtimes.load(bundle_of(family), device="cuda")
    inputs = on_gpu(wide_inputs[family], model.dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            model(**inputs, return_dict=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        (output,) = model(**inputs, return_dict=False)
    inputs["hidden_states"].copy_(torch.randn_like(inputs["hidden_states"]))
    inputs["timestep"].mul_(0.5)
    output.fill_(torch.nan)
    graph.replay()
    captured = output.float().cpu().numpy()
    assert relative_error(captured, run(model, inputs)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_with_cuda_graphs(family, bundle_of, wide_models, wide_inputs):
    bundle = bundle_of(family)
    model = qvdit.runtimes.load(bundle, device="cuda")
    inputs = on_gpu(wide_inputs[family], model.dtype)
    expected = run(model, inputs)
    full = run(copy.deepcopy(wide_models[family]).cuda(), on_gpu(wide_inputs[family]))
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):
        found = run(compiled, inputs)
    assert relative_error(found, expected) < 0.5 * relative_error(expected, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_comparison_samples_what_it_simulates(family, bundle_of, wide_models, wide_inputs):
    """Float32 transformers, bf16 around their layers: the kernels stray from the simulation far less than it errs."""
    layers, inputs = checkpoint.load(bundle_of(family, 3, 6) / "quantized").layers, on_gpu(wide_inputs[family])
    full = copy.deepcopy(wide_models[family]).cuda()
    adapter = next(a for a in ADAPTERS if a.family == family)
    assert sampling.computed_by(layers, "cuda") == sampling.KERNELS
    with sampling.arithmetic("cuda"):
        whole = run(full, inputs)
        simulated, found = (
            run(sampling.quantized_transformer(full, layers, adapter, computed, compiled=False), inputs)
            for computed in (sampling.SIMULATION, sampling.KERNELS)
        )
    assert relative_error(found, simulated) < 0.2 * relative_error(simulated, whole)


# Pipelines ------------------------------------------------------------------------------------------------------------


def assert_samples_alike(sample: Callable[[Any], torch.Tensor], full: Any, reference: Any, drop_in: Any) -> None:
    """The drop-in strays from full precision as the reference does, give or take bfloat16."""
    whole, expected, found = (sample(model).float().cpu().numpy() for model in (full, reference, drop_in))
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 0.5 * relative_error(expected, whole) + 0.02


def text(tokens: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, features, generator=torch.Generator().manual_seed(seed)).cuda()


def models_of(family: str, bundle: Path, wide_models: Any) -> tuple[Any, Any, Any]:
    full = wide_models[family]
    return copy.deepcopy(full).cuda(), eager(full, bundle), qvdit.runtimes.load(bundle, device="cuda")


def test_pixel_pipeline(wan_folder, wan_model, rtn_layers, drop_in_bundle, tmp_path):
    """Nothing of this tiny model can be merged."""
    from qvdit.reference import world
    from qvdit.reference.pipeline import PixelVideoPipeline

    bundle = drop_in_bundle(tmp_path / "bundle", wan_model, rtn_layers(wan_model, 16, rank=1))
    pipe = PixelVideoPipeline.from_pretrained(wan_folder).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        generator = torch.Generator().manual_seed(5)
        return pipe([world.EXAMPLE], num_inference_steps=2, generator=generator).frames

    drop_in = qvdit.runtimes.load(bundle, device="cuda")
    assert_samples_alike(sample, copy.deepcopy(wan_model).cuda(), eager(wan_model, bundle), drop_in)


def test_wan_pipeline(bundle_of, wide_models):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    full, reference, drop_in = models_of("wan", bundle_of("wan"), wide_models)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=full, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipe.set_progress_bar_config(disable=True)

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        return pipe(
            height=256,
            width=256,
            num_frames=13,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            prompt_embeds=text(6, 64, 1),
            negative_prompt_embeds=text(6, 64, 2),
            output_type="latent",
        ).frames

    assert_samples_alike(sample, full, reference, drop_in)


def test_latte_pipeline(bundle_of, wide_models):
    from diffusers import DDIMScheduler, LattePipeline

    full, reference, drop_in = models_of("latte", bundle_of("latte"), wide_models)
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=full, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def sample(transformer: Any) -> torch.Tensor:
        pipe.transformer = transformer
        return pipe(
            negative_prompt=None,
            video_length=4,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=3.0,
            latents=noise.to(transformer.dtype),  # the pipeline draws other noise in other types
            prompt_embeds=text(6, 24, 1),
            negative_prompt_embeds=text(6, 24, 2),
            mask_feature=False,
            output_type="latent",
        ).frames

    assert_samples_alike(sample, full, reference, drop_in)
