"""Every shipped method: it quantizes a tiny model, the export's integers are its own, and each block does its part."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from qvdit.contract import Bits, FrameRows, checkpoint
from qvdit.contract.layer import WeightSize, rotation_block
from qvdit.contract.parity import compare_layer, relative_error
from qvdit.export import graph
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationData
from qvdit.method.quantization import QuantizationJob, quantize
from qvdit.method.recipe import Recipe
from qvdit.method.reference import quantized_transformer, visit_layers
from qvdit.method.smoothing import smoothing_scale, weight_salience
from qvdit.method.statistics import Statistics, collect
from qvdit.models import WanAdapter
from qvdit.runtimes.layers import LayerModels

ADAPTER = WanAdapter()
STEPS = [0, 3, 9]


@pytest.fixture(scope="module")
def data(tmp_path_factory, example_inputs) -> CalibrationData:
    """Random inputs of ``wan_model`` in the place of recorded ones: two prompts, three steps."""
    folder = tmp_path_factory.mktemp("data")
    shards = []
    for index in range(2):
        inputs = example_inputs((3, 16, 16, 16), 64, len(STEPS), seed=index)
        save_file({**inputs, "step": torch.tensor(STEPS)}, folder / f"{index}.safetensors")
        shards.append(folder / f"{index}.safetensors")
    return CalibrationData(tuple(shards))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, wan_model, data) -> Statistics:
    return collect(wan_model, ADAPTER.sites(wan_model), data, tmp_path_factory.mktemp("statistics") / "statistics")


@pytest.fixture
def make(wan_model, statistics, data):
    """``make(recipe, bits, steps)``: the layers of ``wan_model``, whose K are 32 and 48, by name."""

    def quantized(recipe: Recipe, bits: str = "w4a8", steps: int = 0) -> dict[str, Any]:
        job = QuantizationJob(recipe, Bits.parse(bits), steps)
        return {layer.name: layer for layer in quantize(wan_model, ADAPTER, statistics, data, job)}

    return quantized


def shipped(name: str) -> Recipe:
    """A recipe at a tiny model's size: groups of 16 in the place of 64."""
    recipe = recipes.load(name)
    return recipes.override(recipe, weights={"group": 16} if recipe.weights.group else {})


def model_error(model: Any, layers: dict[str, Any], inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        exact = model(**inputs, return_dict=False)[0]
        found = quantized_transformer(model, tuple(layers.values()))(**inputs, return_dict=False)[0]
    return relative_error(found.numpy(), exact.numpy())


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe(name, make, wan_model, traced_wan, example_inputs, tmp_path):
    recipe = shipped(name)
    if recipe.kind == "static":
        pytest.importorskip("modelopt.torch.quantization")
    bits = "w8a8" if recipe.kind == "static" else "w4a6"
    layers = make(recipe, bits, 2 if recipe.distillation.steps else 0)
    assert list(layers) == [site.name for site in ADAPTER.sites(wan_model)]
    kept = checkpoint.QuantizedCheckpoint(tuple(layers.values()), "wan", "source", {}, name, bits)
    checkpoint.save(kept, tmp_path)
    loaded = checkpoint.load(tmp_path).layers
    assert WeightSize.of(loaded) == WeightSize.of(layers.values())
    for body in ("qdq", "integer"):
        model = graph.quantized_model(traced_wan, loaded, body)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, tmp_path / f"{body}.onnx")
    inputs = example_inputs((3, 16, 16, 16), 64, seed=9)
    runtime = LayerModels(tmp_path / "integer.onnx", 1)
    compared = []

    def visit(reference):
        found = runtime.run(reference.name, reference.x, reference.tokens_per_frame)
        compared.append(compare_layer(reference, found))

    visit_layers(quantized_transformer(wan_model, loaded), inputs, visit)
    assert len(compared) == len(layers)
    assert sum(layer.xq_mismatches + layer.acc_mismatches for layer in compared) == 0
    assert max(layer.rel_err for layer in compared) < 1e-5
    assert model_error(wan_model, layers, inputs) < (0.05 if bits == "w8a8" else 0.5)


def test_the_recipes_of_the_papers_table():
    named = {"rtn", "int8-static", "q-dit", "ptq4dit", "smoothquant", "quarot", "efficientdm", "svdquant", "vidit-q"}
    assert set(recipes.names()) >= named | {"q-vdit-authors", "q-vdit-paper", "qvdit"}


def test_the_authors_recipe_is_the_papers_but_for_its_defects():
    paper, authors = recipes.load("q-vdit-paper"), recipes.load("q-vdit-authors")
    mended = recipes.override(
        authors,
        weights={"clip_grid": "clean"},
        smoothing={"statistic": "mean"},
        tqe={"gain_start": "one"},
        distillation={"relation": "frames"},
    )
    assert dataclasses.replace(mended, name=paper.name, source=paper.source) == paper


# Groups ---------------------------------------------------------------------------------------------------------------


