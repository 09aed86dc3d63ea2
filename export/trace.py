"""A transformer as an ONNX graph in which every quantized linear is one placeholder node.

The graph is traced once; what stands in a placeholder's place (a LowBitLinear node, Q/DQ, a plain MatMul) is decided
afterwards, so that every target and the full-precision baseline share one trace.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import onnx
import torch

from qvdit.export.attention import TRANSLATIONS
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE, OPSET
from qvdit.models import ModelAdapter
from qvdit.models.copies import copy_with

OUTPUT = "sample"


class _Placeholder(torch.nn.Module):
    """Stands for a linear: a node of our domain that names the layer."""

    def __init__(self, name: str, out_features: int):
        super().__init__()
        self.name, self.out_features = name, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NODE}",
            [x],
            attrs={"layer": self.name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=DOMAIN_VERSION,
        )


def trace(
    transformer: torch.nn.Module,
    adapter: ModelAdapter,
    layers: dict[str, int],
    inputs: dict[str, torch.Tensor],
    *,
    fusable_attention: bool = True,
) -> onnx.ModelProto:
    """Export a transformer with placeholders for ``layers`` (name → N).

    Batch and, where the family allows it, the video's size are dynamic. Inputs keep diffusers' names; the output is
    called ``sample``. ``inputs`` are an example. fusable_attention: as :mod:`qvdit.export.attention` translates it;
    else as PyTorch does.
    """
    placeholders = {name: _Placeholder(name, n) for name, n in layers.items()}
    model = copy_with(transformer, placeholders).cpu().float().eval()
    adapter.prepare_for_export(model)
    # float32 throughout, time steps included: some schedulers count them in integers, others do not.
    example = {name: inputs[name].cpu().float() for name in adapter.inputs}
    shapes = {**adapter.export_shapes(dict(model.config)), "return_dict": None}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every torchvision operator that is not there
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it wonders about the type of empty attributes
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (),
            kwargs={**example, "return_dict": False},
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=list(adapter.inputs),
            output_names=[OUTPUT],
            custom_translation_table=TRANSLATIONS if fusable_attention else None,
            verbose=False,
        )
    assert program is not None  # as ever with dynamo=True
    proto = program.model_proto
    _tidy(proto, adapter)
    return proto


def _tidy(proto: onnx.ModelProto, adapter: ModelAdapter) -> None:
    """Drop what the exporter notes of this machine (paths, stack traces) and name the dynamic dimensions."""
    del proto.metadata_props[:]
    proto.producer_name, proto.producer_version = "qvdit", ""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.metadata_props[:]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    for initializer in proto.graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""
    for value in proto.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        for axis, name in adapter.dynamic_axes.get(value.name, {}).items():
            dimensions[axis].dim_param = name
    # Shapes of inner values are written in the exporter's symbols; a checker infers them again.
    del proto.graph.value_info[:]
