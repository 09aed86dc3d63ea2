"""Whole transformer blocks, bf16 beside w4a8: random weights, compiled, and where their time goes.

The quantized block is what a pipeline runs: the family's adapter says which linears are quantized, and the runtime
puts its kernels in their places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from qvdit.bench.results import Row
from qvdit.bench.shapes import Shape
from qvdit.bench.timing import Candidate, captured
from qvdit.bench.turns import in_turns
from qvdit.contract import FrameRows, LowBitLayer
from qvdit.models import ModelAdapter, Site

_CALLS = 3  # of a block in a graph
_PROFILED = 3
TEXT_FEATURES = 4096  # of T5-XXL, which these models read
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """One block in full precision: a whole model of one layer, which of it is the block, and its inputs."""

    name: str
    model: torch.nn.Module
    block_of: Callable[[Any], torch.nn.Module]
    inputs: Inputs
    adapter: ModelAdapter
    frames: int
    shape: Shape  # tokens, hidden size twice


class LatteBlock(torch.nn.Module):
    """A spatial and a temporal block of diffusers' Latte, and the transpositions between them."""

    def __init__(self, model: Any, frames: int):
        super().__init__()
        self.spatial, self.temporal = model.transformer_blocks[0], model.temporal_transformer_blocks[0]
        self.frames = frames

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, time_spatial: torch.Tensor, time_temporal: torch.Tensor
    ) -> torch.Tensor:
        # x: [B·T, S, D], text: [B·T, L, D], times: [B·T, 6·D] and [B·S, 6·D]
        x = self.spatial(x, None, text, None, time_spatial, None, None)
        tokens = x.shape[1]
        x = self.temporal(_swapped(x, self.frames), None, None, None, time_temporal, None, None)
        return _swapped(x, tokens)


def _swapped(x: torch.Tensor, inner: int) -> torch.Tensor:
    """[B·I, L, D] → [B·L, I, D]."""
    _, length, features = x.shape
    return x.reshape(-1, inner, length, features).transpose(1, 2).reshape(-1, inner, features)


def latte_xl(layers: int, frames: int = 16) -> Any:
    """A Latte of Latte-XL's and STDiT-XL's size, random weights: hidden 1152, 16 heads, MLP 4608, 64 x 64 latents.

    layers: of the spatial and of the temporal blocks each; 28 in theirs.
    """
    from diffusers import LatteTransformer3DModel

    heads, head = 16, 72
    return LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=heads * head,
        attention_bias=True,
        sample_size=64,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_FEATURES,
        video_length=frames,
    )


def stdit_xl(batch: int = 2, frames: int = 16, tokens: int = 1024, text: int = 120) -> Block:
    """Latte's and STDiT-XL's block: hidden 1152, 16 heads, MLP 4608; x [B·T, S, D]."""
    from qvdit.models.latte import LatteAdapter

    model = latte_xl(1, frames)
    hidden = model.config.cross_attention_dim
    inputs = (
        _random(batch * frames, tokens, hidden),
        _random(batch * frames, text, hidden),
        _random(batch * frames, 6 * hidden),
        _random(batch * tokens, 6 * hidden),
    )
    shape = Shape(batch * frames * tokens, hidden, hidden)
    return Block("block_stdit_xl", model, lambda m: LatteBlock(m, frames), inputs, LatteAdapter(), frames, shape)


def wan_1_3b(frames: int = 21, height: int = 30, width: int = 52, text: int = 512) -> Block:
    """Wan 1.3B's block: hidden 1536, 12 heads, MLP 8960; x [1, T·P, D], 32760 tokens unless said otherwise."""
    from diffusers import WanTransformer3DModel

    from qvdit.models.wan import WanAdapter

    heads, head = 12, 128
    hidden = heads * head
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head, ffn_dim=8960, num_layers=1, text_dim=64
    )
    rotary = model.rope(torch.empty(1, 16, frames, 2 * height, 2 * width))
    tokens = frames * height * width
    inputs = (
        _random(1, tokens, hidden),
        _random(1, text, hidden),
        torch.randn(1, 6, hidden),
        tuple(part.float() for part in rotary),
    )
    shape = Shape(tokens, hidden, hidden)
    return Block("block_wan_1_3b", model, lambda m: m.blocks[0], inputs, WanAdapter(), frames, shape)


