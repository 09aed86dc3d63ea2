"""The speed stage: ONNX Runtime on the CPU, full precision beside quantized, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper

from qvdit.bench.turns import in_turns, milliseconds
from qvdit.contract import FrameRows, LowBitLayer, StaticInt8Layer
from qvdit.contract.layer import Layer, group_size, rotation_block
from qvdit.export import graph
from qvdit.export.functions import DOMAIN, DOMAIN_VERSION, NODE, OPSET
from qvdit.method.calibration import Progress
from qvdit.runtimes.onnxruntime import session

LINEAR = (4608, 1152)  # N, K of a linear of STDiT-XL's size
LINEAR_TOKENS = 1024
_BOUTS = 5  # a machine that does something else meanwhile does it for longer than a few passes take
_REPEATS, _LINEAR_REPEATS = 3, 7  # of a forward pass and of a linear, in a bout


def measure_speed(
    full: Path, quantized: Path, inputs: dict[str, np.ndarray], like: Layer, threads: int, progress: Progress
) -> dict[str, Any]:
    """Milliseconds of a forward pass of both models, and of one 1152 x 4608 linear quantized like ``like``.

    Both are timed in turns, in several bouts; medians over these. ``spread`` is how far apart the bouts' medians of a
    pass lie, over their median, and the larger of the two models'.
    """
    models = [session(path, threads) for path in (full, quantized)]
    rng = np.random.default_rng(0)
    x = {"x": rng.standard_normal((1, LINEAR_TOKENS, LINEAR[1]), dtype=np.float32)}
    pair = [session(model.SerializeToString(), threads) for model in _linear_models(like, rng)]
    forward, linear = [], []
    for bout in range(_BOUTS):
        progress(bout, _BOUTS)
        forward.append(_medians([partial(s.run, None, inputs) for s in models], _REPEATS))
        linear.append(_medians([partial(s.run, None, x) for s in pair], _LINEAR_REPEATS))
    progress(_BOUTS, _BOUTS)
    (fp32, fp32_spread), (low, low_spread) = over_bouts(forward)
    (linear_fp32, _), (linear_low, _) = over_bouts(linear)
    return {
        "threads": threads,
        "fp32_ms": fp32,
        "quantized_ms": low,
        "speedup": fp32 / low,
        "spread": max(fp32_spread, low_spread),
        "linear_fp32_ms": linear_fp32,
        "linear_quantized_ms": linear_low,
        "linear_speedup": linear_fp32 / linear_low,
    }


def over_bouts(bouts: list[list[float]]) -> list[tuple[float, float]]:
    """(median of the bouts' medians, what lies between the least and the greatest of them over it) of each call."""
    results = []
    for medians in zip(*bouts, strict=True):
        median = statistics.median(medians)
        results.append((median, round((max(medians) - min(medians)) / median, 4)))
    return results


def _medians(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Each call's median in ms, of calls that take turns."""
    times = in_turns({i: milliseconds(call) for i, call in enumerate(calls)}, repeats, warm_ups=1)
    return [statistics.median(taken) for taken in times.values()]


def _linear_models(like: Layer, rng: np.random.Generator) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """One linear in full precision and quantized like a given layer: same bits, zeros, groups, rotation, rank."""
    n, k = LINEAR
    weight, bias = rng.standard_normal((n, k), dtype=np.float32), rng.standard_normal(n, dtype=np.float32)
    value = onnx.helper.make_tensor_value_info
    placeholder = onnx.helper.make_node(NODE, ["x"], ["y"], domain=DOMAIN, layer="linear")
    one = onnx.helper.make_graph(
        [placeholder],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, ["batch", "tokens", k])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", "tokens", n])],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    traced = onnx.helper.make_model(one, opset_imports=opsets, ir_version=10)
    full = graph.baseline_model(traced, {"linear": (weight, bias)})
    return full, graph.quantized_model(traced, (_random_layer(like, rng, bias),), "integer")


def _random_layer(like: Layer, rng: np.random.Generator, bias: np.ndarray) -> Layer:
    n, k = LINEAR
    half = 1 << (like.weight_bits - 1)
    weight_q = rng.integers(1 - half, half, (n, k)).astype(np.int8)
    grouped: tuple[int, ...] = (n,)
    if isinstance(like, LowBitLayer) and like.weight_scale.ndim == 2:
        grouped = (n, k // group_size(k, like.group))
    scale = rng.random(grouped, dtype=np.float32) * 0.01 + 0.001
    smooth = None if like.inv_smooth is None else rng.random(k, dtype=np.float32) + 0.5
    if isinstance(like, StaticInt8Layer):
        return StaticInt8Layer("linear", weight_q, scale, np.array(0.03, np.float32), bias, smooth)
    frames = 0 if like.frame_gain is None else len(like.frame_gain)
    return LowBitLayer(
        name="linear",
        weight_bits=like.weight_bits,
        act_bits=like.act_bits,
        act_symmetric=like.act_symmetric,
        rows=FrameRows.SEQUENCE if frames else FrameRows.NONE,
        weight_q=weight_q,
        weight_scale=scale,
        weight_zero=None if like.weight_zero is None else rng.integers(-half, half, grouped).astype(np.int8),
        bias=bias,
        inv_smooth=smooth,
        alpha=rng.standard_normal((k, like.rank)).astype(np.float16) if like.rank else None,
        beta=rng.standard_normal((like.rank, n)).astype(np.float16) if like.rank else None,
        frame_gain=np.ones(frames, np.float32) if frames else None,
        rotation=rotation_block(k) if like.rotation else 0,
    )
