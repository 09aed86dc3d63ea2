"""Calibration data: what is recorded of a trajectory, and that an interrupted run goes on as if nothing had been."""

from __future__ import annotations

import inspect
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvdit.contract import QvditError
from qvdit.contract.video import VideoSize
from qvdit.method.calibration import CalibrationData, CalibrationPlan, read_prompts, record, sample
from qvdit.models import WanAdapter
from qvdit.reference import world

PROMPTS = (
    world.EXAMPLE,
    world.EXAMPLE.replace("red", "cyan"),
    world.EXAMPLE.replace("red", "white"),
)


class StoppedError(Exception):
    pass


def plan(**changes) -> CalibrationPlan:
    return CalibrationPlan(**{"prompts": PROMPTS[:2], "steps": 3, "records": 2, "seed": 5, **changes})


def run(pipeline, folder, **changes) -> CalibrationData:
    return record(pipeline, WanAdapter(), plan(**changes), folder)


def bytes_of(data: CalibrationData) -> list[bytes]:
    return [path.read_bytes() for path in data.shards]


@pytest.mark.parametrize(
    ("steps", "records", "expected"),
    [
        (20, 8, [0, 3, 5, 8, 11, 14, 16, 19]),
        (20, 2, [0, 19]),
        (20, 1, [0]),
        (3, 2, [0, 2]),
        (4, 4, [0, 1, 2, 3]),
        (3, 8, [0, 1, 2]),
        (1, 8, [0]),
        (101, 5, [0, 25, 50, 75, 100]),
    ],
)
def test_recorded_steps(steps, records, expected):
    assert plan(steps=steps, records=records).recorded_steps() == expected


@pytest.mark.parametrize("steps", range(1, 31))
@pytest.mark.parametrize("records", [1, 2, 5, 8, 30])
def test_recorded_steps_are_distinct_and_evenly_spread(steps, records):
    found = plan(steps=steps, records=records).recorded_steps()
    assert len(set(found)) == len(found) == min(steps, records)
    assert found[0] == 0
    gaps = [later - earlier for earlier, later in pairwise(found)]
    if gaps:
        assert found[-1] == steps - 1
        assert max(gaps) - min(gaps) <= 1


