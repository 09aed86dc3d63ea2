"""The drop-in on the kernels, without a GPU: what a bundle holds, how the model is put together, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qvdit.runtimes
from qvdit.contract import LowBitLayer, QvditError, checkpoint
from qvdit.contract.bundle import KEPT_WEIGHTS, MANIFEST, PARITY_INPUTS, PARITY_REFERENCE, read_manifest, verify
from qvdit.contract.parity import relative_error
from qvdit.method.lowbit import LowBitLinear
from qvdit.method.reference import quantized_transformer
from qvdit.models import ADAPTERS, kept
from qvdit.models.cogvideox import rotary_embedding
from qvdit.runtimes import cuda, torch_transformer
from qvdit.runtimes.torch_linear import KernelLinear
from qvdit.runtimes.torch_transformer import load_transformer

FAMILIES = ("wan", "latte", "cogvideox")
CPU = torch.device("cpu")


def adapter_of(model: Any) -> Any:
    return next(a for a in ADAPTERS if a.class_name == type(model).__name__)


@pytest.fixture(scope="module")
def bundles(wide_models: Any, rtn_layers: Any, drop_in_bundle: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """Bundles of the wide models by family, with gains; copy them to change them."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        family: drop_in_bundle(folder / family, model, rtn_layers(model, 4, rank=1))
        for family, model in wide_models.items()
    }


def build(bundle: Path, dtype: torch.dtype = torch.float32, fuse: bool = True) -> Any:
    """The drop-in on the CPU, where it can be looked at."""
    return load_transformer(bundle, read_manifest(bundle), CPU, dtype, fuse)


def with_eager_layers(model: Any, layers: tuple[Any, ...]) -> Any:
    """The model with its kernel layers replaced by eager ones, merged ones too: it can be run."""

    class SideBySide(torch.nn.Module):
        def __init__(self, parts: list[LowBitLayer]):
            super().__init__()
            self.parts = torch.nn.ModuleList(map(LowBitLinear, parts))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    by_name = {layer.name: layer for layer in layers}
    for name, module in list(model.named_modules()):
        if isinstance(module, KernelLinear):
            model.set_submodule(name, SideBySide([by_name[part] for part in module.names]))
    return model


# What a bundle holds --------------------------------------------------------------------------------------------------


def test_a_job_keeps_what_is_not_quantized(bundle: Path, wan_model: Any) -> None:
    manifest = verify(bundle)
    assert KEPT_WEIGHTS in manifest.files
    quantized = {layer.name for layer in checkpoint.load(bundle / "quantized").layers}
    held = load_file(bundle / KEPT_WEIGHTS)
    assert {name.rpartition(".")[0] for name in held}.isdisjoint(quantized)
    expected = {n: v for n, v in wan_model.state_dict().items() if n.rpartition(".")[0] not in quantized}
    assert held.keys() == expected.keys()
    for name, value in held.items():
        assert torch.equal(value.float(), expected[name])


