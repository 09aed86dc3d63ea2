"""Recipes: the shipped ones load, wrong ones are told in one line."""

from __future__ import annotations

import pytest
import yaml

from qvdit.contract import Bits, QvditError
from qvdit.method import recipe as recipes
from qvdit.method.recipe import DistillationBlock, Recipe, SmoothingBlock, TqeBlock

SHIPPED = sorted(path.stem for path in recipes.FOLDER.glob("*.yaml"))


def write(tmp_path, content) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def error_of(tmp_path, content) -> QvditError:
    with pytest.raises(QvditError) as caught:
        recipes.load(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    return caught.value


def test_names():
    assert recipes.names() == SHIPPED
    assert {"rtn", "int8-static", "smoothquant", "q-vdit-paper", "qvdit"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads(name):
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.source
    assert "\n" not in recipe.source
    assert recipe.kind == ("static" if name == "int8-static" else "dynamic")
    for bits in recipe.smoothing.by_bits:
        assert str(Bits.parse(bits)) == bits  # else it would never be found
    assert set(recipe.distillation.steps) <= {"cpu", "cuda"}


def test_rtn_does_nothing_beyond_rounding():
    assert recipes.load("rtn") == Recipe(name="rtn", source=recipes.load("rtn").source)


def test_the_papers_recipe():
    recipe = recipes.load("q-vdit-paper")
    assert recipe.activations.symmetric_from == 9
    assert recipe.tqe == TqeBlock(rank=1, start="zeros", frame_gain="temporal", inner_rank=32)
    assert recipe.distillation.relation_weight == 100
    assert not recipe.distillation.quantize_activations
    strengths = {text: recipe.smoothing_strength(Bits.parse(text)) for text in ("w3a8", "w4a8", "w6a6", "w4a6", "w8a8")}
    assert strengths == {"w3a8": 0.11, "w4a8": 0.11, "w6a6": 0.5, "w4a6": 0, "w8a8": 0}


def test_a_recipe_from_a_file(tmp_path):
    content = {
        "name": "mine",
        "source": "me",
        "smoothing": {"strength": 1},
        "tqe": {"rank": 3},
        "layer_bits": {"*.ffn.*": 8, "blocks.0.*": 16},
    }
    recipe = recipes.load(write(tmp_path, content))
    assert recipe.smoothing == SmoothingBlock(strength=1.0)
    assert isinstance(recipe.smoothing.strength, float)
    assert recipe.tqe == TqeBlock(rank=3)
    assert recipe.layer_bits == {"*.ffn.*": 8, "blocks.0.*": 16}


def named(**fields):
    return {"name": "mine", "source": "me", **fields}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (named(surprise=1), "'surprise'"),
        (named(tqe={"ranks": 1}), "'ranks'"),
        (named(tqe={"rank": "one"}), "'one'"),
        (named(tqe={"rank": 1.5}), "1.5"),
        (named(tqe={"rank": True}), "True"),
        (named(tqe={"start": "pca"}), "'pca'"),
        (named(weights={"group": -1}), "-1"),
        (named(weights={"clip_grid": "dirty"}), "'dirty'"),
        (named(weights={"clip_by": "rounded_output"}), "clip_by: rounded_output"),
        (named(smoothing={"statistic": "max"}), "'max'"),
        (named(rotation="givens"), "'givens'"),
        (named(rotation=True), "True"),
        (named(distillation={"relation": "channels"}), "'channels'"),
        (named(tqe=None), "None"),
        (named(tqe=3), "3"),
        (named(activations={"symmetric_from": True}), "True"),
        (named(activations={"symmetric_from": "yes please"}), "'yes please'"),
        (named(smoothing={"strength": "0.5 or so"}), "'0.5 or so'"),
        (named(smoothing={"strength": False}), "False"),
        (named(smoothing={"by_bits": {"w4a8": "half"}}), "half"),
        (named(smoothing={"by_bits": [0.5]}), "[0.5]"),
        (named(distillation={"steps": {"cpu": 1.5}}), "1.5"),
        (named(distillation={"steps": 100}), "100"),
        (named(kind="magic"), "'magic'"),
        (named(kind=["dynamic"]), "['dynamic']"),
        (named(layer_bits={"*": 5}), "5 weight bits for layers '*'"),
        (named(layer_bits={"a": 4, "b": 32}), "32 weight bits for layers 'b'"),
        (named(layer_bits={"*": "4"}), "'4'"),
        (named(layer_bits={"*": True}), "True"),
        (named(layer_bits={1: 4}), "1"),
        ({"name": "mine"}, "without 'source'"),
        ({"source": "me"}, "without 'name'"),
        ({"name": 3, "source": "me"}, "3"),
        ({**named(), 1: 2}, "1"),
        ({**named(), 1: 2, "surprise": 3}, "key"),
        (["name"], "['name']"),
        ("", "None"),
        ("just words", "'just words'"),
        ("name: [unclosed", "not YAML"),
        ("name: !!python/object:os.system {}", "not YAML"),
    ],
    ids=str,
)
def test_wrong_recipes(tmp_path, content, got):
    assert got in error_of(tmp_path, content).got


