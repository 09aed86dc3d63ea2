"""TMD: what the loss measures, and that training against it works."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from qvdit.contract import QvditError
from qvdit.method.distillation import (
    _draw_batches,
    _with_targets,
    distil,
    frame_relations,
    related_features,
    relation_loss,
)
from qvdit.method.lowbit import replace_linears
from qvdit.method.recipe import DistillationBlock
from qvdit.method.training import TrainableLinear
from qvdit.method.weights import search_grid
from qvdit.models import LatteAdapter, WanAdapter
from qvdit.models.adapter import frames_first

B, C, T, H, W = 2, 3, 4, 8, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relations_by_hand():
    features = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    # the Gram matrix is the identity; softmax of (1, 0) is e / (e + 1)
    likely = math.e / (math.e + 1)
    expected = torch.tensor([[[likely, 1 - likely], [1 - likely, likely]]]).log()
    torch.testing.assert_close(frame_relations(features), expected)


def test_loss_by_hand():
    teacher = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    student = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])  # all frames alike: softmax is one half
    likely = math.e / (math.e + 1)
    expected = likely * math.log(2 * likely) + (1 - likely) * math.log(2 * (1 - likely))
    assert relation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # KL has a direction
    other_way = 0.5 * math.log(0.5 / likely) + 0.5 * math.log(0.5 / (1 - likely))
    assert relation_loss(teacher, student).item() == pytest.approx(other_way, rel=1e-5)


def test_loss_is_zero_for_equal_and_positive_otherwise():
    teacher = draw(B, T, 20)
    assert relation_loss(teacher.clone(), teacher).item() == 0
    for seed in range(1, 20):
        assert relation_loss(draw(B, T, 20, seed=seed), teacher).item() > 1e-3


def test_loss_does_not_see_the_scale_of_a_frame():
    teacher, student = draw(B, T, 20), draw(B, T, 20, seed=1)
    scale = torch.tensor([0.01, 1.0, 7.0, 300.0])[None, :, None]
    torch.testing.assert_close(relation_loss(student * scale, teacher), relation_loss(student, teacher))
    assert relation_loss(teacher * scale, teacher).item() == pytest.approx(0, abs=1e-6)
    # but it sees frames exchanged
    assert relation_loss(teacher[:, [1, 0, 2, 3]], teacher).item() > 1e-3


def test_loss_is_a_mean_over_the_batch():
    teacher, student = draw(B, T, 20), draw(B, T, 20, seed=1)
    each = [relation_loss(student[i : i + 1], teacher[i : i + 1]) for i in range(B)]
    torch.testing.assert_close(relation_loss(student, teacher), sum(each) / B)


@pytest.mark.parametrize("adapter", [WanAdapter(), LatteAdapter()], ids=lambda adapter: adapter.family)
def test_rows_are_frames(adapter):
    video = draw(B, C, T, H, W)
    order = torch.tensor([2, 0, 3, 1])
    features = adapter.output_frames(video, T)
    assert features.shape == (B, T, C * H * W)
    for frame in range(T):
        assert torch.equal(features[1, frame], video[1, :, frame].flatten())
    assert torch.equal(adapter.output_frames(video[:, :, order], T), features[:, order])


def test_a_reshape_without_a_permutation_mixes_frames():
    video = draw(B, C, T, H, W)
    order = torch.tensor([2, 0, 3, 1])
    assert not torch.equal(video[:, :, order].reshape(B, T, -1), video.reshape(B, T, -1)[:, order])
    assert not torch.equal(frames_first(video, T), video.reshape(B, T, -1))


def test_patches_of_several_frames_stay_together():
    video = draw(B, C, 2 * T, H, W)
    features = frames_first(video, T)
    assert features.shape == (B, T, 2 * C * H * W)
    assert set(features[0, 1].tolist()) == set(video[0, :, 2:4].flatten().tolist())


@pytest.fixture
def inputs():
    records = 6
    return {
        "hidden_states": draw(records, 3, T, 16, 16),
        "timestep": torch.linspace(1000, 100, records),
        "encoder_hidden_states": draw(records, 4, 8, seed=1),
    }


class Trial:
    """A student of three bits in the tiny Wan's place."""

    def __init__(self, teacher: torch.nn.Module, inputs: dict[str, torch.Tensor]):
        self.teacher, self.inputs, self.adapter = teacher, inputs, WanAdapter()
        self.layers = []
        for site in self.adapter.sites(teacher):
            linear = teacher.get_submodule(site.name)
            grid = search_grid(linear.weight, 3, False)
            layer = TrainableLinear(site.name, linear.weight, linear.bias, grid, 8, True, site.rows)
            layer.add_inner_term(4, torch.Generator().manual_seed(3))
            self.layers.append(layer)
        self.student = copy.deepcopy(teacher)
        replace_linears(self.student, {layer.name: layer for layer in self.layers})
        self.student.requires_grad_(False)

    @torch.no_grad()
    def loss(self) -> float:
        target = self.teacher(**self.inputs, return_dict=False)[0]
        output = self.student(**self.inputs, return_dict=False)[0]
        frames = [self.adapter.output_frames(x, T) for x in (output, target)]
        return float(torch.nn.functional.mse_loss(output, target) + 100 * relation_loss(*frames))

    def distil(self, steps: int = 8, seed: int = 0, **changes: object) -> float:
        block = DistillationBlock(batch=4, learning_rate=3e-3, scale_learning_rate=1e-2, **changes)
        config = dict(self.teacher.config)
        return distil(self.student, self.teacher, self.layers, self.adapter, config, [self.inputs], block, steps, seed)


