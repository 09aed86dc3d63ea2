"""Copies of transformers in which other modules stand in some places."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch


def copy_with(model: torch.nn.Module, replacements: Mapping[str, torch.nn.Module]) -> Any:
    """A deep copy of a model, with the modules themselves in the places that their names give.

    What they replace is not copied: a transformer's linears are nearly all of its weights.
    """
    return copy.deepcopy(model, {id(model.get_submodule(name)): module for name, module in replacements.items()})
