"""Fast arithmetic and compiled blocks: what they leave as it was, and that every family names its blocks."""

from __future__ import annotations

import pytest
import torch

from qvdit.contract import FrameRows
from qvdit.method.acceleration import compile_blocks, fast_arithmetic
from qvdit.method.lowbit import LowBitLinear
from qvdit.method.training import TrainableLinear
from qvdit.method.weights import search_grid
from qvdit.models import ADAPTERS, WanAdapter

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_arithmetic_on_a_cpu_is_as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32
    with fast_arithmetic("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_switch_is_put_back_after_an_error():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ValueError, match="inside"), fast_arithmetic("cpu"):
        raise ValueError("inside")
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.family)
def test_blocks_hold_every_site(adapter, wan_model, latte_model, cogvideox_model):
    models = (wan_model, latte_model, cogvideox_model)
    model = next(m for m in models if type(m).__name__ == adapter.class_name)
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [names[id(block)] for block in adapter.blocks(model)]
    assert len(blocks) == len(set(blocks))
    for site in adapter.sites(model):
        assert sum(site.name.startswith(f"{block}.") for block in blocks) == 1
    # and in the order in which they run
    ran: list[str] = []
    handles = [b.register_forward_hook(lambda m, *_: ran.append(names[id(m)])) for b in adapter.blocks(model)]
    inputs = {
        "hidden_states": torch.zeros(1, model.config["in_channels"], 4, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(1, 2, model.config.get("text_dim", 24)),
    }
    with torch.no_grad():
        model(**inputs, return_dict=False)
    for handle in handles:
        handle.remove()
    assert ran == blocks


def test_blocks_are_not_compiled_on_a_cpu(tiny_wan):
    compile_blocks(tiny_wan, WanAdapter())
    assert all(block._compiled_call_impl is None for block in tiny_wan.blocks)


@pytest.mark.parametrize("trained", [True, False])
def test_compiled_code_serves_every_width(trained, rtn_layers, wan_model):
    """Else a table of eight widths would be compiled eight times for each recipe."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    name, x = WanAdapter().sites(wan_model)[0].name, torch.randn(2, 16, 32)
    for bits, act_bits in ((4, 8), (3, 8), (2, 6), (6, 6)):
        if trained:
            weight = wan_model.get_submodule(name).weight
            layer = TrainableLinear(name, weight, None, search_grid(weight, bits, True), act_bits, True, FrameRows.NONE)
        else:
            layer = LowBitLinear(rtn_layers(wan_model, 16, bits=bits, act_bits=act_bits)[0])
        torch.testing.assert_close(compiled(layer, x), layer(x))
    assert counter.frame_count == 1


@needs_gpu
def test_integers_are_exact_in_fast_arithmetic():
    """TF32 has eleven bits of significand: any two integers of up to eight bits multiply exactly."""
    x = torch.randint(-255, 256, (512, 640), device="cuda").float()
    weight = torch.randint(-128, 128, (256, 640), device="cuda").float()
    with fast_arithmetic("cuda"), torch.autocast("cuda", enabled=False):
        assert torch.equal((x @ weight.T).double(), x.double() @ weight.double().T)
