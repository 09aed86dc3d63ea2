"""The static INT8 path: NVIDIA ModelOpt's SmoothQuant recipe and calibrators, frozen into plain Q/DQ layers."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import Any

import numpy as np
import torch

from qvdit.contract import StaticInt8Layer
from qvdit.method.calibration import CalibrationData, Progress
from qvdit.models import ModelAdapter

_QMAX = 127.0


def quantize_static(
    transformer: torch.nn.Module, adapter: ModelAdapter, data: CalibrationData, progress: Progress
) -> tuple[StaticInt8Layer, ...]:
    """Calibrate with ModelOpt's INT8_SMOOTHQUANT_CFG over the calibration data and freeze every site."""
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(transformer)
    sites = adapter.sites(model)
    chosen = {site.name for site in sites}
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d | torch.nn.Conv2d) and name not in chosen:
            config["quant_cfg"].append({"quantizer_name": f"{name}.*", "enable": False})
    count = data.count()
    device = next(model.parameters()).device

    def forward_loop(calibrated: torch.nn.Module) -> None:
        for index, batch in enumerate(data.batches()):
            progress(index, count)
            calibrated(**{name: tensor.to(device) for name, tensor in batch.items()}, return_dict=False)

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it counts modules on stdout and warns of those we switched off
        model = mtq.quantize(model, config, forward_loop)
    progress(count, count)
    return tuple(_freeze(site.name, model.get_submodule(site.name)) for site in sites)


@torch.no_grad()
def _freeze(name: str, linear: Any) -> StaticInt8Layer:
    scale = (linear.weight_quantizer.amax.float().flatten() / _QMAX).clamp(min=1e-8)
    weight_q = torch.round(linear.weight.float() / scale[:, None]).clamp(-_QMAX, _QMAX).to(torch.int8)
    smooth = getattr(linear.input_quantizer, "pre_quant_scale", None)
    return StaticInt8Layer(
        name=name,
        weight_q=weight_q.cpu().numpy(),
        weight_scale=scale.cpu().numpy(),
        act_scale=np.array(linear.input_quantizer.amax.float().item() / _QMAX, np.float32),
        bias=None if linear.bias is None else linear.bias.float().cpu().numpy(),
        inv_smooth=None if smooth is None else smooth.float().flatten().cpu().numpy(),
    )
