"""Input statistics against a direct computation, and their resumption."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qvdit.contract import FrameRows, QvditError
from qvdit.method.calibration import CalibrationData, CalibrationPlan, record
from qvdit.method.statistics import collect, load
from qvdit.models import LatteAdapter, Site, WanAdapter
from qvdit.reference import world


class StoppedError(Exception):
    pass


class TwoReaders(torch.nn.Module):
    """q and k read x, the output reads q(x) + k(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))
        self.q.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        self.k.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        self.calls = 0
        self.stop_at = -1

    def forward(self, x: torch.Tensor, return_dict: bool) -> torch.Tensor:
        assert not return_dict
        self.calls += 1
        if self.calls == self.stop_at:
            raise StoppedError
        return self.out(self.q(x) + self.k(x))


SITES = [
    Site("q", "self_attention", FrameRows.NONE, "x"),
    Site("k", "self_attention", FrameRows.NONE, "x"),
    Site("out", "self_attention", FrameRows.NONE, "hidden"),
]


def shard(path, x: list, step: list[int]):
    """x: [records, tokens, 2]"""
    save_file({"x": torch.tensor(x, dtype=torch.float32), "step": torch.tensor(step)}, path)
    return path


@pytest.fixture
def by_hand(tmp_path):
    """Three batches: a step of two records, a step of one, and a step of another shard."""
    first = shard(tmp_path / "0", [[[1, 2], [3, -4]], [[0, 0], [0, 2]], [[10, 1], [-20, 1]]], [0, 0, 7])
    second = shard(tmp_path / "1", [[[4, 0], [0, 0]]], [0])
    return CalibrationData((first, second))


def test_by_hand(by_hand, tmp_path):
    statistics = collect(TwoReaders(), SITES, by_hand, tmp_path / "statistics")
    assert set(statistics.inputs) == {"x", "hidden"}
    x = statistics.of(SITES[0])
    assert statistics.of(SITES[1]) is x
    # every batch weighs the same, however many records it has
    torch.testing.assert_close(x.abs_max_by_step, torch.tensor([[(3 + 4) / 2, (4 + 0) / 2], [20.0, 1.0]]))
    torch.testing.assert_close(x.mean, torch.tensor([(4 / 4 - 10 / 2 + 4 / 2) / 3, (0 / 4 + 2 / 2 + 0) / 3]))
    first = torch.tensor([[1.0 + 9, 2 - 12], [2 - 12, 4 + 16 + 4]]) / 4
    second = torch.tensor([[500.0, -10], [-10, 2]]) / 2
    third = torch.tensor([[16.0, 0], [0, 0]]) / 2
    torch.testing.assert_close(x.second_moment, (first + second + third) / 3)
    # hidden is (2 x₀, 3 x₁)
    factors = torch.tensor([2.0, 3.0])
    hidden = statistics.of(SITES[2])
    torch.testing.assert_close(hidden.abs_max_by_step, x.abs_max_by_step * factors)
    torch.testing.assert_close(hidden.mean, x.mean * factors)
    torch.testing.assert_close(hidden.second_moment, x.second_moment * torch.outer(factors, factors))
    for tensor in (x.abs_max_by_step, x.mean, x.second_moment):
        assert tensor.dtype == torch.float32


def test_load_reads_what_collect_left(by_hand, tmp_path):
    collected = collect(TwoReaders(), SITES, by_hand, tmp_path / "statistics")
    assert_same(load(tmp_path / "statistics"), collected)


def test_each_batch_runs_once(by_hand, tmp_path):
    model = TwoReaders()
    collect(model, SITES, by_hand, tmp_path / "statistics")
    assert model.calls == 3
    collect(model, SITES, by_hand, tmp_path / "statistics")
    assert model.calls == 3
    assert not model.q._forward_pre_hooks


