"""Tiny random models, and what is too slow to make more than once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread everywhere, subprocesses included: the tests share the cores, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)

FRAMES, SIZE = 16, 32  # of the drawn world's videos


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``shared(name, make)``: a folder that ``make(folder)`` fills once for all workers; read it only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def build(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / "shared" / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return build


def wan(**changes: Any) -> Any:
    """A random Wan transformer: 20 linears to quantize, 256 video tokens for a video of the drawn world."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    shape = {
        "patch_size": (1, 8, 8),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 64,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**shape, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def wan_model() -> Any:
    """A random Wan transformer; copy it to change it."""
    return wan()


def latte(seed: int, **changes: Any) -> Any:
    """A random Latte transformer of 4 frames, one spatial and one temporal block."""
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(seed)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "cross_attention_dim": 32,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 24,
        "video_length": 4,
    }
    return LatteTransformer3DModel(**{**shape, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def latte_model() -> Any:
    """A random Latte transformer; copy it to change it."""
    return latte(1)


def cogvideox(**changes: Any) -> Any:
    """A random CogVideoX transformer of 4 frames with a rotary embedding: 12 linears to quantize."""
    from diffusers import CogVideoXTransformer3DModel

    from qvdit.models.cogvideox import CogVideoXAdapter

    torch.manual_seed(3)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 13,
        "patch_size": 2,
        "max_text_seq_length": 4,
        "use_rotary_positional_embeddings": True,
    }
    model = CogVideoXTransformer3DModel(**{**shape, **changes}).eval().requires_grad_(False)
    CogVideoXAdapter().complete(model)
    return model


@pytest.fixture(scope="session")
def cogvideox_model() -> Any:
    """A random CogVideoX transformer; copy it to change it."""
    return cogvideox()


@pytest.fixture(scope="session")
def save_pipeline() -> Callable[[Path, Any], Path]:
    """``save_pipeline(folder, transformer)``: a PixelVideoPipeline on disk."""

    def save(folder: Path, transformer: Any) -> Path:
        from diffusers import FlowMatchEulerDiscreteScheduler

        from qvdit.reference.pipeline import PixelVideoPipeline, PromptTable

        table = PromptTable.draw(torch.Generator().manual_seed(0))
        PixelVideoPipeline(transformer, FlowMatchEulerDiscreteScheduler(), table).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def wan_folder(shared: Any, save_pipeline: Any) -> Path:
    """A PixelVideoPipeline with ``wan_model`` on disk."""
    return shared("tiny-wan", lambda folder: save_pipeline(folder, wan()))


@pytest.fixture(scope="session")
def make_job(wan_folder: Path) -> Callable[..., Any]:
    """``make_job(out, observe, **settings)``: a job on the tiny pipeline, two prompts and two steps."""

    def make(out: Path, observe: Any = None, **settings: Any) -> Any:
        from qvdit.job import Job, unobserved
        from qvdit.settings import JobSettings

        small = {"prompt_count": 2, "steps": 2, "records": 2, "videos": 1, "compute": "cpu", "threads": 1}
        return Job(JobSettings(**{"model": str(wan_folder), "out": out, **small, **settings}), observe or unobserved)

    return make


@pytest.fixture(scope="session")
def bundle(shared: Any, make_job: Any) -> Path:
    """What the whole job leaves of the tiny pipeline: recipe qvdit, w4a8. Copy it to change it."""

    def make(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qvdit.speed.LINEAR", (96, 64))
            make_job(out).run()

    return shared("bundle", make)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """``cli("qvdit", "inspect", …)``: a console script in this process; exit status, stdout and stderr."""

    def call(script: str, *arguments: object) -> tuple[int, str, str]:
        from qvdit.cli import main, main_export

        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        capfd.readouterr()
        try:
            {"qvdit": main, "qvdit-export": main_export}[script]()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def example_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Random inputs: ``example_inputs(channels, frames, height, width, batch=…, text=…, text_dim=…)``."""

    def draw(
        shape: tuple[int, int, int, int], text_dim: int, batch: int = 2, text: int = 4, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(batch, *shape, generator=generator),
            "timestep": torch.rand(batch, generator=generator) * 1000,
            "encoder_hidden_states": torch.randn(batch, text, text_dim, generator=generator),
        }

    return draw


@pytest.fixture(scope="session")
def traced_wan(shared: Any, wan_model: Any, example_inputs: Any) -> Any:
    """``wan_model`` as a graph with placeholders."""
    return _traced(shared, "traced-wan", wan_model, 0, example_inputs((3, FRAMES, SIZE, SIZE), 64))


@pytest.fixture(scope="session")
def traced_latte(shared: Any, latte_model: Any, example_inputs: Any) -> Any:
    """``latte_model`` as a graph with placeholders."""
    return _traced(shared, "traced-latte", latte_model, 1, example_inputs((4, 4, 8, 8), 24))


@pytest.fixture(scope="session")
def traced_cogvideox(shared: Any, cogvideox_model: Any, example_inputs: Any) -> Any:
    """``cogvideox_model`` as a graph with placeholders."""
    return _traced(shared, "traced-cogvideox", cogvideox_model, 2, example_inputs((4, 4, 8, 8), 24))


def _traced(shared: Any, name: str, model: Any, adapter: int, inputs: dict[str, torch.Tensor]) -> Any:
    import onnx

    def make(folder: Path) -> None:
        from qvdit.export.trace import trace
        from qvdit.models import ADAPTERS

        widths = {s.name: model.get_submodule(s.name).out_features for s in ADAPTERS[adapter].sites(model)}
        folder.mkdir()
        onnx.save(trace(model, ADAPTERS[adapter], widths, inputs), folder / "traced.onnx")

    return onnx.load(shared(name, make) / "traced.onnx")


@pytest.fixture(scope="session")
def rtn_layers() -> Callable[..., tuple[Any, ...]]:
    """``rtn_layers(model, frames, bits=…, act_bits=…, symmetric=…, rank=…)``: every linear of a model, rounded.

    With a rank, a random term of a few percent of the weight and a gain per frame wherever the rows are video tokens.
    """

    def make(
        model: Any, frames: int, bits: int = 4, act_bits: int = 8, symmetric: bool = True, rank: int = 0
    ) -> tuple[Any, ...]:
        import numpy as np

        from qvdit.contract import FrameRows, LowBitLayer
        from qvdit.method.weights import search_grid
        from qvdit.models import ADAPTERS

        adapter = next(a for a in ADAPTERS if a.class_name == type(model).__name__)
        rng = np.random.default_rng(0)
        layers = []
        for site in adapter.sites(model):
            linear = model.get_submodule(site.name)
            n, k = linear.weight.shape
            grid = search_grid(linear.weight, bits, symmetric)
            gained = rank > 0 and site.rows is not FrameRows.NONE
            size = 0.3 * float(linear.weight.std())
            layers.append(
                LowBitLayer(
                    name=site.name,
                    weight_bits=bits,
                    act_bits=act_bits,
                    act_symmetric=symmetric,
                    rows=site.rows if gained else FrameRows.NONE,
                    weight_q=grid.quantize(linear.weight).to(torch.int8).numpy(),
                    weight_scale=grid.scale.numpy(),
                    weight_zero=None if symmetric else grid.zero.to(torch.int8).numpy(),
                    bias=None if linear.bias is None else linear.bias.numpy(),
                    alpha=(rng.standard_normal((k, rank)) * size).astype(np.float16) if rank else None,
                    beta=rng.standard_normal((rank, n)).astype(np.float16) if rank else None,
                    frame_gain=np.linspace(-1, 2, frames, dtype=np.float32) if gained else None,
                )
            )
        return tuple(layers)

    return make


@pytest.fixture(scope="session")
def low_bit_layer() -> Callable[..., Any]:
    """``low_bit_layer(n, k, bits=…, parts=…, rank=…, seed=…, **fields)``: a random layer.

    ``parts``: what it has of zero, bias, smooth and gain; a gain has 4 frames. Other fields as LowBitLayer has them.
    """

    def make(
        n: int, k: int, bits: int = 4, parts: tuple[str, ...] = (), rank: int = 0, seed: int = 0, **fields: Any
    ) -> Any:
        import numpy as np

        from qvdit.contract import FrameRows, LowBitLayer

        rng = np.random.default_rng(seed)
        half = 1 << (bits - 1)

        def floats(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(np.float32)

        drawn = {
            "name": f"layer{seed}",
            "weight_bits": bits,
            "act_bits": 8,
            "act_symmetric": True,
            "rows": FrameRows.SEQUENCE if "gain" in parts else FrameRows.NONE,
            "weight_q": rng.integers(-half, half, (n, k)).astype(np.int8),
            "weight_scale": ((0.5 + rng.random(n)) / (half * k**0.5)).astype(np.float32),
            "weight_zero": rng.integers(-half, half, n).astype(np.int8) if "zero" in parts else None,
            "bias": floats(n) if "bias" in parts else None,
            "inv_smooth": np.exp(np.random.default_rng(k).standard_normal(k)).astype(np.float32)
            if "smooth" in parts
            else None,
            "alpha": (floats(k, rank) / k**0.5).astype(np.float16) if rank else None,
            "beta": floats(rank, n).astype(np.float16) if rank else None,
            "frame_gain": floats(4) if "gain" in parts else None,
        }
        return LowBitLayer(**{**drawn, **fields})

    return make


@pytest.fixture(scope="session")
def drop_in_bundle() -> Callable[[Path, Any, tuple[Any, ...]], Path]:
    """``drop_in_bundle(folder, transformer, layers)``: what of a bundle a GPU needs, without running a job."""

    def make(folder: Path, transformer: Any, layers: tuple[Any, ...]) -> Path:
        from qvdit.contract import checkpoint
        from qvdit.contract.bundle import KEPT_WEIGHTS, Manifest, write_manifest
        from qvdit.contract.files import sha256
        from qvdit.models import ADAPTERS, kept

        class_name = type(transformer).__name__
        family = next(a.family for a in ADAPTERS if a.class_name == class_name)
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        held = checkpoint.QuantizedCheckpoint(layers, family, "", config, "test", "w4a8")
        checkpoint.save(held, folder / "quantized")
        kept.save(transformer, [layer.name for layer in layers], folder / KEPT_WEIGHTS)
        names = ("quantized/config.json", "quantized/model.safetensors", KEPT_WEIGHTS)
        manifest = Manifest(
            model="tiny",
            source="",
            family=family,
            class_name=class_name,
            source_config=config,
            recipe="test",
            bits="w4a8",
            target="onnxruntime",
            inputs={},
            frames=4,
            versions={},
            files={name: sha256(folder / name) for name in names},
        )
        write_manifest(folder, manifest)
        return folder

    return make


@pytest.fixture(scope="session")
def wide_models() -> dict[str, Any]:
    """Random models by family whose attention has 128 features, so that projections of one input can be merged."""
    models = {
        "wan": wan(attention_head_dim=64, ffn_dim=160),
        "latte": latte(2, attention_head_dim=64, cross_attention_dim=128),
        "cogvideox": cogvideox(attention_head_dim=64),
    }
    assert all(model.dtype == torch.float32 for model in models.values())
    return models


@pytest.fixture(scope="session")
def wide_inputs(example_inputs: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of ``wide_models`` by family; all have 4 frames of tokens."""
    square = example_inputs((4, 4, 8, 8), 24)
    return {"wan": example_inputs((3, 4, 32, 32), 64), "latte": square, "cogvideox": square}


@pytest.fixture(scope="session")
def wide_traced(shared: Any, wide_models: Any, wide_inputs: Any, rtn_layers: Any) -> Callable[[str], Any]:
    """``wide_traced(family)``: a wide model as a graph with placeholders for all of its linears."""
    import onnx

    from qvdit.export.trace import trace
    from qvdit.models import ADAPTERS

    def load(family: str) -> Any:
        def make(folder: Path) -> None:
            adapter = next(a for a in ADAPTERS if a.family == family)
            widths = {layer.name: layer.shape[0] for layer in rtn_layers(wide_models[family], 4, rank=1)}
            folder.mkdir()
            onnx.save(trace(wide_models[family], adapter, widths, wide_inputs[family]), folder / "t.onnx")

        return onnx.load(shared(f"traced-wide-{family}", make) / "t.onnx")

    return load
