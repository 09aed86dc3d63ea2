"""The models that come with the package: small, whole, and of this world."""

from __future__ import annotations

import pytest
import torch

from qvdit.models.loading import SHIPPED, WORLD_PIPELINE, find_model
from qvdit.reference import measure, world
from qvdit.reference.pipeline import draw_noise
from qvdit.reference.train import ARCHITECTURES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_and_is_what_the_script_trains(name):
    assert sum(path.stat().st_size for path in SHIPPED[name].rglob("*")) < 12e6
    source = find_model(name)
    kind, config = ARCHITECTURES[name]
    assert (source.pipeline, source.adapter.class_name) == (WORLD_PIPELINE, kind.__name__)
    for field, value in config.items():
        assert source.config[field] == (list(value) if isinstance(value, tuple) else value), field


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_knows_every_word(name):
    table = find_model(name).load().prompt_table
    assert len(table.codebook) == world.VOCABULARY
    rows = table(
        [scene.prompt for scene in world.SceneBatch.draw(64, torch.Generator().manual_seed(0)).scenes()] + [""]
    )
    assert rows.shape == (65, world.PROMPT_TOKENS, table.codebook.shape[1])
    assert torch.unique(table.codebook, dim=0).shape == table.codebook.shape


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_draws_what_its_prompt_names(name):
    """One video in few steps has its colours and shapes, which noise or the weights of another world never show."""
    pipe = find_model(name).load()
    video = pipe(world.EXAMPLE, num_inference_steps=6, latents=draw_noise(1, torch.Generator().manual_seed(0))).frames
    found = measure.measure(video, world.SceneBatch.from_scenes([world.parse_prompt(world.EXAMPLE)]))
    assert found["background"].item() == 1
    assert found["colour"].item() == 1
    assert found["shape"].item() > 0.5