def trajectory(
    pipeline, prompt: str, seed: int, steps: int, guidance: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and time before every step, by the sampler's own equations: Euler on a guided velocity."""
    table, transformer = pipeline.prompt_table, pipeline.transformer
    pipeline.scheduler.set_timesteps(steps)
    times, sigmas = pipeline.scheduler.timesteps.clone(), pipeline.scheduler.sigmas.clone()
    x = torch.randn(1, 3, 16, 32, 32, generator=torch.Generator().manual_seed(seed))
    condition = torch.cat([table([""]), table([prompt])])
    seen = []
    for index, time in enumerate(times):
        seen.append((x, time))
        with torch.no_grad():
            free, told = transformer(torch.cat([x, x]), time.expand(2), condition, return_dict=False)[0].chunk(2)
        x = x + (sigmas[index + 1] - sigmas[index]) * (free + guidance * (told - free))
    return seen


def test_records_are_the_models_inputs(tiny_pipeline, tmp_path):
    data = run(tiny_pipeline, tmp_path, guidance=3.0)
    assert [path.name for path in data.shards] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    for index, path in enumerate(data.shards):
        tensors = load_file(path)
        assert set(tensors) == {"hidden_states", "timestep", "encoder_hidden_states", "step"}
        assert tensors["step"].tolist() == [0, 0, 2, 2]
        expected = trajectory(tiny_pipeline, PROMPTS[index], 5 + index, 3, 3.0)
        for place, step in enumerate((0, 2)):
            latents, time = expected[step]
            for half in (0, 1):
                row = 2 * place + half
                torch.testing.assert_close(tensors["hidden_states"][row], latents[0], rtol=1e-4, atol=1e-5)
                assert tensors["timestep"][row] == time


def test_half_of_the_records_are_unconditional(tiny_pipeline, tmp_path):
    data = run(tiny_pipeline, tmp_path, records=3)
    (tensors,) = data.groups()
    free = tiny_pipeline.prompt_table([""])[0]
    told = [tiny_pipeline.prompt_table([prompt])[0] for prompt in PROMPTS[:2]]
    assert not torch.equal(free, told[0])
    expected = torch.stack([free, told[0]] * 3 + [free, told[1]] * 3)
    assert torch.equal(tensors["encoder_hidden_states"], expected)


def test_batches_are_recorded_steps(tiny_pipeline, tmp_path):
    data = run(tiny_pipeline, tmp_path)
    batches = list(data.batches())
    assert len(batches) == 4  # two prompts, two steps each
    assert [len(batch["timestep"]) for batch in batches] == [2] * 4
    assert all(batch["timestep"].unique().numel() == 1 for batch in batches)
    assert batches[0]["timestep"][0] > batches[1]["timestep"][0]  # noise first
    assert set(batches[0]) == set(WanAdapter().inputs)
    assert [step for step, _ in data.by_step()] == [0, 2, 0, 2]
    for (_, ours), theirs in zip(data.by_step(), batches, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (whole,) = data.groups()
    assert set(whole) == set(WanAdapter().inputs)
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([batch[name] for batch in batches])), name


def test_batches_are_counted_without_reading_them(tmp_path, monkeypatch):
    shards = []
    for index, step in enumerate(([0, 0, 7], [0], [3, 2, 3, 1, 1])):
        shards.append(tmp_path / str(index))
        save_file({"x": torch.zeros(len(step), 4), "step": torch.tensor(step)}, shards[-1])
    data = CalibrationData(tuple(shards))
    expected = len(list(data.batches()))
    assert [len(list(data.some(most))) for most in (1, 2, 3, 6, 8)] == [1, 2, 3, 6, 6]
    monkeypatch.setattr("qvdit.method.calibration.load_file", None)
    assert data.count() == expected == 6
    assert CalibrationData(()).count() == 0


def test_same_seed_same_bytes(tiny_pipeline, tmp_path):
    first = bytes_of(run(tiny_pipeline, tmp_path / "a"))
    assert bytes_of(run(tiny_pipeline, tmp_path / "b")) == first
    other = bytes_of(run(tiny_pipeline, tmp_path / "c", seed=6))
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


class Countdown:
    """Counts the transformer's calls and stops the run at one of them."""

    def __init__(self, transformer: torch.nn.Module, stop_at: int = -1):
        self.calls, self.stop_at = 0, stop_at
        self.handle = transformer.register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.stop_at:
            raise StoppedError


def test_an_interrupted_run_resumes_and_gives_the_same(tiny_pipeline, tmp_path):
    whole = bytes_of(run(tiny_pipeline, tmp_path / "whole", prompts=PROMPTS))
    count = Countdown(tiny_pipeline.transformer, stop_at=5)  # in the second prompt
    with pytest.raises(StoppedError):
        run(tiny_pipeline, tmp_path / "resumed", prompts=PROMPTS)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["shard-00000.safetensors"]
    count.calls, count.stop_at = 0, -1
    assert bytes_of(run(tiny_pipeline, tmp_path / "resumed", prompts=PROMPTS)) == whole
    assert count.calls == 2 * 3  # two prompts of three steps were left
    run(tiny_pipeline, tmp_path / "resumed", prompts=PROMPTS)
    assert count.calls == 2 * 3  # and now nothing is


def test_prompts_recorded_together_give_what_each_gives_alone(tiny_pipeline, tmp_path):
    alone = run(tiny_pipeline, tmp_path / "alone", prompts=PROMPTS)
    record(tiny_pipeline, WanAdapter(), plan(prompts=PROMPTS[:1]), tmp_path / "together")
    count = Countdown(tiny_pipeline.transformer, stop_at=-1)
    folder = tmp_path / "together"
    together = record(tiny_pipeline, WanAdapter(), plan(prompts=PROMPTS), folder, together=8)
    assert count.calls == 3  # the steps of one batch of two: the first was there
    for expected, found in zip(map(load_file, alone.shards), map(load_file, together.shards), strict=True):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert run(tiny_pipeline, folder, prompts=PROMPTS).shards == together.shards
    assert count.calls == 3  # both ways of recording leave the same plan's shards


def test_the_recording_hook_is_removed_when_a_run_stops(tiny_pipeline, tmp_path):
    count = Countdown(tiny_pipeline.transformer, stop_at=2)
    with pytest.raises(StoppedError):
        run(tiny_pipeline, tmp_path)
    count.handle.remove()
    assert not tiny_pipeline.transformer._forward_pre_hooks


@pytest.mark.parametrize("damage", ["truncated", "empty", "other prompt", "no metadata"])
def test_a_shard_that_is_not_this_prompts_is_recorded_again(tiny_pipeline, tmp_path, damage):
    data = run(tiny_pipeline, tmp_path)
    expected = bytes_of(data)
    path = data.shards[1]
    if damage == "truncated":
        path.write_bytes(expected[1][:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file(load_file(path), path, {"prompt": "another"} if damage == "other prompt" else None)
    assert bytes_of(run(tiny_pipeline, tmp_path)) == expected


@pytest.mark.parametrize(
    "changes",
    [{"seed": 6}, {"guidance": 4.0}, {"records": 3}, {"steps": 4}, {"source": "another model"}],
    ids=lambda changes: next(iter(changes)),
)
def test_shards_of_another_plan_are_recorded_again(tiny_pipeline, tmp_path, changes):
    run(tiny_pipeline, tmp_path / "reused")
    count = Countdown(tiny_pipeline.transformer)
    (again,) = run(tiny_pipeline, tmp_path / "reused", **changes).groups()
    assert count.calls == 2 * changes.get("steps", 3)
    (fresh,) = run(tiny_pipeline, tmp_path / "fresh", **changes).groups()
    for name, tensor in fresh.items():
        assert torch.equal(again[name], tensor), name


def test_more_prompts_add_to_what_is_there(tiny_pipeline, tmp_path):
    run(tiny_pipeline, tmp_path / "grown", prompts=PROMPTS[:1])
    count = Countdown(tiny_pipeline.transformer)
    grown = bytes_of(run(tiny_pipeline, tmp_path / "grown", prompts=PROMPTS[:2]))
    assert count.calls == 3
    assert grown == bytes_of(run(tiny_pipeline, tmp_path / "whole", prompts=PROMPTS[:2]))


def test_weights_that_give_nan_are_told(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(QvditError) as caught:
        run(tiny_pipeline, tmp_path)
    assert caught.value.got == f"NaN or Inf in hidden_states while sampling {PROMPTS[0]!r}"
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_of_nan_is_told(tiny_pipeline, tmp_path):
    tiny_pipeline.prompt_table.codebook.data[0, 0] = torch.inf
    with pytest.raises(QvditError, match="NaN or Inf in "):
        run(tiny_pipeline, tmp_path)


def test_progress_is_told(tiny_pipeline, tmp_path):
    told = []
    record(tiny_pipeline, WanAdapter(), plan(), tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_every_video_of_a_batch_has_its_own_seed(tiny_pipeline):
    together = sample(tiny_pipeline, list(PROMPTS[:2]), 2, 2.5, [3, 4])
    assert together.shape == (2, 3, 16, 32, 32)
    for index, seed in enumerate((3, 4)):
        alone = sample(tiny_pipeline, [PROMPTS[index]], 2, 2.5, [seed])
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-5)


def test_sample_passes_what_a_pipeline_knows():
    class Output:
        frames = "frames"

    class LatentPipeline:
        def __call__(self, prompt, num_inference_steps, guidance_scale, generator, output_type="pil"):
            self.seen = (prompt, num_inference_steps, guidance_scale, generator.initial_seed(), output_type)
            return Output

    pipeline = LatentPipeline()
    assert sample(pipeline, ["p"], 7, 1.5, [9]) == "frames"
    assert pipeline.seen == (["p"], 7, 1.5, 9, "latent")


@pytest.mark.parametrize("frames", ["num_frames", "video_length"])
def test_sample_asks_for_a_size_by_the_pipelines_names(frames):
    class SizedPipeline:
        def __call__(self, prompt, num_inference_steps, guidance_scale, generator, height, width, **others):
            self.seen = (height, width, others)
            return SimpleNamespace(frames="frames")

    parameters = inspect.signature(SizedPipeline.__call__).parameters
    named = inspect.Parameter(frames, inspect.Parameter.KEYWORD_ONLY)
    SizedPipeline.__call__.__signature__ = inspect.Signature([*list(parameters.values())[:-1], named])
    pipeline = SizedPipeline()
    assert sample(pipeline, ["p"], 7, 1.5, [9], VideoSize(17, 256, 448)) == "frames"
    assert pipeline.seen == (256, 448, {frames: 17})


def test_a_pipeline_of_one_size_refuses_another(tiny_pipeline):
    with pytest.raises(QvditError, match=r"--size 8x32x32 with a PixelVideoPipeline.*leave out"):
        sample(tiny_pipeline, ["p"], 2, 2.5, [3], VideoSize(8, 32, 32))


def test_a_size_is_part_of_a_shards_identity_and_no_size_is_not():
    plain, sized = (CalibrationPlan(PROMPTS, size=size) for size in (None, VideoSize(17, 256, 448)))
    assert "size" not in plain.identity(0)["identity"]
    assert json.loads(sized.identity(0)["identity"])["size"] == {"frames": 17, "height": 256, "width": 448}


@pytest.mark.parametrize("text", ["17x256", "17x256x448x3", "0x256x448", "17x00x448", "-1x2x3", "axbxc", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(QvditError, match="FRAMESxHEIGHTxWIDTH"):
        VideoSize.parse(text)


def test_a_size_is_read_as_it_is_written():
    assert VideoSize.parse(" 17x0256x448 ") == VideoSize(17, 256, 448)
    assert str(VideoSize(17, 256, 448)) == "17x256x448"


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# a comment\n\n  one prompt \n\ttwo\n # another comment\nthree # not a comment\n", encoding="utf-8"
    )
    assert read_prompts(path) == ("one prompt", "two", "three # not a comment")
    with pytest.raises(QvditError, match="no file"):
        read_prompts(tmp_path / "missing.txt")


def test_prompts_in_another_encoding_are_told(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein grüner Kreis".encode("latin-1"))
    with pytest.raises(QvditError):
        read_prompts(path)
