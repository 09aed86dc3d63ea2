"""Model families: one adapter a file. To add a family, write its adapter and list it here."""

from qvdit.models.adapter import ROLES, TEMPORAL_ROLES, Fusion, ModelAdapter, Site
from qvdit.models.cogvideox import CogVideoXAdapter
from qvdit.models.latte import LatteAdapter
from qvdit.models.wan import WanAdapter

ADAPTERS: tuple[ModelAdapter, ...] = (WanAdapter(), LatteAdapter(), CogVideoXAdapter())

__all__ = ["ADAPTERS", "ROLES", "TEMPORAL_ROLES", "Fusion", "ModelAdapter", "Site"]
