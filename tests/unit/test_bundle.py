"""A bundle is what its manifest says, or an error says what is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from qvdit.contract import QvditError
from qvdit.contract.bundle import MANIFEST, SCHEMA, Manifest, read_manifest, verify, write_manifest

FILES = {"onnx/model.onnx": b"graph", "quantized/model.safetensors": b"weights" * 100}


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, make_manifest())
    return folder


def make_manifest(**changes) -> Manifest:
    manifest = Manifest(
        model="wan-shapes",
        source="abc",
        family="wan",
        class_name="WanTransformer3DModel",
        source_config={"patch_size": [1, 4, 4]},
        recipe="qvdit",
        bits="w4a8",
        target="onnxruntime",
        inputs={"hidden_states": ["batch", 3, 16, "height", "width"]},
        frames=16,
        versions={"qvdit": "0.1.0"},
        files={name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()},
    )
    return dataclasses.replace(manifest, **changes)


def edit_manifest(bundle, **changes) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**content, **changes}))


def test_a_whole_bundle_verifies(bundle):
    assert verify(bundle) == make_manifest()
    assert read_manifest(bundle) == make_manifest()
    assert make_manifest().schema == SCHEMA == 1


def test_a_size_is_kept_and_none_is_left_out(bundle):
    assert "size" not in json.loads((bundle / MANIFEST).read_text())
    sized = make_manifest(size="17x256x448")
    write_manifest(bundle, sized)
    assert verify(bundle) == sized


def test_the_same_manifest_gives_the_same_bytes(bundle):
    before = (bundle / MANIFEST).read_bytes()
    write_manifest(bundle, make_manifest())
    assert (bundle / MANIFEST).read_bytes() == before


def test_files_that_the_manifest_does_not_name_do_not_matter(bundle):
    (bundle / "report.json").write_text("{}")
    assert verify(bundle) == make_manifest()


def test_a_missing_file(bundle):
    (bundle / "onnx/model.onnx").unlink()
    with pytest.raises(QvditError) as caught:
        verify(bundle)
    assert caught.value.got == "a bundle without onnx/model.onnx"
    assert read_manifest(bundle) == make_manifest()  # which does not look at the files


def test_a_folder_in_a_files_place(bundle):
    (bundle / "onnx/model.onnx").unlink()
    (bundle / "onnx/model.onnx").mkdir()
    with pytest.raises(QvditError, match=r"without onnx/model\.onnx"):
        verify(bundle)


@pytest.mark.parametrize("position", [0, 350, -1])
def test_an_altered_byte(bundle, position):
    path = bundle / "quantized/model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(QvditError) as caught:
        verify(bundle)
    expected = hashlib.sha256(FILES["quantized/model.safetensors"]).hexdigest()
    assert hashlib.sha256(content).hexdigest()[:12] in caught.value.got
    assert expected[:12] in caught.value.expected


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "onnx/../../outside"])
def test_a_path_that_leaves_the_bundle(bundle, name):
    (bundle.parent / "outside").write_bytes(b"outside")
    edit_manifest(bundle, files={name: hashlib.sha256(b"outside").hexdigest()})
    with pytest.raises(QvditError) as caught:
        verify(bundle)
    assert caught.value.got == f"the path {name!r}"


@pytest.mark.parametrize("changes", [{"schema": 2}, {"schema": None}, {"surprise": 1}])
def test_another_schema(bundle, changes):
    edit_manifest(bundle, **changes)
    with pytest.raises(QvditError, match="of another version"):
        verify(bundle)


@pytest.mark.parametrize("field", ["files", "schema", "bits"])
def test_a_manifest_without_a_field(bundle, field):
    content = json.loads((bundle / MANIFEST).read_text())
    del content[field]
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(QvditError, match="of another version"):
        verify(bundle)


@pytest.mark.parametrize("content", ["[]", "3"])
def test_a_manifest_that_is_no_mapping(bundle, content):
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(QvditError, match="of another version"):
        verify(bundle)


def test_no_folder_no_manifest_no_json(bundle, tmp_path):
    with pytest.raises(QvditError, match="no folder"):
        verify(tmp_path / "nowhere")
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(QvditError, match="not JSON"):
        verify(bundle)
    (bundle / MANIFEST).unlink()
    with pytest.raises(QvditError, match=r"without a manifest\.json.*finish it: qvdit-export"):
        verify(bundle)