def test_distillation_lowers_the_loss(tiny_wan, inputs):
    trial = Trial(tiny_wan, inputs)
    before = trial.loss()
    last = trial.distil(steps=30)
    after = trial.loss()
    assert after < 0.8 * before
    assert 0 < last < before


def test_distillation_changes_the_layers_alone(tiny_wan, inputs):
    trial = Trial(tiny_wan, inputs)
    teacher = copy.deepcopy(tiny_wan.state_dict())
    rest = {n: v.clone() for n, v in trial.student.state_dict().items() if n in teacher and ".attn" not in n}
    rest = {name: value for name, value in rest.items() if ".ffn." not in name}
    assert rest
    trial.distil()
    for name, value in tiny_wan.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    for name, value in rest.items():
        assert torch.equal(trial.student.state_dict()[name], value), name
    for layer in trial.layers:
        assert (layer.inner_b != 0).any()
        assert layer.quantize_activations
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def holding(records: int) -> Any:
    """A hook that has no room for more records, or for one until its model's blocks are checkpointed (0)."""

    def hook(model: Any, _: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["hidden_states"]) > max(records, 1) or (records == 0 and not model.is_gradient_checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nAnd more.")

    return hook


@pytest.mark.parametrize(("records", "checkpointed"), [(3, False), (1, False), (0, True)])
def test_a_batch_that_does_not_fit_is_computed_in_pieces(tiny_wan, inputs, records, checkpointed):
    """The gradient is the whole batch's, but for rounding."""
    whole, small = Trial(tiny_wan, inputs), Trial(tiny_wan, inputs)
    loss = whole.distil(steps=1)
    handle = small.student.register_forward_pre_hook(holding(records), with_kwargs=True)
    assert small.distil(steps=1) == pytest.approx(loss, rel=5e-3)  # 100 x a difference of logarithms
    handle.remove()
    assert small.student.is_gradient_checkpointing == checkpointed
    for ours, theirs in zip(small.layers, whole.layers, strict=True):  # a first step of AdamW goes by the sign alone
        same = torch.isclose(ours.inner_b, theirs.inner_b, rtol=0.01, atol=1e-5)
        assert (theirs.inner_b != 0).any()
        assert same.float().mean() > 0.97


def test_a_teacher_runs_in_pieces_too(tiny_wan, inputs):
    expected = Trial(tiny_wan, inputs).distil(steps=1)
    handle = tiny_wan.register_forward_pre_hook(holding(2), with_kwargs=True)
    try:
        trial = Trial(tiny_wan, inputs)
        trial.student._forward_pre_hooks.clear()  # its copy's
        trial.student._forward_pre_hooks_with_kwargs.clear()
        assert trial.distil(steps=1) == pytest.approx(expected, rel=5e-3)
    finally:
        handle.remove()


def test_one_record_that_does_not_fit_is_a_sentence(tiny_wan, inputs):
    trial = Trial(tiny_wan, inputs)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nAnd more.")

    trial.student.register_forward_pre_hook(full)
    with pytest.raises(QvditError, match=r"cannot hold one record of the training \(CUDA out of memory") as caught:
        trial.distil(steps=1)
    assert "--distill-steps 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_distillation_follows_its_seed(tiny_wan, inputs):
    results = []
    for seed in (0, 0, 1):
        trial = Trial(tiny_wan, inputs)
        loss = trial.distil(seed=seed)
        results.append((loss, [layer.fold() for layer in trial.layers], trial.layers[0].inner_b.detach().clone()))
    same, other = results[1], results[2]
    assert results[0][0] == same[0] != other[0]
    assert torch.equal(results[0][2], same[2])
    assert not torch.equal(results[0][2], other[2])
    for ours, theirs in zip(results[0][1], same[1], strict=True):
        np.testing.assert_array_equal(ours.weight_q, theirs.weight_q)
        np.testing.assert_array_equal(ours.weight_scale, theirs.weight_scale)


def test_distillation_may_keep_activations_in_floating_point(tiny_wan, inputs):
    trial = Trial(tiny_wan, inputs)
    seen = []
    handle = trial.layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.quantize_activations))
    trial.distil(steps=2, quantize_activations=False)
    handle.remove()
    assert seen == [False, False]
    assert trial.layers[0].quantize_activations