def test_groups_have_scales_of_their_own(make, wan_model):
    layers = make(shipped("q-dit"))
    for name, layer in layers.items():
        n, k = wan_model.get_submodule(name).weight.shape
        assert layer.weight_scale.shape == layer.weight_zero.shape == (n, k // 16)
        assert layer.group == 16
    whole = make(recipes.override(shipped("q-dit"), weights={"group": 0}))
    assert {layer.weight_scale.ndim for layer in whole.values()} == {1}


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_groups_lower_the_error(make, wan_model, example_inputs, rounding):
    inputs = example_inputs((3, 16, 16, 16), 64, seed=9)
    errors = [
        model_error(
            wan_model,
            make(recipes.override(shipped("q-dit"), weights={"group": group, "rounding": rounding}), "w3a8"),
            inputs,
        )
        for group in (0, 8)
    ]
    assert errors[1] < 0.9 * errors[0]


# Rotation -------------------------------------------------------------------------------------------------------------


def test_a_rotated_layer_is_the_unrotated_one_in_the_limit(make, wan_model, example_inputs):
    inputs = example_inputs((3, 16, 16, 16), 64, seed=9)
    rtn = recipes.load("rtn")
    errors = [
        model_error(wan_model, make(recipe, "w8a8"), inputs)
        for recipe in (rtn, dataclasses.replace(rtn, rotation="hadamard"), shipped("vidit-q"))
    ]
    assert max(errors) < 0.02


def test_linears_that_read_one_input_rotate_it_alike(make, wan_model):
    layers = make(shipped("quarot"))
    by_input: dict[str, list[np.ndarray]] = {}
    for site in ADAPTER.sites(wan_model):
        layer = layers[site.name]
        assert layer.rotation == rotation_block(layer.shape[1])
        assert set(np.unique(layer.inv_smooth)) == {-1.0, 1.0}
        by_input.setdefault(site.shared_input, []).append(layer.inv_smooth)
    for signs in by_input.values():
        assert all(np.array_equal(signs[0], other) for other in signs)
    first, second = (signs[0] for name, signs in by_input.items() if name.endswith("attn1.x"))
    assert not np.array_equal(first, second)


def test_rotation_composes_with_smoothing(make, wan_model, statistics):
    layers = make(shipped("vidit-q"))
    site = ADAPTER.sites(wan_model)[3]  # the only reader of its input
    peak = weight_salience([wan_model.get_submodule(site.name).weight])
    scale = smoothing_scale(statistics.of(site).abs_max_by_step.mean(0), peak, 0.11)
    np.testing.assert_allclose(np.abs(layers[site.name].inv_smooth), 1 / scale.numpy(), rtol=1e-5)
    assert (layers[site.name].inv_smooth < 0).any()


# The SVD branch, gains and salience ----------------------------------------------------------------------------------


def test_the_svd_branch_is_taken_out_before_rounding(make, wan_model):
    recipe = recipes.override(shipped("svdquant"), tqe={"rank": 4}, smoothing={"strength": 0.0})
    for name, layer in make(recipe).items():
        weight = wan_model.get_submodule(name).weight.numpy()
        u, sigma, vt = np.linalg.svd(weight.astype(np.float64))
        branch = (layer.alpha.astype(np.float32) @ layer.beta.astype(np.float32)).T
        halves = np.finfo(np.float16).eps * sigma[0]  # the branch is stored in half precision
        np.testing.assert_allclose(branch, (u[:, :4] * sigma[:4]) @ vt[:4], atol=halves)
        left = weight - branch
        scale = np.repeat(layer.weight_scale.reshape(len(weight), -1), layer.group, 1)
        inside = np.abs(left / scale) < 7.5  # a clipped weight may be further off
        assert np.abs(left - layer.weight_q * scale)[inside].max() <= 0.5 * scale.max() + halves


@pytest.mark.parametrize(("name", "gain"), [("q-vdit-authors", 2.0), ("q-vdit-paper", 1.0)])
def test_where_gains_start(make, name, gain, monkeypatch):
    started = []
    monkeypatch.setattr(
        "qvdit.method.quantization._distil",
        lambda _transformer, _adapter, layers, *_: started.extend(layers),
    )
    make(recipes.load(name), "w4a8", 1)
    gained = [layer for layer in started if layer.gain is not None]
    assert {value for layer in gained for value in layer.gain.tolist()} == {gain}
    assert {layer.name.split(".", 2)[2] for layer in gained} == {
        f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert all(layer.rows is FrameRows.SEQUENCE for layer in gained)
    assert all((layer.beta == 0).all() and (layer.alpha != 0).any() for layer in gained)


def test_the_statistic_decides_the_smoothing(make):
    found = [
        make(recipes.override(shipped("ptq4dit"), smoothing={"statistic": statistic}))["blocks.0.ffn.net.2"].inv_smooth
        for statistic in ("mean", "spearman", "ema")
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(found[first], found[second])


def test_distillation_copies_no_linear(make, wan_model, monkeypatch):
    def refuse(_):
        raise AssertionError("a linear that is replaced was copied")

    linears = {site.name: wan_model.get_submodule(site.name) for site in ADAPTER.sites(wan_model)}
    for linear in linears.values():
        monkeypatch.setattr(linear, "__deepcopy__", refuse, raising=False)
    assert make(recipes.load("q-vdit-authors"), "w4a8", 1).keys() == linears.keys()
    assert all(wan_model.get_submodule(name) is linear for name, linear in linears.items())
