"""A quantization that is stopped goes on after its last layer, and gives what it would have given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qvdit.contract import Bits
from qvdit.contract.layer import arrays
from qvdit.method import quantization
from qvdit.method import recipe as recipes
from qvdit.method.calibration import CalibrationData
from qvdit.method.quantization import QuantizationJob, quantize
from qvdit.method.started import StartedLayer, StartedLayers
from qvdit.method.statistics import Statistics, collect
from qvdit.models import WanAdapter

ADAPTER = WanAdapter()
# A closed form and a rotation; random terms, whose generator has to go on where it stopped; an SVD.
RECIPES = ["qvdit", "q-vdit-authors", "svdquant"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, example_inputs) -> CalibrationData:
    path = tmp_path_factory.mktemp("data") / "0.safetensors"
    save_file({**example_inputs((3, 16, 16, 16), 64, 2), "step": torch.tensor([0, 5])}, path)
    return CalibrationData((path,))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, wan_model, data) -> Statistics:
    return collect(wan_model, ADAPTER.sites(wan_model), data, tmp_path_factory.mktemp("statistics") / "statistics")


@pytest.fixture
def run(wan_model, statistics, data):
    """``run(recipe, folder, progress)``: the layers of ``wan_model`` as w3a6."""

    def quantized(recipe: str, folder: Path | None, progress: Any = lambda *_: None) -> tuple[Any, ...]:
        job = QuantizationJob(recipes.load(recipe), Bits(3, 6), 0)
        started = StartedLayers(folder) if folder else None
        return quantize(wan_model, ADAPTER, statistics, data, job, progress, started)

    return quantized


def stop_at(index: int) -> Any:
    def progress(done: int, _: int) -> None:
        if done == index:
            raise KeyboardInterrupt

    return progress


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for one, other in zip(found, expected, strict=True):
        of_one, of_other = arrays(one), arrays(other)
        assert of_one.keys() == of_other.keys()
        for name, array in of_one.items():
            np.testing.assert_array_equal(array, of_other[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_goes_on_and_gives_the_same(run, recipe, tmp_path, monkeypatch):
    expected = run(recipe, None)
    stopped = len(expected) // 2
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, stop_at(stopped))
    assert len(list(tmp_path.iterdir())) == stopped
    rounded = []
    original = quantization._round
    monkeypatch.setattr(quantization, "_round", lambda *given: rounded.append(1) or original(*given))
    assert_same(run(recipe, tmp_path), expected)
    assert len(rounded) == len(expected) - stopped


def test_a_damaged_layer_is_rounded_again(run, tmp_path):
    expected = run("q-vdit-authors", tmp_path)
    first, second, third = sorted(tmp_path.iterdir())[:3]
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    save_file({"latent": torch.zeros(2, 2)}, third)
    assert_same(run("q-vdit-authors", tmp_path), expected)


def test_a_layer_comes_back_with_the_generator_behind_it(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    kept = StartedLayer(torch.rand(4, 6).T, torch.rand(6), torch.zeros(6), None, torch.rand(4, 1), torch.rand(1, 6))
    layers = StartedLayers(tmp_path / "started")
    layers.keep("blocks.0.to_q", kept, generator)
    after = torch.rand(3, generator=generator)
    fresh = torch.Generator().manual_seed(0)
    found = layers.load("blocks.0.to_q", fresh, torch.device("cpu"))
    assert found is not None
    assert found.bias is None
    assert torch.equal(found.latent, kept.latent)
    assert torch.equal(found.alpha, kept.alpha)
    assert torch.equal(torch.rand(3, generator=fresh), after)
    assert layers.load("blocks.1.to_q", fresh, torch.device("cpu")) is None


def test_a_stopped_job_goes_on_and_leaves_nothing_of_it(make_job, tmp_path):
    @contextmanager
    def stopped(stage: str) -> Iterator[Any]:
        yield stop_at(3) if stage == "quantize" else (lambda *_: None)

    with pytest.raises(KeyboardInterrupt):
        make_job(tmp_path / "stopped", stopped).run("quantize")
    kept = tmp_path / "stopped" / "work" / "started"
    assert len(list(kept.glob("*/*.safetensors"))) == 3
    for name in ("stopped", "whole"):
        make_job(tmp_path / name).run("quantize")
    found, expected = (tmp_path / name / "quantized" / "model.safetensors" for name in ("stopped", "whole"))
    assert found.read_bytes() == expected.read_bytes()
    assert not kept.exists()
