"""PyTorch's FP16 run, kept beside a bundle's reference."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvdit.runtimes
from qvdit import half
from qvdit.contract import QvditError
from qvdit.contract.bundle import ORT_MODEL, PARITY_HALF, read_manifest, verify, write_manifest
from qvdit.contract.parity import load_half, load_reference, relative_error


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("work")))


class Drop:
    """A drop-in that answers with what it is given, in its type, and notes the types."""

    def __init__(self) -> None:
        self.types: dict[str, torch.dtype] = {}

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def __call__(self, return_dict: bool, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        self.types = {name: tensor.dtype for name, tensor in inputs.items()}
        return (inputs["hidden_states"] / 3,)


def test_the_run_is_kept(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, asked = Drop(), {}

    def load(bundle: Path, **options: Any) -> Drop:
        asked.update(options)
        return model

    monkeypatch.setattr(qvdit.runtimes, "load", load)
    monkeypatch.setattr("sys.argv", ["half", str(copied)])
    before = verify(copied)
    assert load_half(copied) is None
    assert half.main() == 0
    assert asked == {"device": "cuda", "dtype": "float16"}
    half_type, exact = torch.float16, torch.float32
    assert model.types == {"hidden_states": half_type, "timestep": exact, "encoder_hidden_states": half_type}
    saved = load_reference(copied)
    expected = (saved.inputs["hidden_states"].astype(np.float16) / np.float16(3)).astype(np.float32)
    kept = load_half(copied)
    assert kept is not None
    assert relative_error(kept, expected) < 1e-3
    assert "FP16 run, relative error" in capsys.readouterr().out
    assert verify(copied) == before  # the bundle's bytes are what they were


def test_it_is_of_the_graphs_type(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_manifest(copied, dataclasses.replace(read_manifest(copied), precision="bf16"))
    model, asked = Drop(), {}
    monkeypatch.setattr(qvdit.runtimes, "load", lambda bundle, **options: asked.update(options) or model)
    monkeypatch.setattr("sys.argv", ["half", str(copied)])
    assert half.main() == 0
    assert asked["dtype"] == "bfloat16"
    assert model.types["hidden_states"] == torch.bfloat16
    assert "BF16 run, relative error" in capsys.readouterr().out


def test_one_of_another_model_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvdit.runtimes, "load", lambda *_, **__: Drop())
    half.run_half(copied)
    with (copied / ORT_MODEL).open("ab") as file:
        file.write(b"more")
    with pytest.raises(QvditError, match=r"half\.safetensors of another model"):
        load_half(copied)
    (copied / PARITY_HALF).write_bytes(b"nothing")
    with pytest.raises(QvditError, match="damaged"):
        load_half(copied)


def test_what_is_no_bundle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qvdit.runtimes, "load", lambda *_, **__: Drop())
    monkeypatch.setattr("sys.argv", ["half", str(tmp_path)])
    assert half.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["half"])
    with pytest.raises(SystemExit):
        half.main()
