"""What differs between TensorRT's versions, against an API recorded from the headers of each."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt import Config, LayerType, Network, Tensor
from fake_tensorrt import DataType as Kind
from fake_tensorrt import Layer as NetworkLayer
from test_tensorrt_plugin import includes

from qvdit.runtimes.tensorrt import versions


@dataclass(frozen=True)
class Recorded:
    """One version: enumerators by the number that C++ gives them, and which of two functions there are."""

    network_flags: dict[str, int]
    builder_flags: frozenset[str]  # of those that make a difference here
    creators: frozenset[str]  # of the plugin registry
    memory: frozenset[str]  # of the engine
    error_names: bool  # a parser's error knows its node's name


PRECISION = frozenset({"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"})
RECORDED = {
    "8.6.0": Recorded(
        {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1},
        PRECISION | {"TF32"},
        frozenset({"get_plugin_creator"}),
        frozenset({"device_memory_size"}),
        False,
    ),
    "10.3.0": Recorded(
        {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        PRECISION | {"TF32"},
        frozenset({"get_plugin_creator", "get_creator"}),
        frozenset({"device_memory_size", "device_memory_size_v2"}),
        True,
    ),
    "10.13.0": Recorded(
        {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "PREFER_JIT_PYTHON_PLUGINS": 2, "PREFER_AOT_PYTHON_PLUGINS": 3},
        PRECISION | {"TF32"},
        frozenset({"get_plugin_creator", "get_creator"}),
        frozenset({"device_memory_size", "device_memory_size_v2"}),
        True,
    ),
    "11.1": Recorded(
        {"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1, "PREFER_AOT_PYTHON_PLUGINS": 2},
        frozenset({"TF32"}),
        frozenset({"get_creator"}),
        frozenset({"device_memory_size_v2"}),
        True,
    ),
}
ALL = pytest.mark.parametrize("version", RECORDED)
TYPED = pytest.mark.parametrize("version", [version for version in RECORDED if version != "8.6.0"])


class Builder:
    """Notes the flags that a network is made with."""

    def create_network(self, flags: int) -> int:
        return flags


def recorded(version: str) -> Any:
    """The module tensorrt of a version, as far as it was recorded; asking for anything else fails."""
    known = RECORDED[version]
    finders = {name: (lambda *asked, name=name: (name, asked)) for name in known.creators}
    return SimpleNamespace(
        __version__=version,
        NetworkDefinitionCreationFlag=enum.IntEnum("NetworkDefinitionCreationFlag", known.network_flags),
        BuilderFlag=enum.Enum("BuilderFlag", sorted(known.builder_flags)),
        MemoryPoolType=enum.Enum("MemoryPoolType", "WORKSPACE"),
        ProfilingVerbosity=enum.Enum("ProfilingVerbosity", "DETAILED"),
        get_plugin_registry=lambda: SimpleNamespace(**finders),
        DataType=Kind,
        LayerType=LayerType,
    )


def network() -> Network:
    """One product in float32."""
    made = Network(0)
    made.inputs = [Tensor("x", Kind.FLOAT)]
    made.layers = [NetworkLayer(LayerType.MATRIX_MULTIPLY, made.inputs * 2, [Tensor("y", Kind.FLOAT)])]
    return made


def configured(version: str) -> tuple[Any, Config, Network]:
    trt, config, made = recorded(version), Config(), network()
    config.flags = {trt.BuilderFlag.TF32}
    versions.configure(trt, config, made, 1 << 20, 1, True)
    return trt, config, made


@ALL
def test_networks_are_strongly_typed_where_that_exists(version: str) -> None:
    flags = versions.create_network(recorded(version), Builder())
    known = RECORDED[version].network_flags
    assert flags == 1 << known.get("STRONGLY_TYPED", known.get("EXPLICIT_BATCH", 0))


def test_a_version_that_has_no_flag_for_its_only_kind_of_network() -> None:
    trt = recorded("11.1")
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"PREFER_JIT_PYTHON_PLUGINS": 1})
    assert versions.create_network(trt, Builder()) == 0


def test_a_weakly_typed_network_is_typed_by_flags_and_layers() -> None:
    trt, config, made = configured("8.6.0")
    assert config.flags == {trt.BuilderFlag.FP16, trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS}
    assert made.layers[0].precision == Kind.FLOAT
    assert versions.relax(trt, config)
    assert config.flags == {trt.BuilderFlag.FP16, trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS}
    assert not versions.relax(trt, config)


@TYPED
def test_a_strongly_typed_network_is_typed_by_itself(version: str) -> None:
    trt, config, made = configured(version)
    assert config.flags == set()  # TF32 is cleared, no precision is set
    assert config.tactic_sources is None
    assert (made.layers[0].precision, made.layers[0].output_types) == (None, {})
    assert (config.builder_optimization_level, list(config.pools.values())) == (1, [1 << 20])
    assert not versions.relax(trt, config)


@ALL
def test_plugins_are_found_by_the_newest_function(version: str) -> None:
    expected = "get_creator" if "get_creator" in RECORDED[version].creators else "get_plugin_creator"
    found = versions.plugin_creator(recorded(version), "LowBitLinear", "1")
    assert found == (expected, ("LowBitLinear", "1", ""))


@ALL
@pytest.mark.parametrize("size", [0, 4096])
def test_scratch_memory(version: str, size: int) -> None:
    assert versions.device_memory(SimpleNamespace(**dict.fromkeys(RECORDED[version].memory, size))) == size


@ALL
def test_the_node_of_a_parsers_error(version: str) -> None:
    named = {"node_name": lambda: "blocks.0.attn1"} if RECORDED[version].error_names else {}
    error = SimpleNamespace(node=lambda: 7, **named)
    assert versions.error_node(error) == ("node blocks.0.attn1" if named else "node 7")
    error = SimpleNamespace(node=lambda: -1, **({"node_name": lambda: ""} if named else {}))
    assert versions.error_node(error) == "the model"


# The record -----------------------------------------------------------------------------------------------------------


def enumerators(text: str, name: str) -> dict[str, int]:
    """An enum class of the headers, by TensorRT's Python names; aliases of deprecated names are left out."""
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", re.findall(rf"enum class {name}\b[^{{;]*{{(.*?)}};", text, re.DOTALL)[0])
    found = re.findall(r"\bk(\w+)\s*(?:TRT_\w+)?\s*=\s*(\d+)", body)
    return {entry: int(number) for entry, number in found}


@ALL
def test_the_record_is_the_headers(version: str) -> None:
    folder = includes().get(".".join(version.split(".")[:2]))
    if folder is None:
        pytest.skip(f"NO TENSORRT HEADERS OF {version} HERE: THE RECORD IS NOT COMPARED")
    names = ["NvInfer.h", "NvInferRuntime.h", "NvInferRuntimeBase.h", "NvInferRuntimeCommon.h", "NvOnnxParser.h"]
    text = "".join((folder / name).read_text(errors="replace") for name in names if (folder / name).is_file())
    known = RECORDED[version]
    assert enumerators(text, "NetworkDefinitionCreationFlag") == known.network_flags
    assert set(enumerators(text, "BuilderFlag")) & (PRECISION | {"TF32"}) == known.builder_flags
    creators = {"get_plugin_creator": r"\bgetPluginCreator\(", "get_creator": r"\bgetCreator\("}
    assert {name for name, pattern in creators.items() if re.search(pattern, text)} == known.creators
    memory = {"device_memory_size": r"\bgetDeviceMemorySize\(", "device_memory_size_v2": r"\bgetDeviceMemorySizeV2\("}
    assert {name for name, pattern in memory.items() if re.search(pattern, text)} == known.memory
    if not (folder / "NvOnnxParser.h").is_file():
        pytest.skip(f"NO PARSER'S HEADER OF {version} HERE: ALL BUT ITS PART OF THE RECORD IS RIGHT")
    assert bool(re.search(r"\bnodeName\(", text)) == known.error_names