def test_a_wrong_value_is_told_with_its_place_and_what_is_right(tmp_path):
    error = error_of(tmp_path, named(tqe={"start": "pca"}))
    assert error.got.endswith("mine.yaml: tqe: start")
    assert error.expected == "one of closed_form, zeros, svd"
    error = error_of(tmp_path, named(weights={"rounding": 3}))
    assert error.expected == "one of nearest, second_order"
    error = error_of(tmp_path, named(layer_bits={"*": 5}))
    assert error.expected == "2, 3, 4, 6, 8, or 16 to keep it in full precision"


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(QvditError, match="not YAML"):
        recipes.load(str(path))


@pytest.mark.parametrize("name", ["nothing", "nowhere/mine.yaml", "mine.yml", "../recipes/rtn", ""])
def test_a_recipe_that_is_not_there(name):
    with pytest.raises(QvditError) as caught:
        recipes.load(name)
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    assert caught.value.got == f"recipe {name!r}" + (", a file that is not there" if is_path else "")
    for shipped in SHIPPED:
        assert shipped in caught.value.expected


def test_the_first_pattern_that_matches_decides():
    recipe = Recipe("mine", "me", layer_bits={"*.ffn.*": 8, "blocks.0.*": 16, "*": 2})
    assert recipe.weight_bits("blocks.0.ffn.net.2", 4) == 8
    assert recipe.weight_bits("blocks.0.attn1.to_q", 4) == 16
    assert recipe.weight_bits("blocks.1.attn1.to_q", 4) == 2
    turned = Recipe("mine", "me", layer_bits=dict(reversed(recipe.layer_bits.items())))
    assert turned.weight_bits("blocks.0.ffn.net.2", 4) == 2


def test_the_default_where_no_pattern_matches():
    recipe = Recipe("mine", "me", layer_bits={"blocks.0.*": 8, "BLOCKS.1.*": 8})
    assert recipe.weight_bits("blocks.1.attn1.to_q", 3) == 3  # case matters
    assert recipe.weight_bits("blocks.0", 3) == 3


def test_the_order_in_the_file_is_the_order(tmp_path):
    path = write(tmp_path, "name: mine\nsource: me\nlayer_bits: {zz*: 8, '*': 4, aa*: 2}\n")
    assert recipes.load(path).weight_bits("aa", 3) == 4
    assert recipes.load(path).weight_bits("zz", 3) == 8


@pytest.mark.parametrize(("bits", "expected"), [("w3a8", 0.11), ("w6a6", 0.0), ("w8a8", 0.3)])
def test_smoothing_by_bits_overrides_strength(bits, expected):
    smoothing = SmoothingBlock(strength=0.3, by_bits={"w3a8": 0.11, "w6a6": 0.0})
    assert Recipe("mine", "me", smoothing=smoothing).smoothing_strength(Bits.parse(bits)) == expected


@pytest.mark.parametrize(
    ("steps", "device", "asked", "expected"),
    [
        ({}, "cuda", None, 0),
        ({}, "cuda", 500, 0),  # the method does not train, whatever the user asks for
        ({"cpu": 10, "cuda": 1000}, "cpu", None, 10),
        ({"cpu": 10, "cuda": 1000}, "cuda", None, 1000),
        ({"cpu": 10, "cuda": 1000}, "cuda", 7, 7),
        ({"cpu": 10, "cuda": 1000}, "cuda", 0, 0),
        ({"cuda": 1000}, "cpu", None, 0),
        ({"cuda": 1000}, "cpu", 7, 7),
    ],
)
def test_the_budget_of_distillation(steps, device, asked, expected):
    recipe = Recipe("mine", "me", distillation=DistillationBlock(steps=steps))
    assert recipe.distillation_steps(device, asked) == expected


def test_override_replaces_fields_of_blocks():
    recipe = recipes.load("qvdit")
    changed = recipes.override(recipe, tqe={"rank": 4}, smoothing={})
    assert changed.tqe.rank == 4
    assert changed.tqe.start == recipe.tqe.start
    assert recipes.override(changed, tqe={"rank": recipe.tqe.rank}) == recipe
