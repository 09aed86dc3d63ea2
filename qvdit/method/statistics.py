"""Statistics of every quantized linear's input, over the calibration data, all time steps weighing the same.

They do not depend on bits or method: one pass serves every bit width.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qvdit.contract import QvditError
from qvdit.contract.files import write_atomic
from qvdit.method.calibration import CalibrationData, Progress, no_progress
from qvdit.models import Site


@dataclass(frozen=True)
class InputStatistics:
    """Of one input tensor x with K features, shared by all the linears that read it."""

    abs_max_by_step: torch.Tensor  # float32 [S, K]: max |x| over the tokens of a batch, mean over a step's batches;
    # a row for every recorded step of the sampler, in its order: the first has the most noise
    mean: torch.Tensor  # float32 [K]: E[x]
    second_moment: torch.Tensor  # float32 [K, K]: E[x xᵀ]


@dataclass(frozen=True)
class Statistics:
    """Input statistics by the name of the shared input (:attr:`Site.shared_input`)."""

    inputs: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics:
        """The statistics of a site's input."""
        return self.inputs[site.shared_input]


FORMAT = 2  # of the statistics file
_COUNTS = "counts"
_BY_STEP, _OVERALL = "abs_max_by_step", ("mean", "second_moment")


@dataclass(frozen=True)
class _Header:
    """What a statistics file says of itself."""

    shards: int  # seen
    batches: Counter[int]  # seen of each step
    keys: tuple[str, ...]  # of its tensors

    @staticmethod
    def read(path: Path) -> _Header | None:
        """The header of a file; None where there is none, or one that is damaged or of another version."""
        try:
            with safe_open(path, framework="pt") as file:
                counts, keys = json.loads((file.metadata() or {})[_COUNTS]), tuple(file.keys())
            if counts["format"] != FORMAT:
                return None
            batches = Counter({int(step): int(count) for step, count in counts["batches"]})
            return _Header(int(counts["shards"]), batches, keys)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None


class _Sums:
    """Running sums in float64 for every shared input, saved after each shard: ``x:mean``, ``x:abs_max_by_step:3``."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.batches: Counter[int] = Counter()  # seen of each step
        self.step, self.count = 0, 1

    def begin(self, step: int, count: int = 1) -> None:
        """What is added from here on belongs to ``count`` more batches of a step."""
        self.step, self.count = step, count
        self.batches[step] += count

    def add(self, name: str, x: torch.Tensor) -> None:
        """Add an input [..., K] of as many batches as have begun, of as many rows each, one after the other."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        fields = (f"{_BY_STEP}:{self.step}", *_OVERALL)
        peaks = x.abs().unflatten(0, (self.count, -1)).amax(1).sum(0)
        values = (peaks, self.count * x.mean(0), self.count * (x.T @ x / len(x)))
        for field, value in zip(fields, values, strict=True):
            key = f"{name}:{field}"
            if key in self.tensors:
                self.tensors[key] += value  # in place: a large model's moments leave no room for a second one
            else:
                self.tensors[key] = value.double()

    def check(self) -> None:
        """Raise QvditError where a sum is no number."""
        for key, tensor in self.tensors.items():
            _refuse_unless(bool(tensor.isfinite().all()), key.split(":", 1)[0])

    def save(self, path: Path, shards: int) -> None:
        # One key: safetensors writes several in no fixed order.
        counts = {"format": FORMAT, "shards": shards, "batches": sorted(self.batches.items())}
        metadata = {_COUNTS: json.dumps(counts, sort_keys=True)}
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, path: Path, device: torch.device) -> int:
        """Take up a partial run; returns how many shards it has seen, 0 if there is none."""
        header = _Header.read(path)
        if header is None:
            return 0
        try:
            self.tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError):
            return 0
        self.batches = header.batches
        return header.shards


@torch.no_grad()
def collect(
    transformer: torch.nn.Module,
    sites: list[Site],
    data: CalibrationData,
    path: Path,
    progress: Progress = no_progress,
    together: int = 1,
) -> Statistics:
    """Run the full-precision model over the calibration data; resumes from ``path`` and leaves the result there.

    ``together``: how many shards, of equal shapes, share a forward pass; only float32 rounding depends on it.
    """
    device = next(transformer.parameters()).device
    sums = _Sums()
    done = sums.load(path, device)
    saved, cost = time.monotonic(), 0.0
    first_reader: dict[str, str] = {}
    for site in sites:
        first_reader.setdefault(site.shared_input, site.name)
    handles = [
        transformer.get_submodule(reader).register_forward_pre_hook(lambda _, args, name=name: sums.add(name, args[0]))
        for name, reader in first_reader.items()
    ]
    try:
        for start in range(done, len(data.shards), together):
            progress(start, len(data.shards))
            shards = data.shards[start : start + together]
            for step, batch in CalibrationData(shards).by_step(together):
                sums.begin(step, len(shards))
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                transformer(**inputs, return_dict=False)
            seen = start + len(shards)
            if seen == len(data.shards) or time.monotonic() - saved >= 10 * cost:  # a large model's take gigabytes
                started = time.monotonic()
                sums.save(path, seen)
                saved = time.monotonic()
                cost = saved - started
    finally:
        for handle in handles:
            handle.remove()
    sums.check()
    progress(len(data.shards), len(data.shards))
    return load(path)


def load(path: Path) -> Statistics:
    """Collected statistics, each input's read when it is asked for: a large model's take more memory than the model."""
    header = _Header.read(path)
    if header is None:
        raise QvditError(f"no statistics at {path}", "what `qvdit calibrate` writes", "run `qvdit calibrate` first")
    names = tuple(dict.fromkeys(key.split(":", 1)[0] for key in header.keys))
    return Statistics(_Stored(path, header.batches, names))


class _Stored(Mapping[str, InputStatistics]):
    """Statistics by the name of the shared input, read from a file; the last one stays, for its other readers."""

    def __init__(self, path: Path, batches: Counter[int], names: tuple[str, ...]):
        self.path, self.batches, self.names = path, batches, names
        self._last: tuple[str, InputStatistics] | None = None

    def __getitem__(self, name: str) -> InputStatistics:
        if self._last is None or self._last[0] != name:
            if name not in self.names:
                raise KeyError(name)
            self._last = name, self._read(name)
        return self._last[1]

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensors
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _read(self, name: str) -> InputStatistics:
        try:
            with safe_open(self.path, framework="pt") as file:
                sums = {step: file.get_tensor(f"{name}:{_BY_STEP}:{step}") for step in sorted(self.batches)}
                mean, moment = (file.get_tensor(f"{name}:{field}") / self.batches.total() for field in _OVERALL)
        except (SafetensorError, OSError) as error:
            got = f"statistics of {name} at {self.path} that cannot be read ({error})"
            raise QvditError(got, "what `qvdit calibrate` writes", "remove the file and calibrate again") from None
        rows = [total / self.batches[step] for step, total in sums.items()]
        found = InputStatistics(torch.stack(rows).float(), mean.float(), moment.float())
        _refuse_unless(all(bool(tensor.isfinite().all()) for tensor in vars(found).values()), name)
        return found


def _refuse_unless(finite: bool, name: str) -> None:
    if not finite:
        raise QvditError(
            f"NaN or Inf in the statistics of {name}",
            "finite activations",
            "check the model's weights and the calibration data",
        )
