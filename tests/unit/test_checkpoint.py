"""The quantized checkpoint: what is saved is what is loaded, and damage is told."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from qvdit.contract import WEIGHT_BITS, FrameRows, LowBitLayer, QvditError, StaticInt8Layer
from qvdit.contract.checkpoint import CONFIG, WEIGHTS, QuantizedCheckpoint, load, save
from qvdit.contract.layer import arrays


def low_bit(name: str, bits: int, full: bool, seed: int = 0) -> LowBitLayer:
    """N = 5, K = 37, R = 2, T = 3, with all the optional parts or none."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    optional = {}
    if full:
        optional = {
            "weight_zero": rng.integers(-half, half, 5).astype(np.int8),
            "bias": floats(5),
            "inv_smooth": floats(37),
            "alpha": floats(37, 2),
            "beta": floats(2, 5),
            "frame_gain": floats(3),
        }
    weight_q = rng.integers(-half, half, (5, 37)).astype(np.int8)
    rows = FrameRows.SEQUENCE if full else FrameRows.NONE
    return LowBitLayer(name, bits, 6 if full else 8, not full, rows, weight_q, floats(5), **optional)


def static(name: str, full: bool) -> StaticInt8Layer:
    rng = np.random.default_rng(7)
    return StaticInt8Layer(
        name=name,
        weight_q=rng.integers(-127, 128, (6, 33)).astype(np.int8),
        weight_scale=rng.random(6, np.float32),
        act_scale=np.array(0.0375, np.float32),
        bias=rng.random(6, np.float32) if full else None,
        inv_smooth=rng.random(33, np.float32) if full else None,
    )


def checkpoint(*layers: LowBitLayer | StaticInt8Layer) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(layers, "wan", "0123abc", {"patch_size": [1, 4, 4], "eps": 1e-6}, "qvdit", "w4a8")


def assert_same_layer(found, expected):
    assert type(found) is type(expected)
    assert set(arrays(found)) == set(arrays(expected))
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs
            assert type(ours) is type(theirs)


def shaped(name: str, bits: int, zero: bool) -> LowBitLayer:
    """N = 5, K = 40, in 4 groups of 10, rotated in blocks of 8."""
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    integers = [rng.integers(-half, half, shape).astype(np.int8) for shape in ((5, 40), (5, 4))]
    scale = rng.random((5, 4), np.float32)
    return LowBitLayer(
        name, bits, 8, True, FrameRows.NONE, integers[0], scale, integers[1] if zero else None, rotation=8
    )


@pytest.fixture
def mixed():
    layers = [low_bit(f"blocks.{b}.full", b, True, seed=b) for b in WEIGHT_BITS]
    layers += [low_bit(f"blocks.{b}.bare", b, False, seed=b) for b in WEIGHT_BITS]
    layers += [shaped(f"blocks.{b}.shaped", b, b != 4) for b in WEIGHT_BITS]
    # One name starts with another's: their arrays must not mix.
    return checkpoint(*layers, static("blocks.1", True), static("blocks.10", False))


def test_round_trip(tmp_path, mixed):
    save(mixed, tmp_path)
    found = load(tmp_path)
    assert [layer.name for layer in found.layers] == [layer.name for layer in mixed.layers]
    for ours, theirs in zip(found.layers, mixed.layers, strict=True):
        assert_same_layer(ours, theirs)
    for field in ("family", "source", "source_config", "recipe", "bits"):
        assert getattr(found, field) == getattr(mixed, field)


def test_the_static_scale_stays_a_scalar(tmp_path):
    save(checkpoint(static("layer", False)), tmp_path)
    act_scale = load(tmp_path).layers[0].act_scale
    assert act_scale.shape == ()
    assert act_scale.dtype == np.float32
    assert act_scale == np.float32(0.0375)


def test_same_layers_same_bytes(tmp_path, mixed):
    for folder in ("a", "b"):
        save(mixed, tmp_path / folder)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_arrays_in_another_memory_order_give_the_same_bytes(tmp_path):
    layer = low_bit("layer", 4, True)
    turned = dataclasses.replace(
        layer, weight_q=np.asfortranarray(layer.weight_q), alpha=np.asfortranarray(layer.alpha)
    )
    save(checkpoint(layer), tmp_path / "a")
    save(checkpoint(turned), tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_three_bits_take_three_bits_on_disk(tmp_path):
    wide = LowBitLayer("layer", 3, 8, True, FrameRows.NONE, np.zeros((256, 1024), np.int8), np.ones(256, np.float32))
    save(checkpoint(wide), tmp_path)
    data = 256 * 1024 * 3 // 8 + 256 * 4
    assert data < (tmp_path / WEIGHTS).stat().st_size < data + 400


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -500])
def test_truncated_weights_are_told(tmp_path, mixed, keep):
    save(mixed, tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(QvditError, match="damaged checkpoint"):
        load(tmp_path)


def test_damaged_header_is_told(tmp_path, mixed):
    save(mixed, tmp_path)
    path = tmp_path / WEIGHTS
    content = bytearray(path.read_bytes())
    content[8:12] = b"\x00\xff\x00\xff"
    path.write_bytes(content)
    with pytest.raises(QvditError, match="damaged checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files_are_told(tmp_path, mixed, name):
    save(mixed, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(QvditError, match=name):
        load(tmp_path)


def edited(layer: dict, **changes) -> dict:
    return {key: value for key, value in {**layer, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [{"k": 100}, {"weight_bits": 3}, {"rows": "diagonal"}, {"name": "other"}, {"kind": None}, {"act_bits": None}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_configuration_that_does_not_fit_is_told(tmp_path, changes):
    save(checkpoint(low_bit("layer", 4, True)), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["layers"][0] = edited(config["layers"][0], **changes)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(QvditError, match="damaged checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rotation": 16}, "a rotation of 16 features, no power of two that divides 40"),
        ({"rotation": 5}, "a rotation of 5 features"),
        ({"rotation": "hadamard"}, "damaged checkpoint"),
        ({"rotation": None}, "rotation"),
        ({"k": 38}, r"scales of shape \(5, 4\) for weights of shape \(5, 38\)"),
    ],
    ids=str,
)
def test_a_rotation_or_group_that_does_not_fit_is_told_in_one_line(tmp_path, changes, told):
    save(checkpoint(shaped("layer", 4, True)), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["layers"][0] = edited(config["layers"][0], **changes)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(QvditError, match=told) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '{"format": 1}', "{}", "null"])
def test_another_format_is_told(tmp_path, mixed, content):
    save(mixed, tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(QvditError, match="another format"):
        load(tmp_path)


def test_damaged_configuration_is_told(tmp_path, mixed):
    save(mixed, tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text()[:-10])
    with pytest.raises(QvditError, match="not JSON"):
        load(tmp_path)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_signs_take_a_bit_each(tmp_path, scale):
    layer = dataclasses.replace(shaped("rotated", 3, True), inv_smooth=np.resize(np.float32([1, -1, -1]), 40) * scale)
    save(checkpoint(layer), tmp_path)
    assert_same_layer(load(tmp_path).layers[0], layer)
    held = load_file(tmp_path / WEIGHTS)
    if scale == 1:
        assert "rotated:inv_smooth" not in held
        assert (held["rotated:signs"].dtype, held["rotated:signs"].shape) == (np.uint8, (5,))
    else:
        assert held["rotated:inv_smooth"].nbytes == 160
