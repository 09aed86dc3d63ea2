"""Copies of transformers: what is replaced is not copied, and the original stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qvdit.compare import sampling
from qvdit.method import reference
from qvdit.models import WanAdapter
from qvdit.models.copies import copy_with
from qvdit.reference import world


@pytest.fixture
def uncopied_wan(tiny_wan: Any) -> Any:
    """A Wan whose quantized linears cannot be copied."""

    def refuse(_: object) -> None:
        raise AssertionError("a linear that is replaced was copied")

    for site in WanAdapter().sites(tiny_wan):
        tiny_wan.get_submodule(site.name).__deepcopy__ = refuse
    return tiny_wan


def test_replacements_are_there_and_everything_else_is_copied(uncopied_wan: Any):
    names = [site.name for site in WanAdapter().sites(uncopied_wan)]
    linears = [uncopied_wan.get_submodule(name) for name in names]
    replacements = {name: torch.nn.Identity() for name in names}
    found = copy_with(uncopied_wan, replacements)
    assert all(found.get_submodule(name) is module for name, module in replacements.items())
    assert [uncopied_wan.get_submodule(name) for name in names] == linears
    left, kept = found.state_dict(), uncopied_wan.state_dict()
    assert left.keys() == {name for name in kept if name.rpartition(".")[0] not in names}
    for name, value in left.items():
        assert torch.equal(value, kept[name])
        assert value.data_ptr() != kept[name].data_ptr(), name


@pytest.mark.parametrize(
    "quantized",
    [
        reference.quantized_transformer,
        lambda full, layers: sampling.quantized_transformer(full, layers, WanAdapter(), sampling.KERNELS),
    ],
    ids=["reference", "kernels"],
)
def test_quantized_transformers_copy_no_linear(quantized: Callable[..., Any], uncopied_wan: Any, rtn_layers: Any):
    layers = rtn_layers(uncopied_wan, world.FRAMES, bits=4)
    found = quantized(uncopied_wan, layers)
    held = [module for module in found.blocks.modules() if isinstance(module, torch.nn.Linear | torch.nn.Identity)]
    assert not held
    assert isinstance(uncopied_wan.get_submodule(layers[0].name), torch.nn.Linear)
