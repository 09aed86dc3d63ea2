"""The drawn world: prompts name scenes, videos show them, and measurements see what is there and what is not."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from qvdit.reference import measure, world
from qvdit.reference.measure import ATTRIBUTES, METRICS
from qvdit.reference.world import Scene, SceneBatch, Thing, parse_prompt

SCENE = Scene(
    Thing("triangle", "cyan", "moving down-right"), Thing("square", "white", "circling counter-clockwise"), "brown"
)
WORDS = "a cyan triangle moving down-right in front of a white square circling counter-clockwise on a brown background"
THINGS = [Thing(*names) for names in itertools.product(world.SHAPES, world.COLOURS, world.MOTIONS)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_prompts_and_scenes_are_one_to_one():
    assert SCENE.prompt == WORDS
    assert parse_prompt(f"  {WORDS.upper()} ") == SCENE
    assert parse_prompt(world.EXAMPLE).prompt == world.EXAMPLE
    assert parse_prompt(WORDS.replace("white", "orange").replace("a orange", "an orange")).back.colour == "orange"
    for thing in THINGS:
        other = dataclasses.replace(SCENE.back, colour="red" if thing.colour != "red" else "blue")
        for scene in (Scene(thing, other, "teal"), Scene(other, thing, "grey")):
            assert parse_prompt(scene.prompt) == scene


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "expected the form of 'a red circle"),
        ("a cyan triangle", "expected the form of 'a red circle"),
        (WORDS + " at night", "expected the form of 'a red circle"),
        ("the" + WORDS[1:], "expected the form of 'a red circle"),
        (WORDS.replace("in front of", "behind"), "expected the form of 'a red circle"),
        (WORDS.replace("cyan", "pink"), "'pink' is not one of red, green"),
        (WORDS.replace("triangle", "star"), "'star' is not one of circle, square"),
        (WORDS.replace("down-right", "sideways"), "'moving sideways' is not one of moving right"),
        (WORDS.replace("circling", "moving"), "'moving counter-clockwise' is not one of moving right"),
        (WORDS.replace("brown", "cyan"), "'cyan' is not one of black"),
        (WORDS.replace("cyan triangle", "triangle cyan"), "is not one of"),
        (WORDS.replace("white", "cyan"), "two cyan things cannot be told apart"),
    ],
)
def test_prompts_that_are_not_understood(prompt, told):
    with pytest.raises(ValueError, match="prompt ") as caught:
        parse_prompt(prompt)
    assert told in str(caught.value)
    assert repr(prompt) in str(caught.value)


def test_scene_batches_are_indices():
    batch = SceneBatch.from_scenes([SCENE])
    assert batch.scenes() == [SCENE]
    assert batch.shape.tolist() == [[2, 1]]
    assert batch.colour.tolist() == [[5, 7]]
    assert batch.motion.tolist() == [[1, 9]]
    assert batch.background.tolist() == [2]
    back = 1 + 4 + 8 + 10
    front = [1 + 2, 1 + 4 + 5, 1 + 4 + 8 + 1]
    assert batch.tokens().tolist() == [[*front, back + 1, back + 4 + 7, back + 4 + 8 + 9, back + 22 + 2]]


def test_drawn_scenes_use_every_word_and_never_one_colour_twice():
    batch = SceneBatch.draw(4096, seeded())
    assert SceneBatch.from_scenes(batch.scenes()).tokens().equal(batch.tokens())
    assert sorted(batch.tokens().unique().tolist()) == list(range(1, world.VOCABULARY))
    assert (batch.colour[:, 0] != batch.colour[:, 1]).all()


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


@pytest.fixture(scope="module")
def many_paths():
    scenes = SceneBatch.draw(2048, seeded())
    return scenes, world.paths(scenes, seeded(1))


def test_straight_paths_start_straight_and_stay_inside(many_paths):
    scenes, centres = many_paths
    assert centres.shape == (2048, 2, 16, 2)
    assert centres.min() >= world.MARGIN - 1e-4
    assert centres.max() <= world.SIZE - world.MARGIN + 1e-4
    straight = scenes.motion < len(world.DIRECTIONS)
    steps = centres.diff(dim=2)[straight]
    expected = world.velocities("cpu")[scenes.motion[straight]][:, None].expand(-1, world.STRAIGHT_STEPS, -1)
    torch.testing.assert_close(steps[:, : world.STRAIGHT_STEPS], expected, rtol=0, atol=1e-4)
    assert (steps.norm(dim=-1) <= world.SPEED + 1e-4).all()


def test_circling_paths_turn_as_they_are_named(many_paths):
    scenes, centres = many_paths
    clockwise = world.MOTIONS.index("circling clockwise")
    for motion, sign in ((clockwise, 1), (clockwise + 1, -1)):
        steps = centres.diff(dim=2)[scenes.motion == motion]  # y points down: clockwise turns x towards y
        cross = steps[:, :-1, 0] * steps[:, 1:, 1] - steps[:, :-1, 1] * steps[:, 1:, 0]
        torch.testing.assert_close(steps.norm(dim=-1), torch.full(steps.shape[:2], world.SPEED), rtol=0.005, atol=0)
        assert (cross * sign > 0).all()


def test_what_is_behind_is_never_hidden(many_paths):
    """One scene in forty comes nearer than MIN_DISTANCE, because no start kept it; most cover each other at times."""
    _, centres = many_paths
    distance = (centres[:, 0] - centres[:, 1]).norm(dim=-1).amin(-1)
    assert (distance < world.MIN_DISTANCE).float().mean() < 0.04
    assert distance.min() > 2
    assert (distance < 9).float().mean() > 0.5


def test_shapes_have_like_areas_and_are_centred():
    cover = world.coverage(torch.tensor([[16.0, 16.0], [13.3, 18.9]]))
    assert cover.shape == (2, 4, 32, 32)
    areas = cover.sum((-1, -2))
    assert ((areas > 70) & (areas < 78)).all()
    axis = torch.arange(32) + 0.5
    x, y = (cover.sum(-2) * axis).sum(-1) / areas, (cover.sum(-1) * axis).sum(-1) / areas
    torch.testing.assert_close(x, torch.tensor([16.0, 13.3])[:, None].expand(2, 4), rtol=0, atol=0.1)
    torch.testing.assert_close(y, torch.tensor([16.0, 18.9])[:, None].expand(2, 4), rtol=0, atol=0.1)


def test_render_draws_the_front_over_the_back():
    scenes = SceneBatch.from_scenes([SCENE])
    centres = torch.full((1, 2, 16, 2), 16.0)
    centres[:, 1, :, 0] = 20.0
    pixels = (world.render(scenes, centres) + 1) / 2
    torch.testing.assert_close(pixels[0, :, 0, 0, 0], torch.tensor(world.BACKGROUNDS["brown"]))
    torch.testing.assert_close(pixels[0, :, 9, 16, 17], torch.tensor(world.COLOURS["cyan"]))  # inside both
    torch.testing.assert_close(pixels[0, :, 9, 16, 22], torch.tensor(world.COLOURS["white"]))


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


@pytest.mark.parametrize("shake", [0.0, 0.3])
def test_paths_that_shake_are_still_told_apart(many_paths, shake):
    """A model draws things a few tenths of a pixel off, from frame to frame: that is no turn."""
    scenes, centres = many_paths
    found = measure._motion(centres + shake * torch.randn(centres.shape, generator=seeded(2)))
    assert (found == scenes.motion).float().mean() > (0.995 if shake else 0.9999)


def test_a_circle_at_another_pace_is_no_circle():
    angle = torch.stack([0.5 * world.TURN * torch.arange(16.0), -2 * world.TURN * torch.arange(16.0)])
    centres = 16 + world.RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None].expand(-1, 2, -1, -1)
    assert not (measure._motion(centres) >= len(world.DIRECTIONS)).any()


@pytest.mark.parametrize("thing", [0, 1])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_one_wrong_attribute_is_seen_and_no_other(drawn, name, thing):
    videos, scenes = first(drawn, 64)
    field = "motion" if name == "direction" else name
    size = {"colour": 8, "background": 4, "shape": 4, "motion": 10}[field]
    wrong = getattr(scenes, field).clone()
    changed = wrong if name == "background" else wrong[:, thing]
    changed += 1
    if name == "colour":  # a third colour, not the other thing's
        changed += (changed % size == wrong[:, 1 - thing]).long()
    found = measure.measure(videos, dataclasses.replace(scenes, **{field: wrong % size}))
    assert found[name].mean() < 0.01
    assert found["scene_consistency"].mean() < 0.01
    if name == "colour":  # a thing is found by its colour: nothing can be said of one that is not there
        assert found["background"].mean() > 0.98
        return
    for attribute in ATTRIBUTES:
        assert attribute == name or found[attribute].mean() > 0.98
    assert 0.72 < found["overall_consistency"].mean() < 0.77


def test_centres_are_found_behind_what_is_in_front():
    scenes = SceneBatch.draw(256, seeded(5))
    centres = world.paths(scenes, seeded(6))
    seen = measure.observe(world.render(scenes, centres), scenes)
    error = (seen.centres - centres).norm(dim=-1)
    assert error[:, 0].mean() < 0.05
    assert error[:, 1].mean() < 0.08
    assert error.max() < 0.5
    assert (seen.fit[:, 0] > 0.95).all()
    assert (seen.fit[:, 1] > 0.8).all()  # less where half of it is hidden


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
    empty = world.render(scenes, torch.full((1, 2, 16, 2), -100.0))
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
    """1 - RMSE / 0.25: noise of 0.05 in 0 … 1 costs a fifth, and a little for the centres that it shakes."""
    videos, scenes = first(drawn, 16)
    clean = measure.measure(videos, scenes)["imaging_quality"]
    noisy = videos + 2 * 0.05 * torch.randn(videos.shape, generator=seeded())
    found = measure.measure(noisy, scenes)["imaging_quality"]
    assert (clean > 0.95).all()
    assert 0.75 < found.median() < 0.8
    assert found.max() < 0.8


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