def assert_same(found, expected):
    assert set(found.inputs) == set(expected.inputs)
    for name, theirs in expected.inputs.items():
        for field in ("abs_max_by_step", "mean", "second_moment"):
            assert torch.equal(getattr(found.inputs[name], field), getattr(theirs, field)), (name, field)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_resuming_gives_the_identical_result(by_hand, tmp_path, stop_at):
    whole = collect(TwoReaders(), SITES, by_hand, tmp_path / "whole")
    model = TwoReaders()
    model.stop_at = stop_at
    with pytest.raises(StoppedError):
        collect(model, SITES, by_hand, tmp_path / "resumed")
    assert (tmp_path / "resumed").exists() == (stop_at == 3)  # saved after each whole shard
    model.stop_at, model.calls = -1, 0
    assert_same(collect(model, SITES, by_hand, tmp_path / "resumed"), whole)
    assert model.calls == (1 if stop_at == 3 else 3)


@pytest.mark.parametrize("content", [b"", b"damaged statistics"])
def test_a_damaged_partial_file_starts_over(by_hand, tmp_path, content):
    whole = collect(TwoReaders(), SITES, by_hand, tmp_path / "whole")
    (tmp_path / "resumed").write_bytes(content)
    assert_same(collect(TwoReaders(), SITES, by_hand, tmp_path / "resumed"), whole)


def test_same_data_same_bytes(by_hand, tmp_path):
    for name in "abcdefgh":
        collect(TwoReaders(), SITES, by_hand, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_told(by_hand, tmp_path, bad):
    shard(by_hand.shards[1], [[[bad, 0], [0, 0]]], [0])
    with pytest.raises(QvditError, match=r"NaN or Inf in the statistics of (x|hidden)"):
        collect(TwoReaders(), SITES, by_hand, tmp_path / "statistics")


def test_weights_that_are_not_finite_are_told(by_hand, tmp_path):
    model = TwoReaders()
    model.k.weight.data[0, 0] = torch.nan
    with pytest.raises(QvditError, match="NaN or Inf in the statistics of hidden"):
        collect(model, SITES, by_hand, tmp_path / "statistics")


@pytest.mark.parametrize("content", [None, b"", b"no statistics"])
def test_no_statistics_are_told(tmp_path, content):
    path = tmp_path / "statistics"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QvditError, match="no statistics at"):
        load(path)


def test_steps_are_in_the_order_of_the_trajectory(tmp_path):
    """Most noise first, by number and not by name; a step that one shard lacks is the mean of the others."""
    steps = [10, 2, 0]
    first = shard(tmp_path / "0", [[[step + 1.0, 0]] for step in steps], steps)
    second = shard(tmp_path / "1", [[[5.0, 0]]], [2])
    statistics = collect(TwoReaders(), SITES, CalibrationData((first, second)), tmp_path / "statistics")
    assert statistics.of(SITES[0]).abs_max_by_step[:, 0].tolist() == [1.0, (3 + 5) / 2, 11.0]


def older(path):
    """Statistics as they were before they told the time steps apart."""
    counts = {"counts": json.dumps({"shards": 2, "batches": 3})}
    tensors = {f"{x}:{field}": torch.zeros(2) for x in ("x", "hidden") for field in ("abs_max", "mean")}
    save_file(
        {**tensors, "x:second_moment": torch.zeros(2, 2), "hidden:second_moment": torch.zeros(2, 2)}, path, counts
    )


def test_statistics_of_an_older_version_are_told_or_collected_again(by_hand, tmp_path):
    whole = collect(TwoReaders(), SITES, by_hand, tmp_path / "whole")
    older(tmp_path / "old")
    with pytest.raises(QvditError, match="no statistics at"):
        load(tmp_path / "old")
    assert_same(collect(TwoReaders(), SITES, by_hand, tmp_path / "old"), whole)


def test_statistics_without_their_counts_are_told(tmp_path):
    save_file({"x:mean": torch.zeros(2)}, tmp_path / "statistics")
    with pytest.raises(QvditError, match="no statistics at"):
        load(tmp_path / "statistics")


