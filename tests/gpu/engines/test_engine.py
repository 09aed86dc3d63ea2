"""Engines that were built from bundles: what they compute, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qvdit.contract import QvditError
from qvdit.contract.bundle import ENGINE, ENGINE_FACTS, ENGINE_PARITY
from qvdit.contract.parity import load_reference, relative_error
from qvdit.runtimes.tensorrt import versions
from qvdit.runtimes.tensorrt.parity import failures
from qvdit.runtimes.tensorrt.session import TensorRtSession


def test_every_bundle_has_a_proven_engine(bundles: list[Path]) -> None:
    for bundle in bundles:
        result = json.loads((bundle / ENGINE_PARITY).read_text())
        assert failures(result) == []


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_same_input_gives_the_same_output(bundles: list[Path], cuda_graph: bool) -> None:
    saved = load_reference(bundles[0])
    expected = json.loads((bundles[0] / ENGINE_PARITY).read_text())["model_rel_err"]
    with TensorRtSession.of_bundle(bundles[0], cuda_graph=cuda_graph) as session:
        first = session.infer(saved.inputs)
        assert np.array_equal(session.infer(saved.inputs), first)
        assert relative_error(first, saved.quantized) == pytest.approx(expected, rel=1e-6)
        if session.profile["timestep"][0] == [1]:
            part = session.infer({name: value[:1] for name, value in saved.inputs.items()})
            assert relative_error(part, first[:1]) < max(2 * expected, 0.05)  # roundings flip


def test_sizes_outside_the_profile_are_refused(bundles: list[Path]) -> None:
    saved = load_reference(bundles[0])
    with (
        TensorRtSession.of_bundle(bundles[0]) as session,
        pytest.raises(QvditError, match="for which the engine was built"),
    ):
        session.infer({name: np.concatenate([value] * 2) for name, value in saved.inputs.items()})


def test_a_truncated_engine_is_refused(copied: Path) -> None:
    engine = copied / ENGINE
    engine.write_bytes(engine.read_bytes()[:-1000])
    with pytest.raises(QvditError, match="damaged"):
        TensorRtSession.of_bundle(copied)


def test_damage_that_the_facts_do_not_show_is_refused_by_tensorrt(copied: Path) -> None:
    from qvdit.contract.files import sha256

    engine, facts = copied / ENGINE, copied / ENGINE_FACTS
    engine.write_bytes(engine.read_bytes()[: engine.stat().st_size // 2])
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps(content | {"engine_sha256": sha256(engine), "engine_bytes": engine.stat().st_size}))
    with pytest.raises(QvditError, match="refuses"):
        TensorRtSession.of_bundle(copied)


@pytest.mark.parametrize(("field", "value"), [("tensorrt", "10.3.0"), ("compute", "8.7")])
def test_an_engine_of_another_machine_is_refused(copied: Path, field: str, value: str) -> None:
    facts = copied / ENGINE_FACTS
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {field: value}))
    with pytest.raises(QvditError, match="got an engine"):
        TensorRtSession.of_bundle(copied)


def test_weakly_typed_tensors_have_the_types_of_the_graph(bundles: list[Path]) -> None:
    """8.6 is told every layer's precision from its tensors' types: they must be those that the file says."""
    onnx = pytest.importorskip("onnx")
    from qvdit.contract.bundle import TENSORRT_MODEL
    from qvdit.runtimes.tensorrt import plugin
    from qvdit.runtimes.tensorrt.log import logger

    trt = versions.tensorrt()
    log = logger()
    for path in (bundle / TENSORRT_MODEL for bundle in bundles):
        if plugin.is_needed(path):
            plugin.load_library(plugin.find_library(), log)
        builder = trt.Builder(log)
        network = versions.create_network(trt, builder)
        parser = trt.OnnxParser(network, log)
        assert parser.parse_from_file(str(path)), path
        model = onnx.load(path, load_external_data=False)
        kinds = {onnx.TensorProto.FLOAT: trt.DataType.FLOAT, onnx.TensorProto.FLOAT16: trt.DataType.HALF}
        values = {value.name: kinds.get(value.type.tensor_type.elem_type) for value in model.graph.value_info}
        found = versions.tensor_types(trt, network)
        compared = [name for name, kind in values.items() if kind is not None and name in found]
        wrong = [(name, str(found[name]), str(values[name])) for name in compared if found[name] != values[name]]
        assert len(compared) > 100
        assert not wrong, f"{path}: {len(wrong)} of {len(compared)}: {wrong[:10]}"
        del parser, network, builder
