"""The kernels' PyTorch operators without a GPU: shapes by their fake implementations, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from qvdit.contract import QvditError
from qvdit.contract.packing import packed_words
from qvdit.runtimes import torch_ops


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 32])
@pytest.mark.parametrize(("shape", "k"), [((7,), 45), ((2, 3), 64), ((0,), 32)])
def test_shapes(dtype, symmetric, rank, shape, k):
    x = on_meta(*shape, k, dtype=dtype)
    alpha = on_meta(rank, k, dtype=torch.float16) if rank else None
    rows = torch.ops.qvdit.quantize_rows(x, 8, symmetric, alpha=alpha, row_sums=rank == 1)
    m = x.numel() // k
    found = [(tuple(t.shape), t.dtype) for t in rows]
    assert found == [
        ((m, -(-k // 32) * 32), torch.int8),
        ((m,), torch.float32),
        ((0 if symmetric else m,), torch.int32),
        ((rank, m), torch.float32),
        ((m if rank == 1 else 0,), torch.int32),
    ]
    words = on_meta(5, packed_words(k, 3), dtype=torch.int32)
    beta = on_meta(rank, 5) if rank else None
    y = torch.ops.qvdit.low_bit_linear(*rows, words, 3, k, on_meta(5), None, beta, on_meta(5), dtype)
    assert (tuple(y.shape), y.dtype) == ((m, 5), dtype)
    y = torch.ops.qvdit.quantized_linear(x, 8, symmetric, words, 3, on_meta(5), alpha=alpha, beta=beta)
    assert (tuple(y.shape), y.dtype) == ((*shape, 5), dtype)


def test_a_compiled_graph_keeps_the_operators_whole():
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True, dynamic=True)
    def linear(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.qvdit.quantize_rows(x, 8, True)
        return torch.ops.qvdit.low_bit_linear(*rows, words, 4, x.shape[-1], scale, None, None, None, x.dtype)

    for m in (6, 9):
        y = linear(on_meta(m, 48, dtype=torch.bfloat16), on_meta(7, 8, dtype=torch.int32), on_meta(7))
        assert y.shape == (m, 7)
    targets = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert sum("qvdit" in target for target in targets) == 2


def test_there_is_no_cpu_kernel():
    with pytest.raises(NotImplementedError, match="qvdit::quantize_rows"):
        torch.ops.qvdit.quantize_rows(torch.zeros(2, 32), 8, True)


def test_wrong_tensors_are_named():
    with pytest.raises(QvditError, match=r"got torch\.float32 \(3,\); expected torch\.float32 \(2,\)"):
        torch_ops._pointer(torch.zeros(3), torch.float32, (2,))
    with pytest.raises(QvditError, match="not contiguous"):
        torch_ops._pointer(torch.zeros(3, 2).T, torch.float32)
    with pytest.raises(QvditError, match=r"expected torch\.int8"):
        torch_ops._pointer(torch.zeros(3), torch.int8)
    assert torch_ops._pointer(None, torch.int8) is None
    assert torch_ops._pointer(torch.zeros(0), torch.float32) is None


def test_tensors_of_two_devices_are_refused():
    here, there = torch.zeros(2), on_meta(2)
    torch_ops._check_devices(here, None, torch.zeros(1))
    with pytest.raises(QvditError, match="a tensor on meta beside one on cpu"):
        torch_ops._check_devices(here, None, there)
    with pytest.raises(QvditError, match="one device"):
        torch_ops.unpack_weight(torch.zeros(2, 4, dtype=torch.int32), 4, 32, there, False)
    rows = (torch.zeros(1, 32, dtype=torch.int8), *(torch.zeros(1) for _ in range(4)))
    with pytest.raises(QvditError, match="one device"):
        torch_ops.gemm(rows, torch.zeros(2, 32, dtype=torch.int8), None, there, None, None, None, torch.zeros(1, 2))


def test_modulations():
    scale = torch.zeros(2, 6, 8)[:, 1]  # one of six that a model makes at once
    assert torch_ops._modulation((scale, scale), 10, 8) == (2, 48)
    assert torch_ops._modulation((None, scale), 10, 8) == (2, 48)
    assert torch_ops._modulation((None, None), 10, 8) == (1, 0)
    for wrong in (torch.zeros(2, 9), torch.zeros(3, 8), torch.zeros(2, 8).half(), torch.zeros(8, 2).T):
        with pytest.raises(QvditError, match="B dividing the rows"):
            torch_ops._modulation((scale, wrong), 10, 8)
