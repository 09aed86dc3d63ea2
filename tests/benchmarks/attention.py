"""The attention kernel beside PyTorch's, at the shapes of the models, in one run.

    python tests/benchmarks/attention.py --out attention.json

A row a shape and candidate: ``qvdit``, ``sdpa`` (what PyTorch chooses), ``flash`` (its FlashAttention-2) and
``unfused`` (product, softmax, product: what TensorRT 8.6 makes of it between plugin nodes). ``ms`` is the median,
``spread`` the interquartile range over it; ``tops`` counts 4 L S D a head.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2]))

from qvdit.bench.timing import captured
from qvdit.bench.turns import in_turns, summary
from qvdit.contract.files import write_json
from qvdit.runtimes import cuda, torch_ops
from qvdit.runtimes.tensorrt.device import Device

CALLS, REPEATS = 10, 15
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Shape:
    """B batches of H heads of D: L rows over S keys."""

    name: str
    batch: int
    heads: int
    rows: int
    keys: int
    size: int


SHAPES = (
    Shape("latte-xl spatial", 32, 16, 1024, 1024, 72),
    Shape("latte-xl temporal", 2048, 16, 16, 16, 72),
    Shape("latte-xl cross", 32, 16, 1024, 120, 72),
    Shape("wan-1.3b self", 1, 12, 8190, 8190, 128),
    Shape("cogvideox-5b self", 2, 48, 4096, 4096, 64),
)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> None:
    """The kernel, on [B, L, H, D]."""
    arguments = torch_ops.attention_args(q, k, v, y, q.shape[-1] ** -0.5)
    cuda.library().attention(arguments, torch.cuda.current_stream().cuda_stream)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's FlashAttention-2, on [B, H, L, D]."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return SDPA(q, k, v)


def unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scores in memory, on [B, H, L, D]."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v


def measure(shape: Shape) -> list[dict[str, object]]:
    """The rows of one shape."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(shape.batch, length, shape.heads, shape.size) for length in (shape.rows, shape.keys, shape.keys)]
    q, k, v = (torch.randn(size, generator=generator, device="cuda", dtype=torch.float16) for size in sizes)
    by_head = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    y = torch.empty_like(q)
    calls: dict[str, Callable[[int], object]] = {
        "qvdit": lambda _: ours(q, k, v, y),
        "sdpa": lambda _: SDPA(*by_head),
        "flash": lambda _: flash(*by_head),
        "unfused": lambda _: unfused(*by_head),
    }
    timers = {name: captured(call, CALLS, torch.cuda.graph_pool_handle()) for name, call in calls.items()}
    operations = 4.0 * shape.batch * shape.heads * shape.rows * shape.keys * shape.size
    rows: list[dict[str, object]] = []
    for name, times in in_turns(timers, REPEATS).items():
        ms, spread = summary(times)
        rows.append({**vars(shape), "what": name, "ms": ms, "spread": spread, "tops": round(operations / ms / 1e9, 1)})
        print(f"{shape.name}: {name} {ms:.3f} ms, {rows[-1]['tops']} TFLOP/s", flush=True)
    return rows


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    facts = Device().facts()
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "gpu": facts.name,
        "driver": facts.driver,
        "versions": {"torch": torch.__version__},
        "date": date.today().isoformat(),
    }
    write_json(out, {**about, "rows": [row for shape in SHAPES for row in measure(shape)]})


if __name__ == "__main__":
    main()
