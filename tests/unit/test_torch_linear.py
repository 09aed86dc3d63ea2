"""The module on the kernels, its operators replaced by eager ones: what it holds, hands over, merges and refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvdit.contract import FrameRows, StaticInt8Layer
from qvdit.contract.kernels import mergeable, unserved
from qvdit.contract.packing import unpack
from qvdit.method import operator
from qvdit.method.lowbit import LowBitLinear
from qvdit.runtimes.torch_linear import KernelLinear

PARTS = [(), ("zero", "bias"), ("zero", "bias", "smooth", "gain")]


def eager_quantize_rows(
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    inv_smooth: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    row_sums: bool = False,
    rotation: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The operator by its definition."""
    flat = x.reshape(-1, x.shape[-1])
    levels = torch.tensor(float(operator.act_levels(act_bits, symmetric)), device=x.device)
    rows = operator.quantize_rows(operator.transform(flat, inv_smooth, rotation), levels, symmetric)
    m, centred = len(flat), rows.centred()
    u = x.new_zeros(0, m, dtype=torch.float32) if alpha is None else rows.scale[:, 0] * (alpha.float() @ centred.T)
    if frame_gain is not None:
        frame = torch.arange(m, device=x.device) // tokens_per_frame % frame_gain.shape[-1]
        u = u * frame_gain[:, frame].repeat_interleave(len(u) // len(frame_gain), 0)
    stored = 0 if symmetric else 128
    x_q = torch.nn.functional.pad((rows.x_q - stored).to(torch.int8), (0, -x.shape[-1] % 32))
    zero = torch.zeros(0, dtype=torch.int32) if rows.zero is None else (rows.zero[:, 0] - stored).int()
    row_sum = centred.sum(1).int() if row_sums else torch.zeros(0, dtype=torch.int32)
    return x_q, rows.scale[:, 0], zero, u, row_sum


def eager_low_bit_linear(
    x_q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    u: torch.Tensor,
    row_sum: torch.Tensor,
    words: torch.Tensor,
    weight_bits: int,
    in_features: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: int = 0,
    segment: int = 0,
) -> torch.Tensor:
    """The operator by its definition; of a merged layer, columns n take the ranks of their segment."""
    weight = torch.from_numpy(unpack(words.numpy().view(np.uint32), weight_bits, in_features)).double()
    weight = weight if weight_zero is None else weight - weight_zero.double()[:, None]
    centred = x_q[:, :in_features].double() - (zero.double()[:, None] if len(zero) else 0)
    if weight_zero is not None and weight_bits == 8:
        assert torch.equal(row_sum.double(), centred.sum(1))
    y = scale[:, None] * ((centred @ weight.T).float() * weight_scale)
    if beta is not None:
        rank, n = beta.shape
        assert len(u) == rank * (n // segment)
        terms = [u[i * rank : (i + 1) * rank].T @ b.float() for i, b in enumerate(beta.split(segment, 1))]
        y = y + torch.cat(terms, 1)
    return (y if bias is None else y + bias).to(out_dtype)


def eager_quantized_linear(
    x: torch.Tensor,
    act_bits: int,
    symmetric: bool,
    words: torch.Tensor,
    weight_bits: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    frame_gain: torch.Tensor | None = None,
    tokens_per_frame: int = 1,
    inv_smooth: torch.Tensor | None = None,
    rotation: int = 0,
    segment: int = 0,
) -> torch.Tensor:
    """Both, one after the other."""
    sums = weight_zero is not None and weight_bits == 8
    factors = (inv_smooth, alpha, frame_gain, tokens_per_frame, sums, rotation)
    rows = eager_quantize_rows(x, act_bits, symmetric, *factors)
    weights = (words, weight_bits, x.shape[-1], weight_scale, weight_zero, beta, bias)
    return eager_low_bit_linear(*rows, *weights, x.dtype, segment=segment).reshape(*x.shape[:-1], -1)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator in eager PyTorch."""
    monkeypatch.setattr(torch.ops.qvdit, "quantized_linear", eager_quantized_linear)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


# One layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("k", [64, 45])
@pytest.mark.parametrize("parts", PARTS)
def test_buffers(bits, k, parts, low_bit_layer):
    layer = low_bit_layer(10, k, bits, parts, rank=2)
    module = KernelLinear(layer)
    assert (module.in_features, module.out_features) == (k, 10)
    assert module.words.dtype == torch.int32
    np.testing.assert_array_equal(unpack(module.words.numpy().view(np.uint32), bits, k), layer.weight_q)
    np.testing.assert_array_equal(module.alpha, layer.alpha.T)
    assert module.alpha.is_contiguous()
    assert (module.alpha.dtype, module.beta.dtype) == (torch.float16, torch.float16)
    np.testing.assert_array_equal(module.beta, layer.beta)
    for name in ("weight_scale", "weight_zero", "bias", "inv_smooth", "frame_gain"):
        held, expected = getattr(module, name), getattr(layer, name)
        assert (held is None) == (expected is None)
        if expected is not None:
            np.testing.assert_array_equal(held.reshape(expected.shape), expected)


def test_one_rank_has_its_outputs_in_float32(low_bit_layer):
    layer = low_bit_layer(10, 64, 4, (), rank=1)
    module = KernelLinear(layer)
    assert (module.alpha.dtype, module.beta.dtype) == (torch.float16, torch.float32)
    np.testing.assert_array_equal(module.beta, layer.beta)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_bits", [6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("rank", [0, 2])
def test_forward_is_the_reference(dtype, act_bits, symmetric, bits, parts, rank, low_bit_layer):
    layer = low_bit_layer(6, 45, bits, parts, rank, act_bits=act_bits, act_symmetric=symmetric)
    x = activations(2, 8, 45, dtype=dtype)
    y, expected = KernelLinear(layer)(x), LowBitLinear(layer)(x)
    assert (y.dtype, y.shape) == (dtype, (2, 8, 6))
    torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.usefixtures("eager")
def test_a_rotated_layer(low_bit_layer):
    layers = [low_bit_layer(128, 40, 3, ("smooth",), 1, rotation=8, seed=seed) for seed in range(2)]
    x = activations(2, 8, 40)
    expected = [LowBitLinear(layer)(x) for layer in layers]
    torch.testing.assert_close(KernelLinear(layers[0])(x), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(KernelLinear(*layers)(x), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4)])
def test_any_leading_shape(shape, low_bit_layer):
    layer = low_bit_layer(6, 32, rank=1)
    x = activations(*shape, 32)
    torch.testing.assert_close(KernelLinear(layer)(x), LowBitLinear(layer)(x), rtol=1e-5, atol=1e-5)


LAYOUTS = [
    (FrameRows.SEQUENCE, (2, 8, 32)),
    (FrameRows.SEQUENCE, (8, 32)),
    (FrameRows.SPATIAL, (8, 3, 32)),
    (FrameRows.SPATIAL, (3, 5, 32)),  # fewer samples than frames
    (FrameRows.TEMPORAL, (3, 4, 32)),
    (FrameRows.TEMPORAL, (2, 3, 2, 32)),  # rows wrap around
    (FrameRows.NONE, (3, 5, 32)),
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("rows", "shape"), LAYOUTS)
def test_every_layout_of_frames(rows, shape, low_bit_layer):
    layer = low_bit_layer(6, 32, 4, ("gain",), 1, rows=rows)
    x = activations(*shape)
    torch.testing.assert_close(KernelLinear(layer)(x), LowBitLinear(layer)(x), rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from(list(FrameRows)), st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=3), st.data()
)
def test_frames_of_rows(low_bit_layer, rows, frames, leading, data):
    """(m // P) mod T gives the frames of the reference."""
    if rows is FrameRows.SEQUENCE:
        leading[-1] = frames * data.draw(st.integers(1, 4))
    module = KernelLinear(low_bit_layer(1, 32, 4, ("gain",), 1, rows=rows, frame_gain=np.arange(frames, dtype="f4")))
    x = torch.zeros(*leading, 32)
    m = x.numel() // 32
    gain = torch.arange(frames).float()
    if leading[-1] > 0:
        expected = operator.row_gains(gain, rows, x.shape).flatten()
        assert torch.equal(gain[torch.arange(m) // module.tokens_per_frame(x) % frames], expected)
    assert module.tokens_per_frame(x) >= 1  # no division by zero where there are no rows


def test_a_sequence_that_does_not_divide_into_frames(low_bit_layer):
    module = KernelLinear(low_bit_layer(1, 32, 4, ("gain",), 1))
    with pytest.raises(ValueError, match="5 tokens cannot hold 4 frames"):
        module.tokens_per_frame(torch.zeros(1, 5, 32))


def test_moving_does_not_round(low_bit_layer):
    module = KernelLinear(low_bit_layer(6, 32, 4, PARTS[2], 1)).half().to("meta", torch.bfloat16)
    kinds = {name: (tensor.dtype, tensor.device.type) for name, tensor in module.named_buffers()}
    assert set(kinds.values()) == {(dtype, "meta") for dtype in (torch.float32, torch.float16, torch.int8, torch.int32)}


def test_it_compiles_whole(low_bit_layer):
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    module = KernelLinear(low_bit_layer(6, 45, 8, PARTS[2], 2)).to("meta")
    compiled = torch.compile(module, backend=keep, fullgraph=True, dynamic=True)
    for length in (8, 12, 16):
        x = torch.empty(2, length, 45, dtype=torch.bfloat16, device="meta")
        assert (compiled(x).shape, compiled(x).dtype) == ((2, length, 6), torch.bfloat16)
    targets = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert sum("qvdit" in target for target in targets) == 1
    assert len(graphs) <= 2


def test_a_merged_layer_compiles_whole(low_bit_layer):
    module = KernelLinear(*(low_bit_layer(128, 64, 4, ("gain",), 2, seed=seed) for seed in range(3))).to("meta")
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for length in (8, 12):
        assert compiled(torch.empty(2, length, 64, device="meta")).shape == (2, length, 384)


# Several layers as one ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bits", [3, 8])
def test_merged_layers(count, rank, parts, bits, low_bit_layer):
    layers = [low_bit_layer(128, 45, bits, parts, rank, seed=seed, act_symmetric=False) for seed in range(count)]
    assert mergeable(layers)
    module = KernelLinear(*layers)
    x = activations(2, 8, 45)
    expected = torch.cat([LowBitLinear(layer)(x) for layer in layers], -1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("rows", "shape"), LAYOUTS)
def test_merged_layers_have_their_own_gains(rows, shape, low_bit_layer):
    layers = [low_bit_layer(128, 32, 4, ("gain",), 2, seed=seed, rows=rows) for seed in range(3)]
    x = activations(*shape)
    expected = torch.cat([LowBitLinear(layer)(x) for layer in layers], -1)
    torch.testing.assert_close(KernelLinear(*layers)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("eager")
def test_a_bias_that_one_of_them_lacks(low_bit_layer):
    layers = [low_bit_layer(128, 32, 4, ("bias",)), low_bit_layer(128, 32, 4, seed=1)]
    x = activations(3, 32)
    expected = torch.cat([LowBitLinear(layer)(x) for layer in layers], -1)
    torch.testing.assert_close(KernelLinear(*layers)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"n": 256},
        {"k": 96},
        {"rank": 2},
        {"rank": 0},
        {"act_bits": 6},
        {"act_symmetric": False},
        {"parts": ("smooth", "gain", "zero")},
        {"parts": ("smooth",)},
        {"parts": ("gain",)},
        {"rows": FrameRows.TEMPORAL},
        {"frame_gain": np.ones(5, np.float32)},
        {"inv_smooth": np.ones(64, np.float32)},
        {"rotation": 64},
    ],
    ids=str,
)
def test_layers_that_differ_stay_apart(changes, low_bit_layer):
    common = {"n": 128, "k": 64, "bits": 4, "parts": ("smooth", "gain"), "rank": 1}
    layers = [low_bit_layer(**common), low_bit_layer(**{**common, "seed": 1, **changes})]
    assert mergeable([layers[0], low_bit_layer(**common, seed=1)])
    assert not mergeable(layers)
    with pytest.raises(ValueError, match="layer0, layer1"):
        KernelLinear(*layers)


def test_sizes_that_are_not_merged(low_bit_layer):
    assert not mergeable([low_bit_layer(192, 64), low_bit_layer(192, 64)])
    assert mergeable([low_bit_layer(128, 64, rank=16)] * 2)
    assert not mergeable([low_bit_layer(128, 64, rank=16)] * 3)  # 48 ranks; the kernels take 32


# What the kernels do not serve ----------------------------------------------------------------------------------------


def test_layers_that_the_kernels_do_not_serve(low_bit_layer):
    static = StaticInt8Layer("s", np.zeros((2, 32), np.int8), np.ones(2, np.float32), np.float32(1))
    grouped = low_bit_layer(4, 64, weight_scale=np.ones((4, 2), np.float32))
    wide = low_bit_layer(1, 16416)
    reasons = {
        "groups": grouped,
        "static activations": static,
        "more than 16384 input features": wide,
        "rank above 32": low_bit_layer(4, 64, rank=33),
    }
    for reason, layer in reasons.items():
        assert unserved(layer) == reason
    assert unserved(low_bit_layer(4, 16384, 2, PARTS[2], 32)) is None
    for layer in (grouped, wide):
        with pytest.raises(ValueError, match=layer.name):
            KernelLinear(layer)