BLOCKS = (stdit_xl, wan_1_3b)


def rows(make: Callable[[], Block], repeats: int) -> list[Row]:
    """A block in bf16 and in w4a8 with TQE of rank 1, in turns: two rows with where the time goes."""
    block = make()
    inputs = _moved(block.inputs)
    full = block.model.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    variants = {(16, 16, 0): block.block_of(full), (4, 8, 1): block.block_of(quantized(block))}
    operations = _operations(variants[16, 16, 0], inputs)
    calls = {kind: _call(module, inputs) for kind, module in variants.items()}
    pool = torch.cuda.graph_pool_handle()
    times = in_turns({kind: captured(call, _CALLS, pool) for kind, call in calls.items()}, repeats)
    found = []
    for (weight_bits, act_bits, rank), call in calls.items():
        bits = (weight_bits, act_bits, rank)
        row = Candidate(block.name, call, *bits, operations=operations).row(block.shape, times[bits])
        found.append(replace(row, parts_ms=parts(profile(call, _PROFILED), _PROFILED)))
    return found


def quantized(block: Block) -> Any:
    """A copy of a block's model with the kernels in it. The one place that knows how the runtime puts them there."""
    from qvdit.runtimes.torch_transformer import install

    model = copy.deepcopy(block.model)
    layers = [
        low_bit(site, model.get_submodule(site.name), block.frames)  # type: ignore[arg-type]
        for site in block.adapter.sites(model)
    ]
    install(model, layers, block.adapter, torch.device("cuda"), fuse=True)
    return model


def low_bit(site: Site, linear: torch.nn.Linear, frames: int) -> LowBitLayer:
    """A linear's weights rounded to 4 bits, with a small random term of rank 1, by frame where rows are of frames."""
    weight = linear.weight.detach().float().cpu().numpy()
    scale = np.abs(weight).max(1) / 7
    rng = np.random.default_rng(0)
    n, k = weight.shape
    return LowBitLayer(
        name=site.name,
        weight_bits=4,
        act_bits=8,
        act_symmetric=True,
        rows=site.rows,
        weight_q=np.rint(weight / scale[:, None]).astype(np.int8),
        weight_scale=scale.astype(np.float32),
        bias=None if linear.bias is None else linear.bias.detach().float().cpu().numpy(),
        alpha=(rng.standard_normal((k, 1)) / k).astype(np.float16),
        beta=rng.standard_normal((1, n)).astype(np.float16),
        frame_gain=None if site.rows is FrameRows.NONE else np.ones(frames, np.float32),
    )


# Where the time goes ------------------------------------------------------------------------------------------------

_PARTS = (  # by what a kernel's name holds, first match wins: attention's kernels name CUTLASS too
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("quantization", ("quantize_rows", "quantize_halves", "quantize_groups", "unpack_weight")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
)


def part_of(kernel: str) -> str:
    """Which part of a block a kernel belongs to."""
    name = kernel.lower()
    if name.startswith("triton_") and "_tem_" not in name:
        return "other"  # torch.compile's pointwise kernels are named after every operator around them
    return next((part for part, words in _PARTS if any(word in name for word in words)), "other")


def parts(kernels: Iterable[tuple[str, float]], calls: int) -> dict[str, float]:
    """Milliseconds a call of every part, from kernels' names and milliseconds."""
    found = dict.fromkeys(("attention", "GEMM", "quantization", "other"), 0.0)
    for name, ms in kernels:
        found[part_of(name)] += ms / calls
    return {part: round(ms, 4) for part, ms in found.items()}


def profile(call: Callable[[int], object], calls: int) -> list[tuple[str, float]]:
    """Names and milliseconds of every kernel of some calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [(kernel.name, kernel.time_range.elapsed_us() / 1e3) for kernel in kernels]


def _call(module: torch.nn.Module, inputs: Inputs) -> Callable[[int], object]:
    compiled = torch.compile(module)

    def call(_: int) -> object:
        with torch.no_grad():
            return compiled(*inputs)

    return call


def _operations(module: torch.nn.Module, inputs: Inputs) -> float:
    """Of the matrix products and attention of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())


def _random(*size: int) -> torch.Tensor:
    return torch.randn(size).bfloat16()


def _moved(inputs: Inputs) -> Inputs:
    return tuple(_moved(value) if isinstance(value, tuple) else value.cuda() for value in inputs)
