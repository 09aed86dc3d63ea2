"""Families without a shipped model, the whole way: random weights, no training, every integer equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from qvdit.contract import checkpoint
from qvdit.contract.bundle import TENSORRT_MODEL, verify
from qvdit.contract.files import read_json
from qvdit.export.plugin import with_placeholders
from tests.gpu.families import FAMILIES, random_pipeline


@pytest.mark.parametrize(
    ("family", "recipe", "bits", "layers"),
    [
        ("latte", "qvdit", "w3a6", 16),
        ("cogvideox", "qvdit", "w4a8", 12),
        ("cogvideox", "int8-static", "w8a8", 12),
    ],
)
def test_random_model_becomes_a_proven_bundle(
    family: str, recipe: str, bits: str, layers: int, make_job: Any, shared: Any, tmp_path: Path
) -> None:
    model = shared(f"random-{family}", lambda folder: random_pipeline(family, folder))
    out = tmp_path / "out"
    make_job(out, model=str(model), recipe=recipe, bits=bits, target="tensorrt", prompt_count=1).run("parity")
    manifest = verify(out)
    assert (manifest.family, manifest.frames) == (family, 3 if family == "cogvideox" else 16)
    found = read_json(out / "work" / "parity.json", "parity")
    assert found["layers_compared"] == found["layers_total"] == layers
    assert found["xq_compared"] > 0
    assert found["xq_mismatches"] == found["acc_mismatches"] == 0
    assert found["error_ratio"] == pytest.approx(1.0, abs=0.1)
    assert 1e-4 < found["error_reference"] < 0.1
    engine = onnx.load(out / TENSORRT_MODEL)
    if recipe == "qvdit":
        assert found["acc_compared"] > 0
        held = {layer.name for layer in with_placeholders(engine)[1]}
        assert held == {layer.name for layer in checkpoint.load(out / "quantized").layers}
    else:
        # of each layer's input and of its weight
        assert sum(node.op_type == "QuantizeLinear" for node in engine.graph.node) == 2 * layers


def test_random_models_are_of_every_family() -> None:
    from qvdit.models import ADAPTERS

    assert set(FAMILIES) == {adapter.family for adapter in ADAPTERS}
