"""Files are written whole or not at all, and paths stay in their folder."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from qvdit.contract import QvditError
from qvdit.contract.files import inside, read_json, sha256, write_atomic, write_json, write_text


class WriterStoppedError(Exception):
    pass


def half_written(temporary):
    temporary.write_text("half of the new")
    raise WriterStoppedError


def test_a_writer_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(WriterStoppedError):
        write_atomic(path, half_written)
    assert path.read_text() == "old"


def test_a_writer_that_raises_leaves_no_file_of_that_name(tmp_path):
    with pytest.raises(WriterStoppedError):
        write_atomic(tmp_path / "file.txt", half_written)
    assert [path.name for path in tmp_path.glob("[!.]*")] == []


def test_the_final_name_is_not_touched_while_writing(tmp_path):
    path = tmp_path / "deep" / "down" / "file.txt"
    seen = []

    def write(temporary):
        seen.append((path.exists(), temporary.parent == path.parent, temporary.name != path.name))
        temporary.write_text("new")

    write_atomic(path, write)
    assert seen == [(False, True, True)]
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_what_an_interrupted_run_left_is_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(WriterStoppedError):
        write_atomic(path, half_written)
    write_text(path, "né")
    assert path.read_bytes() == "né".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "new")
        write_atomic(tmp_path / "tensors", lambda temporary: save_file({"x": torch.zeros(2)}, temporary))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_json_round_trip_and_same_bytes(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_json(first, {"b": [1, 2.5, None], "a": "é"})
    write_json(second, {"a": "é", "b": [1, 2.5, None]})
    assert first.read_bytes() == second.read_bytes()
    assert read_json(first, "a test") == {"a": "é", "b": [1, 2.5, None]}
    assert json.loads(first.read_text()) == {"a": "é", "b": [1, 2.5, None]}


def test_numbers_that_are_no_json_are_refused_before_the_file_changes(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path, "a test") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"not json"], ids=["empty", "open", "cut", "bytes", "words"]
)
def test_damaged_json_is_the_users_to_know(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(QvditError) as caught:
        read_json(path, "the thing")
    assert str(path) in caught.value.got
    assert caught.value.expected == "the thing"
    assert "\n" not in str(caught.value)


def test_missing_json_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(QvditError, match="got no file"):
        read_json(tmp_path / "missing.json", "the thing")
    with pytest.raises(QvditError, match="expected the thing"):
        read_json(tmp_path, "the thing")


def test_sha256_is_of_the_whole_file(tmp_path):
    path = tmp_path / "large"
    content = bytes(range(256)) * 10_000  # more than two chunks
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["file", "deep/file", "deep/../file", "./file"])
def test_paths_inside_are_resolved(tmp_path, name):
    assert inside(tmp_path, name) == (tmp_path / name).resolve()


@pytest.mark.parametrize("name", ["../file", "deep/../../file", "..", "/etc/passwd", "../{name}x/file"])
def test_paths_that_leave_are_refused(tmp_path, name):
    name = name.format(name=tmp_path.name)  # a sibling whose name starts alike is outside too
    with pytest.raises(QvditError) as caught:
        inside(tmp_path, name)
    assert caught.value.got == f"the path {name!r}"


def test_links_that_leave_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(QvditError):
        inside(folder, "link")
