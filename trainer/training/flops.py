"""Floating-point operations of a training step, counted without doing them, and what devices could do at most."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.diffusion.streams import Layout
from trainer.models import ModelConfig, Transformer, empty_model
from trainer.training.objective import Draws, Objective, Region
from trainer.training.state import Parts

if TYPE_CHECKING:
    from featcache import Cache

# Dense peak in TFLOP/s with bfloat16 (or float16) factors and with TF32 ones, from the manufacturer's data sheets, which
# give twice these figures "with sparsity"; the first name that the device's contains counts.
#   H100, H100 NVL: nvidia.com/en-us/data-center/h100 (SXM, NVL); the PCIe card's own data sheet of 2022
#   H200, H200 NVL: nvidia.com/en-us/data-center/h200 (in the name of the GH200, too, whose GPU does as much)
#   B200: data sheet of DGX B200, an eighth of it; A100: nvidia.com/en-us/data-center/a100
#   L40S: nvidia.com/en-us/data-center/l40s; RTX 4090: NVIDIA Ada GPU architecture, appendix A
PEAK_TFLOPS = {
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "H200 NVL": (835, 417),
    "H200": (989, 494),
    "B200": (2250, 1125),
    "A100": (312, 156),
    "L40S": (362, 183),
    "RTX 4090": (165, 82.6),
}


def peak_tflops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak of matrix products on a GPU in TFLOP/s; None where it is not known, and for a part of a GPU (MIG).

    Args:
        precision: `fp32` multiplies in TF32, as training does.
    """
    if " MIG " in device_name:
        return None
    known = (both for part, both in PEAK_TFLOPS.items() if part in device_name)
    both = next(known, None)
    return both if both is None else float(both[precision == "fp32"])


def weightless(cfg: ModelConfig, device: torch.device | str = "cpu") -> Transformer:
    """A backbone whose tensors take no memory: one number stands for all of each."""
    model = empty_model(dataclasses.replace(cfg, attention="sdpa"))  # the counter knows torch's own
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros((), device=device).expand(parameter.shape)))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape))
    return model


def training_flops(parts: Parts, cache: Cache, *, aligned: bool = True) -> float:
    """Matrix products' floating-point operations per image of a step, 2 per multiply-add: forward, backward, and the
    discriminator's share. What recomputation adds is none of the model's.

    Counted operation by operation on tensors without data, so it takes seconds and no memory at any size. Compiled,
    wrapped and sharded runs count alike. `aligned`: of a step with alignment.
    """
    n, device = 2, next(parts.objective.buffers()).device
    model = weightless(parts.model.cfg, device)
    objective = _with_backbone(parts.objective, model)
    trained = [*model.parameters(), *(p for group in parts.groups[1:] for p in group)]
    one_caption = model.cfg.text is not None
    with cache.reader(list(parts.reads), single_view=True, single_caption=one_caption) as reader:
        stored = dict(reader.arrays)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        batch = {
            name: torch.zeros(n, *shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
            for name, (dtype, shape) in stored.items()
        }
        terms, kept = objective.forward(batch, _draws(parts, n, device), aligned=aligned)
        torch.autograd.grad(torch.stack(list(terms.values())).sum(), trained, allow_unused=True)
        flops = counter.get_total_flops()
        if aligned and parts.adversary is not None and parts.alignment is not None:
            assert kept is not None, "only a method has an adversary"
            loss = objective.adversary_loss(kept, batch)
            torch.autograd.grad(loss, list(parts.adversary.parameters()))
            flops += (counter.get_total_flops() - flops) / parts.alignment.adversary_every
    return float(flops / n)


def _with_backbone(objective: Objective, model: Transformer) -> Objective:
    """The same objective, neither compiled nor wrapped, around another backbone, which is its own teacher."""
    other = copy.copy(objective)
    own = {name: module for name, module in objective._modules.items() if not isinstance(module, Region)}
    other._modules = {**own, "model": model}
    other._teacher = [model]
    other._before, other._after = other._prepared, other._losses  # the copied ones are bound to the run's own
    return other


def _draws(parts: Parts, n: int, device: torch.device) -> Draws:
    cfg = parts.model.cfg
    latent = torch.zeros(n, *cfg.latent_shape, device=device)
    one = torch.zeros(n, device=device)
    shapes = zip(parts.data[1:], Layout(cfg=cfg).shapes[1:])
    noises = {name: torch.zeros(n, *shape, device=device) for name, shape in shapes}
    return Draws(
        time=one,
        posterior=latent,
        noise=latent,
        drop=one,
        align=one,
        streams=noises,
        drop_stream=dict.fromkeys(noises, one),
    )
