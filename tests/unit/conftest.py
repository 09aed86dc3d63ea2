"""Shared by the unit tests: one thread, reproducible examples, a tiny Wan that samples the drawn world, stand-ins."""

from __future__ import annotations

import hypothesis
import pytest
from fake_tensorrt import Fake, FakeDriver

hypothesis.settings.register_profile("unit", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("unit")


@pytest.fixture
def one_thread():
    """PyTorch on one thread: small tensors are faster so, and sums keep their order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_wan(one_thread):
    """A random Wan with one block: 24 features, patches of 8 x 8 pixels."""
    import torch
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            patch_size=(1, 8, 8),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=3,
            out_channels=3,
            text_dim=8,
            freq_dim=16,
            ffn_dim=40,
            num_layers=1,
            rope_max_seq_len=32,
        )
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_pipeline(tiny_wan):
    """A PixelVideoPipeline around the tiny Wan."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from qvdit.reference.pipeline import PixelVideoPipeline, PromptTable

    table = PromptTable.draw(torch.Generator().manual_seed(1), text_dim=8)
    pipeline = PixelVideoPipeline(tiny_wan, FlowMatchEulerDiscreteScheduler(), table)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The CUDA driver's stand-in, in its place."""
    from qvdit.runtimes.tensorrt import device

    library = FakeDriver()
    monkeypatch.setattr(device, "driver", lambda: device.Driver(library))
    return library


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, gpu: FakeDriver) -> Fake:
    """TensorRT's stand-in, in its place."""
    from qvdit.runtimes.tensorrt import plugin, versions

    fake = Fake()
    monkeypatch.setattr(versions, "tensorrt", lambda: fake)
    monkeypatch.setattr(plugin, "_load", lambda path: fake.creators.add("LowBitLinear"))
    return fake
