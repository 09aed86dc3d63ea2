"""Finding, checking and loading the model to quantize. Nothing here loads a pickle or runs code from a file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qvdit.contract import QvditError
from qvdit.contract.files import inside, read_json, sha256
from qvdit.models import ADAPTERS, ModelAdapter

SHIPPED = {name: Path(__file__).parent.parent / "reference" / name for name in ("wan-shapes", "latte-shapes")}
"""Reference models that come with the package, by name."""

WORLD_PIPELINE = "PixelVideoPipeline"
"""The pipeline of the drawn world: the shipped prompts are for it."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class SourceModel:
    """A diffusers pipeline on disk whose transformer can be quantized."""

    name: str
    path: Path
    adapter: ModelAdapter
    config: dict[str, Any]  # of the transformer
    fingerprint: str  # sha256 over the transformer's configuration and weights
    pipeline: str  # class name of the pipeline
    sampling: str  # digest of all that sampling depends on: the transformer, the rest of the pipeline, the libraries

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The pipeline with float32 weights on a device, in evaluation mode."""
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(logging.CRITICAL)  # what it says comes as the error below, in one line
        try:
            _check_complete(self.path / "transformer", self.adapter.class_name, self.config)
            pipeline = _pipeline_class(self.path).from_pretrained(self.path, use_safetensors=True, dtype=torch.float32)
        except (ValueError, OSError, RuntimeError) as error:
            refused = f"{self.path}, which diffusers refuses ({' '.join(str(error).split())[:300]})"
            raise QvditError(
                refused, "a whole pipeline of its own configuration", "copy or download it again"
            ) from None
        finally:
            diffusers_logging.set_verbosity(verbosity)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer.eval().requires_grad_(False)
        _check_finite(pipeline.transformer, self.path)
        self.adapter.complete(pipeline.transformer)
        return pipeline.to(device)


def find_model(name_or_path: str) -> SourceModel:
    """Look at a shipped model's name or a pipeline's folder, without loading weights; QvditError says what is wrong."""
    path = SHIPPED.get(name_or_path, Path(name_or_path))
    expected = f"the folder of a diffusers video pipeline, or one of: {', '.join(SHIPPED)}"
    if path.is_file() and path.suffix in _PICKLES:
        raise _pickle_error(path)
    if not (path / "model_index.json").is_file():
        raise QvditError(f"--model {name_or_path}, which has no model_index.json", expected, "check the path")
    transformer = path / "transformer"
    _refuse_two_stage(path)
    config = read_json(transformer / "config.json", "a transformer's config.json")
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    adapter = next((a for a in ADAPTERS if a.class_name == class_name), None)
    if adapter is None:
        known = ", ".join(a.class_name for a in ADAPTERS)
        raise QvditError(
            f"{transformer / 'config.json'} of class {class_name!r}, which is no known video DiT",
            f"one of {known}",
            "choose such a model, or add an adapter for it in qvdit/models",
        )
    weights = _weight_files(transformer)
    _check_components(path)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weights:
        check_safetensors(file)
        digest.update(sha256(file).encode())
    name = name_or_path if name_or_path in SHIPPED else path.resolve().name
    fingerprint = digest.hexdigest()
    return SourceModel(name, path, adapter, config, fingerprint, _pipeline_name(path), _sampling(path, fingerprint))


def check_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name, as its header has them.

    QvditError where it is missing, no safetensors at all, or shorter than its header says.
    """
    what, fix = "a whole safetensors file", "copy or download it again"
    if not path.is_file():
        raise QvditError(f"no file {path}", what, fix)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(file.read(length)) if length < size else None
        except (UnicodeDecodeError, json.JSONDecodeError):
            header = None
    if not isinstance(header, dict):
        raise QvditError(f"{path}, which is truncated or no safetensors file", what, fix)
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end != size:
        raise QvditError(f"{path} of {size} bytes where its header tells of {8 + length + end}", what, fix)
    return header