def test_distillation_without_relations_is_the_squared_error(tiny_wan, inputs):
    alone = {name: tensor[:1] for name, tensor in inputs.items()}  # every batch is this record
    plain, related = Trial(tiny_wan, alone), Trial(tiny_wan, alone)
    with torch.no_grad():
        target = tiny_wan(**alone, return_dict=False)[0]
        output = plain.student(**alone, return_dict=False)[0]
    squared = torch.nn.functional.mse_loss(output, target).item()
    assert plain.distil(steps=1, relation_weight=0.0) == pytest.approx(squared, rel=1e-6)
    relations = relation_loss(*(WanAdapter().output_frames(x, T) for x in (output, target))).item()
    found = related.distil(steps=1, relation_weight=50.0)
    assert found == pytest.approx(squared + 50 * relations, rel=1e-5)
    assert relations > 0


def test_the_authors_relate_half_channels():
    """16 frames of 8 channels reshaped to 16 rows: the first row is the first half of channel 0, all frames of it."""
    video = draw(2, 8, 16, 4, 4)
    found = related_features(video, "authors", WanAdapter(), 16)
    assert found.shape == (2, 16, 8 * 4 * 4)
    for row in range(16):
        half = slice(8 * (row % 2), 8 * (row % 2) + 8)
        assert torch.equal(found[1, row], video[1, row // 2, half].flatten())
    frames = related_features(video, "frames", WanAdapter(), 16)
    assert torch.equal(frames, WanAdapter().output_frames(video, 16))
    assert not torch.equal(found, frames)


def test_the_recipe_chooses_the_relation(tiny_wan, inputs):
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    losses = {relation: Trial(tiny_wan, alone).distil(steps=1, relation=relation) for relation in ("frames", "authors")}
    assert losses["frames"] != losses["authors"]


def test_progress_is_told(tiny_wan, inputs):
    trial, told = Trial(tiny_wan, inputs), []
    block = DistillationBlock(batch=2)
    config = dict(tiny_wan.config)
    arguments = (trial.student, tiny_wan, trial.layers, trial.adapter, config, [inputs], block, 2, 0)
    distil(*arguments, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_the_teacher_runs_once_for_each_record_used():
    records = {"hidden_states": draw(5, 3, 2, 4, 4), "timestep": torch.arange(5.0)}
    seen: list[float] = []

    def teacher(hidden_states, timestep, return_dict):
        seen.extend(timestep.tolist())
        return (torch.cat([hidden_states, hidden_states + timestep[:, None, None, None, None]], dim=1),)

    found = _with_targets(teacher, records, [0, 2, 3], 2, torch.device("cpu"))
    assert seen == [0, 2, 3]
    for row in (0, 2, 3):  # the teacher may give more channels than it takes
        assert torch.equal(found["target"][row, :3], records["hidden_states"][row])
        assert torch.equal(found["target"][row, 3:], records["hidden_states"][row] + row)
    assert not found["target"][[1, 4]].any()


def test_batches_follow_the_size_of_the_groups():
    groups = [{"hidden_states": torch.zeros(1)}, {"hidden_states": torch.zeros(99)}]
    batches = _draw_batches(groups, 4, 300, torch.Generator().manual_seed(0))
    assert len(batches) == 300
    assert {i: {len(rows) for g, rows in batches if g == i} for i in (0, 1)} == {0: {1}, 1: {4}}
    assert 0 < sum(i == 0 for i, _ in batches) < 20