def test_names_are_known_without_reading_their_tensors(by_hand, tmp_path, monkeypatch):
    inputs = collect(TwoReaders(), SITES, by_hand, tmp_path / "statistics").inputs
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "_read", None)
        assert "x" in inputs
        assert "y" not in inputs
        assert 3 not in inputs
    with pytest.raises(KeyError, match="y"):
        inputs["y"]


@pytest.mark.parametrize("missing", ["x:mean", "x:second_moment", "x:abs_max_by_step:7"])
def test_statistics_without_one_of_an_inputs_sums_are_told(by_hand, tmp_path, missing):
    path = tmp_path / "statistics"
    collect(TwoReaders(), SITES, by_hand, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor for name, tensor in load_file(path).items() if name != missing}, path, metadata)
    inputs = load(path).inputs
    assert inputs["hidden"].mean.shape == (2,)
    with pytest.raises(QvditError, match=f"statistics of x at .*{missing}"):
        inputs["x"]


@pytest.fixture
def recorded(tiny_pipeline, tmp_path):
    prompts = (world.EXAMPLE, world.EXAMPLE.replace("red", "cyan"))
    plan = CalibrationPlan(prompts, steps=2, records=2)
    return record(tiny_pipeline, WanAdapter(), plan, tmp_path / "data")


def test_a_model_against_a_direct_computation(tiny_wan, recorded, tmp_path):
    sites = WanAdapter().sites(tiny_wan)
    statistics = collect(tiny_wan, sites, recorded, tmp_path / "statistics")
    assert set(statistics.inputs) == {site.shared_input for site in sites}
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for name, module in tiny_wan.named_modules():
        if name in seen:
            module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].double()))
    with torch.no_grad():
        for batch in recorded.batches():
            tiny_wan(**batch, return_dict=False)
    for site in sites:  # all of them: those that share an input read the same one
        inputs = [x.flatten(0, -2) for x in seen[site.name]]  # by prompt, and of each the first step and the last
        assert len(inputs) == 4
        found = statistics.of(site)
        abs_max = torch.stack([x.abs().amax(0) for x in inputs]).reshape(2, 2, -1).mean(0)
        mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
        moment = torch.stack([x.T @ x / len(x) for x in inputs]).mean(0)
        torch.testing.assert_close(found.abs_max_by_step.double(), abs_max, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.second_moment.double(), moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["wan", "latte"])
def test_shards_that_share_a_pass_give_what_each_gives_alone(family, wan_model, latte_model, example_inputs, tmp_path):
    model, adapter = (wan_model, WanAdapter()) if family == "wan" else (latte_model, LatteAdapter())
    shards = []
    for index in range(3):
        shape = (model.config.in_channels, 4, 8, 8)
        text_dim = model.config.text_dim if family == "wan" else model.config.caption_channels
        first, second = (example_inputs(shape, text_dim, seed=2 * index + i) for i in range(2))
        tensors = {name: torch.cat([first[name], second[name]]) * (1 + index) for name in first}
        shards.append(tmp_path / str(index))
        save_file({**tensors, "step": torch.tensor([0, 0, 4, 4])}, shards[-1])
    data, sites = CalibrationData(tuple(shards)), adapter.sites(model)
    alone = collect(model, sites, data, tmp_path / "alone")
    for together in (2, 8):
        found = collect(model, sites, data, tmp_path / f"together-{together}", together=together)
        assert found.inputs.keys() == alone.inputs.keys()
        for name, expected in alone.inputs.items():
            for field, tensor in vars(expected).items():
                torch.testing.assert_close(getattr(found.inputs[name], field), tensor, rtol=1e-4, atol=1e-5)


def test_every_linear_of_the_blocks_is_a_site(tiny_wan):
    linears = {
        name
        for name, module in tiny_wan.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")
    }
    assert {site.name for site in WanAdapter().sites(tiny_wan)} == linears
