"""The drawn world: prompts name scenes, videos show them, and measurements see what is there and what is not."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from qvdit.reference import measure, world
from qvdit.reference.measure import ATTRIBUTES, METRICS
from qvdit.reference.world import Scene, SceneBatch, parse_prompt

ALL = [Scene(*names) for names in itertools.product(world.SHAPES, world.COLOURS, world.DIRECTIONS, world.BACKGROUNDS)]
SCENE = Scene("triangle", "cyan", "down-right", "brown")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_prompts_and_scenes_are_one_to_one():
    prompts = {scene.prompt: scene for scene in ALL}
    assert len(prompts) == 1024
    for prompt, scene in prompts.items():
        assert parse_prompt(prompt) == scene
    assert SCENE.prompt == "a cyan triangle moving down-right on a brown background"
    assert parse_prompt(f"  {SCENE.prompt.upper()} ") == SCENE


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "expected 'a <colour>"),
        ("a cyan triangle", "expected 'a <colour>"),
        (SCENE.prompt + " at night", "expected 'a <colour>"),
        ("the" + SCENE.prompt[1:], "expected 'a <colour>"),
        (SCENE.prompt.replace("cyan", "pink"), "'pink' is not one of red, green"),
        (SCENE.prompt.replace("triangle", "star"), "'star' is not one of circle, square"),
        (SCENE.prompt.replace("down-right", "sideways"), "'sideways' is not one of right"),
        (SCENE.prompt.replace("brown", "cyan"), "'cyan' is not one of black"),
        (SCENE.prompt.replace("cyan triangle", "triangle cyan"), "'cyan' is not one of circle"),
    ],
)
def test_prompts_that_are_not_understood(prompt, told):
    with pytest.raises(ValueError, match="prompt ") as caught:
        parse_prompt(prompt)
    assert told in str(caught.value)
    assert repr(prompt) in str(caught.value)


def test_scene_batches_are_indices():
    batch = SceneBatch.from_scenes(ALL)
    assert batch.scenes() == ALL
    index = ALL.index(SCENE)
    assert (batch.shape[index], batch.colour[index], batch.direction[index], batch.background[index]) == (2, 5, 1, 2)
    tokens = batch.tokens()
    assert tokens[index].tolist() == [1 + 2, 1 + 4 + 5, 1 + 4 + 8 + 1, 1 + 4 + 8 + 8 + 2]
    assert len({tuple(row) for row in tokens.tolist()}) == 1024
    assert sorted(tokens.unique().tolist()) == list(range(1, world.VOCABULARY))


def test_drawing_follows_its_generator():
    first, second, other = (world.draw_videos(4, seeded(seed)) for seed in (0, 0, 1))
    assert first[0].shape == (4, 3, 16, 32, 32)
    assert torch.equal(first[0], second[0])
    assert first[1].scenes() == second[1].scenes()
    assert not torch.equal(first[0], other[0])


def test_velocities():
    found = dict(zip(world.DIRECTIONS, world.velocities("cpu").tolist(), strict=True))
    assert found["right"] == pytest.approx([1.2, 0])
    assert found["up"] == pytest.approx([0, -1.2])
    assert found["down-left"] == pytest.approx([-1.2 / math.sqrt(2), 1.2 / math.sqrt(2)])


def test_paths_start_straight_and_stay_inside():
    scenes = SceneBatch.from_scenes(ALL)
    centres = world.paths(scenes, seeded())
    assert centres.shape == (1024, 16, 2)
    assert centres.min() >= world.MARGIN - 1e-4
    assert centres.max() <= world.SIZE - world.MARGIN + 1e-4
    steps = centres.diff(dim=1)
    straight = world.velocities("cpu")[scenes.direction][:, None].expand(-1, world.STRAIGHT_STEPS, -1)
    torch.testing.assert_close(steps[:, : world.STRAIGHT_STEPS], straight, rtol=0, atol=1e-4)
    assert (steps.norm(dim=-1) <= world.SPEED + 1e-4).all()


def test_shapes_have_like_areas_and_are_centred():
    cover = world.coverage(torch.tensor([[16.0, 16.0], [13.3, 18.9]]))
    assert cover.shape == (2, 4, 32, 32)
    areas = cover.sum((-1, -2))
    assert ((areas > 108) & (areas < 120)).all()
    axis = torch.arange(32) + 0.5
    x, y = (cover.sum(-2) * axis).sum(-1) / areas, (cover.sum(-1) * axis).sum(-1) / areas
    torch.testing.assert_close(x, torch.tensor([16.0, 13.3])[:, None].expand(2, 4), rtol=0, atol=0.1)
    torch.testing.assert_close(y, torch.tensor([16.0, 18.9])[:, None].expand(2, 4), rtol=0, atol=0.1)


def test_render_mixes_two_colours():
    scenes = SceneBatch.from_scenes([SCENE])
    video = world.render(scenes, torch.full((1, 16, 2), 16.0))
    pixels = (video + 1) / 2
    torch.testing.assert_close(pixels[0, :, 0, 0, 0], torch.tensor(world.BACKGROUNDS["brown"]))
    torch.testing.assert_close(pixels[0, :, 9, 16, 16], torch.tensor(world.COLOURS["cyan"]))


@pytest.fixture(scope="module")
def drawn():
    return world.draw_videos(256, seeded(3))


def first(drawn, count: int) -> tuple[torch.Tensor, SceneBatch]:
    """A copy of the first few videos, and their scenes."""
    videos, scenes = drawn
    return videos[:count].clone(), SceneBatch(*(getattr(scenes, f.name)[:count] for f in dataclasses.fields(scenes)))


@pytest.fixture(scope="module")
def measured(drawn):
    return measure.measure(*drawn)


def test_every_measurement_is_a_number_a_video(measured):
    assert set(measured) == {*METRICS, *ATTRIBUTES}
    for name, values in measured.items():
        assert values.shape == (256,), name
        assert ((values >= 0) & (values <= 1)).all(), name


@pytest.mark.parametrize("name", [*ATTRIBUTES, "scene_consistency", "overall_consistency", "dynamic_degree"])
def test_drawn_videos_show_what_their_prompt_names(measured, name):
    assert measured[name].mean() >= 0.99


@pytest.mark.parametrize(
    "name", ["subject_consistency", "background_consistency", "motion_smoothness", "imaging_quality"]
)
def test_drawn_videos_look_good(measured, name):
    assert measured[name].mean() > 0.9


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_one_wrong_attribute_is_seen_and_no_other(drawn, name):
    videos, scenes = first(drawn, 64)
    sizes = {"colour": 8, "background": 4, "shape": 4, "direction": 8}
    wrong = dataclasses.replace(scenes, **{name: (getattr(scenes, name) + 1) % sizes[name]})
    found = measure.measure(videos, wrong)
    for attribute in ATTRIBUTES:
        if attribute == name:
            assert found[attribute].mean() < 0.01
        else:
            assert found[attribute].mean() > 0.98
    assert found["scene_consistency"].mean() < 0.01
    assert 0.72 < found["overall_consistency"].mean() < 0.77


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_noise_shows_no_scene(spread):
    scenes = SceneBatch.draw(32, seeded())
    noise = (spread * torch.randn(32, 3, 16, 32, 32, generator=seeded(1))).clamp(-1, 1)
    found = measure.measure(noise, scenes)
    assert found["scene_consistency"].max() == 0
    assert found["shape"].mean() < 0.05
    assert found["overall_consistency"].mean() < 0.4


def test_an_empty_video_has_no_subject():
    scenes = SceneBatch.from_scenes([SCENE])
    empty = world.render(scenes, torch.full((1, 16, 2), -100.0))
    found = {name: float(value) for name, value in measure.measure(empty, scenes).items()}
    assert found["background"] == 1
    for name in ("colour", "shape", "direction", "scene_consistency", "subject_consistency", "dynamic_degree"):
        assert found[name] == 0, name


def test_a_frozen_video_does_not_move(drawn):
    videos, scenes = first(drawn, 32)
    found = measure.measure(videos[:, :, :1].expand_as(videos), scenes)
    assert found["dynamic_degree"].max() == 0
    assert found["direction"].max() == 0
    assert found["scene_consistency"].max() == 0
    assert found["motion_smoothness"].min() > 0.99
    assert found["subject_consistency"].min() > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_video_that_is_not_finite_measures_nothing(drawn, measured, bad):
    (videos, scenes), index = first(drawn, 4), 2
    videos[index, 1, 7, 3, 3] = bad
    found = measure.measure(videos, scenes)
    for name, values in found.items():
        assert values[index] == 0, name
        others = [0, 1, 3]
        torch.testing.assert_close(values[others], measured[name][others], rtol=0, atol=1e-5)


def test_frames_that_change_colour_are_less_consistent(drawn, measured):
    videos, scenes = first(drawn, 16)
    videos[:, :, ::2] = videos[:, [1, 2, 0], ::2]
    found = measure.measure(videos, scenes)
    assert found["subject_consistency"].mean() < measured["subject_consistency"][:16].mean() - 0.1
    assert found["background_consistency"].mean() < measured["background_consistency"][:16].mean() - 0.02


def test_shaking_is_not_smooth(drawn, measured):
    videos, scenes = first(drawn, 16)
    videos[:, :, ::2] = videos[:, :, ::2].roll(2, dims=-1)
    found = measure.measure(videos, scenes)["motion_smoothness"]
    assert found.max() < 0.1
    assert measured["motion_smoothness"].min() > 0.8


def test_noise_costs_imaging_quality(drawn):
    """1 - RMSE / 0.25: noise of 0.05 in 0 … 1 costs a fifth."""
    videos, scenes = first(drawn, 16)
    clean = measure.measure(videos, scenes)["imaging_quality"]
    noisy = videos + 2 * 0.05 * torch.randn(videos.shape, generator=seeded())
    found = measure.measure(noisy, scenes)["imaging_quality"]
    assert (clean > 0.95).all()
    assert found.median().item() == pytest.approx(0.8, abs=0.02)
    assert found.max() < 0.82


def test_psnr_by_hand():
    reference = torch.zeros(4, 3, 16, 32, 32)
    videos = reference.clone()
    videos[1] = 1.0  # 10 log10(4 / 1)
    videos[2] = 0.2  # 10 log10(4 / 0.04)
    videos[3, 0] = 5.0  # clipped to 1 in a third of the values
    found = measure.psnr(videos, reference)
    expected = [10 * math.log10(4e10), 10 * math.log10(4), 20.0, 10 * math.log10(12)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert measure.psnr(-torch.ones(1, 3, 16, 32, 32), torch.ones(1, 3, 16, 32, 32)).item() == pytest.approx(0)