def test_weights_are_kept_in_the_smallest_type_that_is_exact(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({str(i): torch.nn.Linear(3, 2) for i in range(4)})
    model["0"].weight.data = torch.tensor([[1.0, -2.0, 0.5], [2.0**100, 0, 3]])
    model["1"].weight.data = torch.tensor([[1 + 2**-10, -2.0, 0.5], [1, 0, 3]])
    model["2"].weight.data = torch.tensor([[1 + 2**-20, -2.0, 0.5], [1, 0, 3]])
    kept.save(model, ["3"], tmp_path / "a")
    kept.save(copy.deepcopy(model), ["3"], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    held = load_file(tmp_path / "a")
    assert [held[f"{i}.weight"].dtype for i in range(3)] == [torch.bfloat16, torch.float16, torch.float32]
    assert all(torch.equal(held[f"{i}.weight"].float(), model[str(i)].weight) for i in range(3))
    assert not any(name.startswith("3.") for name in held)


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_a_kernel(family: str, bundles: Any, wide_models: Any) -> None:
    model = build(bundles[family], fuse=False)
    assert type(model) is type(wide_models[family])
    sites = [site.name for site in adapter_of(model).sites(wide_models[family])]
    assert [name for name, module in model.named_modules() if isinstance(module, KernelLinear)] == [
        name for name, _ in wide_models[family].named_modules() if name in sites
    ]
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.manifest == read_manifest(bundles[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fuse", [True, False])
def test_it_computes_what_the_quantized_model_does(
    family: str, fuse: bool, bundles: Any, wide_models: Any, wide_inputs: Any
) -> None:
    layers = checkpoint.load(bundles[family] / "quantized").layers
    model = with_eager_layers(build(bundles[family], fuse=fuse), layers)
    with torch.no_grad():
        expected = quantized_transformer(wide_models[family], layers)(**wide_inputs[family]).sample
        found = model(**wide_inputs[family]).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_jobs_bundle_is_enough(bundle: Path) -> None:
    """Built from what a job leaves, it computes the reference that the job left beside it."""
    model = with_eager_layers(build(bundle), checkpoint.load(bundle / "quantized").layers)
    inputs = load_file(bundle / PARITY_INPUTS)
    inputs = {name.removeprefix("model:"): v.float() for name, v in inputs.items() if name.startswith("model:")}
    with torch.no_grad():
        found = model(**inputs).sample
    assert relative_error(found.numpy(), load_file(bundle / PARITY_REFERENCE)["model:quantized"].numpy()) < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_around_the_kernels(family: str, bundles: Any, wide_models: Any, wide_inputs: Any) -> None:
    layers = checkpoint.load(bundles[family] / "quantized").layers
    model = build(bundles[family], torch.bfloat16)
    assert model.dtype == torch.bfloat16
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    exact = set(model._keep_in_fp32_modules or ())
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if exact.intersection(name.split("."))
    }
    kernels = [module for module in model.modules() if isinstance(module, KernelLinear)]
    assert {module.weight_scale.dtype for module in kernels} == {torch.float32}
    half = {name: value.bfloat16() for name, value in wide_inputs[family].items()}
    with torch.no_grad():
        full = wide_models[family](**wide_inputs[family]).sample.numpy()
        expected = quantized_transformer(wide_models[family], layers)(**wide_inputs[family]).sample.numpy()
        found = with_eager_layers(model, layers)(**half).sample
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float().numpy(), expected) < relative_error(expected, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_one_input_are_merged(family: str, bundles: Any) -> None:
    model = build(bundles[family])
    merged = {n: m for n, m in model.named_modules() if isinstance(m, KernelLinear) and len(m.names) > 1}
    blocks = {
        "wan": ["blocks.0", "blocks.1"],
        "latte": ["transformer_blocks.0", "temporal_transformer_blocks.0"],
        "cogvideox": ["transformer_blocks.0", "transformer_blocks.1"],
    }
    expected = {f"{block}.attn1.to_qkv": ("to_q", "to_k", "to_v") for block in blocks[family]}
    crossing = [block for block in blocks[family] if hasattr(model.get_submodule(block), "attn2")]
    crossing = [block for block in crossing if model.get_submodule(block).attn2 is not None]
    expected |= {f"{block}.attn2.to_kv": ("to_k", "to_v") for block in crossing}
    assert {n: tuple(part.rpartition(".")[2] for part in m.names) for n, m in merged.items()} == expected
    for name in expected:
        attention = model.get_submodule(name.rpartition(".")[0])
        assert attention.fused_projections
        assert not hasattr(attention, "to_v")
        assert hasattr(attention, "to_q") == name.endswith("to_kv")


def test_image_keys_and_values_keep_an_attention_as_it_is(wide_models: Any) -> None:
    """Diffusers has one flag for both, and those of images are not quantized."""
    model = copy.deepcopy(wide_models["wan"])
    model.blocks[1].attn2.add_k_proj = torch.nn.Linear(8, 128)
    fusions = adapter_of(model).fusions(model)
    assert [f"{f.attention}.{f.merged}" for f in fusions] == [
        "blocks.0.attn1.to_qkv",
        "blocks.0.attn2.to_kv",
        "blocks.1.attn1.to_qkv",
    ]
    assert fusions[1].names() == ("blocks.0.attn2.to_k", "blocks.0.attn2.to_v")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fuse", "rank"), [(False, 1), (True, 0)])
def test_the_whole_model_compiles_without_a_break(
    family: str,
    fuse: bool,
    rank: int,
    wide_models: Any,
    wide_inputs: Any,
    rtn_layers: Any,
    drop_in_bundle: Any,
    tmp_path: Path,
) -> None:
    full = wide_models[family]
    model = build(drop_in_bundle(tmp_path / "bundle", full, rtn_layers(full, 4, rank=rank)), fuse=fuse).to("meta")
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    inputs = {name: value.to("meta") for name, value in wide_inputs[family].items()}
    if family == "cogvideox":  # as its pipeline does; computed in the forward pass it would be a graph of its own
        inputs["image_rotary_emb"] = rotary_embedding(model.config, inputs["hidden_states"].shape, torch.device("meta"))
    with torch.no_grad():
        (output,) = torch.compile(model, backend=keep, fullgraph=True)(**inputs, return_dict=False)
    assert output.shape == full(**wide_inputs[family]).sample.shape
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    kernels = [module for module in model.modules() if isinstance(module, KernelLinear)]
    assert sum("qvdit" in target for target in targets) == len(kernels)


# What the kernels do not serve ----------------------------------------------------------------------------------------


def test_layers_that_run_eagerly_are_counted_and_named(
    bundles: Any, wide_models: Any, drop_in_bundle: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {layer.name: layer for layer in checkpoint.load(bundles["wan"] / "quantized").layers}
    for name, changes in {
        "blocks.0.attn1.to_k": {"weight_scale": np.ones((128, 2), np.float32)},
        "blocks.1.ffn.net.2": {"weight_scale": np.ones((128, 2), np.float32)},
    }.items():
        layers[name] = dataclasses.replace(layers[name], **changes)
    changed = drop_in_bundle(tmp_path / "bundle", wide_models["wan"], tuple(layers.values()))
    with caplog.at_level(logging.WARNING, logger="qvdit"):
        model = build(changed)
    (record,) = caplog.records
    assert record.getMessage() == (
        "2 of 20 quantized layers run as PyTorch's slow reference: "
        "blocks.0.attn1.to_k (groups), blocks.1.ffn.net.2 (groups)"
    )
    eager = {name for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    assert eager == {"blocks.0.attn1.to_k", "blocks.1.ffn.net.2"}
    assert not model.blocks[0].attn1.fused_projections
    assert model.blocks[1].attn1.fused_projections


def test_nothing_is_said_where_all_are_served(bundles: Any, caplog: pytest.LogCaptureFixture) -> None:
    build(bundles["latte"])
    assert not caplog.records


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(bundles: Any, tmp_path: Path) -> Path:
    return shutil.copytree(bundles["wan"], tmp_path / "copied")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU and kernels for it; the model stays on the CPU."""
    monkeypatch.setattr(torch_transformer, "check_device", lambda _: CPU)


def test_no_cuda_device(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QvditError, match=r"no CUDA device; expected an NVIDIA GPU .*device='cpu'"):
        qvdit.runtimes.load(bundles["wan"], device="cuda")


def test_a_device_that_is_not_there(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(QvditError, match=r"'cuda:2'.*one of the 2 here: cuda:0 … cuda:1"):
        qvdit.runtimes.load(bundles["wan"], device="cuda:2")


def test_no_kernels(bundles: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv(cuda.VARIABLE, str(tmp_path / "nowhere.so"))
    cuda.library.cache_clear()
    with pytest.raises(QvditError, match=r"nowhere\.so.*build it: cmake"):
        qvdit.runtimes.load(bundles["wan"], device="cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", "tpu", "", "CUDA"])
def test_devices_that_nobody_knows(device: str, bundles: Any) -> None:
    with pytest.raises(QvditError, match="expected cpu, cuda or cuda:N") as caught:
        qvdit.runtimes.load(bundles["wan"], device=device)
    assert repr(device) in caught.value.got


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", ["float64", torch.int8, "half"])
def test_dtypes_that_nobody_knows(dtype: Any, bundles: Any) -> None:
    with pytest.raises(QvditError, match="expected one of bfloat16, float16, float32"):
        qvdit.runtimes.load(bundles["wan"], device="cuda", dtype=dtype)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.bfloat16), ("float16", torch.float16), (torch.float32, torch.float32)]
)
def test_dtypes(dtype: Any, expected: torch.dtype, bundles: Any) -> None:
    assert qvdit.runtimes.load(str(bundles["wan"]), device="cuda", dtype=dtype).dtype == expected


@pytest.mark.usefixtures("on_a_gpu")
def test_settings_of_the_other_device_are_refused(bundles: Any) -> None:
    with pytest.raises(QvditError, match="2 threads on a GPU"):
        qvdit.runtimes.load(bundles["wan"], threads=2, device="cuda:0")
    with pytest.raises(QvditError, match="on the CPU"):
        qvdit.runtimes.load(bundles["wan"], dtype="bfloat16")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_bundle_made_before(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    del content["files"][KEPT_WEIGHTS]
    (copied / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(QvditError, match=r"made before .*kept\.safetensors.*export the model again"):
        qvdit.runtimes.load(copied, device="cuda")


@pytest.mark.usefixtures("on_a_gpu")
def test_an_altered_bundle(copied: Path) -> None:
    with (copied / KEPT_WEIGHTS).open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(QvditError, match="sha256"):
        qvdit.runtimes.load(copied, device="cuda")


def test_another_models_weights(copied: Path) -> None:
    held = load_file(copied / KEPT_WEIGHTS)
    for changed, message in [
        ({**held, "surprise.weight": torch.zeros(2)}, r"with surprise\.weight"),
        ({**held, "proj_out.weight": torch.zeros(2, 3)}, r"with proj_out\.weight"),
        ({n: v for n, v in held.items() if n != "proj_out.bias"}, r"without proj_out\.bias"),
    ]:
        save_file(changed, copied / KEPT_WEIGHTS)
        with pytest.raises(QvditError, match=message):
            build(copied)
    (copied / KEPT_WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(QvditError, match="cannot be read") as caught:
        build(copied)
    assert "\n" not in str(caught.value)


def test_a_class_that_nobody_knows(copied: Path) -> None:
    manifest = dataclasses.replace(read_manifest(copied), class_name="UNet2DModel")
    with pytest.raises(QvditError, match=r"'UNet2DModel'; expected one of WanTransformer3DModel, Latte"):
        load_transformer(copied, manifest, CPU, torch.float32)