def _check_components(path: Path) -> None:
    """Refuse damaged weights and pickles in the other parts of a pipeline: text encoder, VAE and so on."""
    for folder in sorted(part for part in path.iterdir() if part.is_dir() and part.name != "transformer"):
        weights = sorted(folder.glob("*.safetensors"))
        for file in weights:
            check_safetensors(file)
        if not weights:
            _refuse_pickles(folder)


def _check_complete(transformer: Path, class_name: str, config: dict[str, Any]) -> None:
    """Refuse weights that are not the configuration's: diffusers would fill gaps, and ignore what is too much."""
    import diffusers

    kind = getattr(diffusers, class_name)
    with torch.device("meta"):
        expected = set(kind.from_config(config).state_dict())
    found = {name for file in _weight_files(transformer) for name in check_safetensors(file)}
    ignored = [re.compile(pattern) for pattern in kind._keys_to_ignore_on_load_unexpected or ()]
    missing = sorted(expected - found)
    unknown = sorted(name for name in found - expected if not any(pattern.search(name) for pattern in ignored))
    if missing or unknown:
        wrong = {"too few": missing, "too many": unknown}
        listed = [f"{len(names)} {what} ({names[0]} …)" for what, names in wrong.items() if names]
        raise QvditError(
            f"{transformer} with other tensors than its configuration's: {', '.join(listed)}",
            "the tensors that config.json tells of",
            "copy or download the model again",
        )


def _weight_files(transformer: Path) -> list[Path]:
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        content = read_json(index, "an index of safetensors shards")
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise QvditError(f"{index} without a weight_map", "an index of safetensors shards", "copy it again")
        return [inside(transformer, str(name)) for name in sorted(set(shards.values()))]
    single = transformer / "diffusion_pytorch_model.safetensors"
    if not single.is_file():
        _refuse_pickles(transformer)
        raise QvditError(f"no weights in {transformer}", single.name, "copy or download the model again")
    return [single]


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise _pickle_error(path)


def _pickle_error(path: Path) -> QvditError:
    return QvditError(
        f"{path}, a pickle, which can run any code when it is loaded",
        "weights as safetensors",
        "convert it where you trust it: pipeline.save_pretrained(DIR, safe_serialization=True)",
    )


def _index(path: Path) -> dict[str, Any]:
    content = read_json(path / "model_index.json", "a pipeline's model_index.json")
    if not isinstance(content, dict):
        raise QvditError(
            f"{path / 'model_index.json'}, which is no object", "a pipeline's parts by name", "copy it again"
        )
    return content


def _pipeline_name(path: Path) -> str:
    return str(_index(path).get("_class_name"))


def _refuse_two_stage(path: Path) -> None:
    """Wan 2.2 has a second transformer for the low-noise steps, or a time step for every token."""
    index = _index(path)
    second = index.get("transformer_2")
    if (isinstance(second, list) and second and second[0]) or index.get("expand_timesteps"):
        raise QvditError(
            f"{path}, a pipeline with two transformers or a time step for every token (Wan 2.2)",
            "one transformer and one time step",
            "use Wan 2.1",
        )


def _sampling(path: Path, fingerprint: str) -> str:
    """A digest of what the calibration data depends on besides the prompts; other weights count by their size."""
    parts: list[Any] = [fingerprint, [version(name) for name in ("torch", "diffusers", "transformers")]]
    for file in sorted(path.rglob("*.json")):
        parts.append([str(file.relative_to(path)), sha256(file)])
    for file in sorted(path.rglob("*.safetensors")):
        parts.append([str(file.relative_to(path)), file.stat().st_size])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pipeline_class(path: Path) -> Any:
    import diffusers

    name = _pipeline_name(path)
    if name == WORLD_PIPELINE:
        from qvdit.reference.pipeline import PixelVideoPipeline

        return PixelVideoPipeline
    found = getattr(diffusers, name, None)
    if found is None:
        raise QvditError(f"pipeline class {name!r}", "a pipeline that this diffusers knows", "upgrade diffusers")
    return found


def _check_finite(transformer: torch.nn.Module, path: Path) -> None:
    for name, parameter in transformer.named_parameters():
        if not parameter.isfinite().all():
            raise QvditError(f"NaN or Inf in {name} of {path}", "finite weights", "this model cannot be quantized")
