"""Small shapes, random inputs and one configuration per option of every alignment method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featcache.read.statistics import LayerStatistics
from trainer.align import build, config_class
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo

B, GRID, WIDTH, TOKEN_WIDTH, GROUP_WIDTH = 3, 4, 16, 12, 8
N = GRID * GRID

INFO = BackboneInfo(name="SiT-Ti/2", depth=6, width=WIDTH, patch_size=2, latent_channels=4, latent_size=2 * GRID)

FEATURES = {
    "tiny@3": FeatureInfo(shape=(N, TOKEN_WIDTH)),
    "tiny@5": FeatureInfo(shape=(N, TOKEN_WIDTH)),
    "tiny@5.cls": FeatureInfo(shape=(TOKEN_WIDTH,)),
    "vae/G1": FeatureInfo(shape=(4, N, 4)),
    "vae/G2": FeatureInfo(shape=(3, N, 6)),
    "vae/G3": FeatureInfo(shape=(4, N, GROUP_WIDTH)),
    "vae/G4": FeatureInfo(shape=(4, N, GROUP_WIDTH)),
}

SMALL_ROUTER = {"router_width": 8, "time_width": 6}

# Every option value that the papers' tables vary, one at a time.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "repa": ("repa", {"head_width": 10}),
    "repa nt-xent": ("repa", {"head_width": 10, "loss": "nt-xent"}),
    "repa conv": ("repa", {"head": "conv"}),
    "irepa": ("repa", {"head": "conv", "spatial_gamma": 0.6, "weight": 1.0}),
    "repa two encoders": ("repa", {"head_width": 10, "features": ("tiny@5", "tiny@3")}),
    "sara": ("sara", {"head_width": 10, "discriminator_weights": "random"}),
    "sara batch norm": (
        "sara",
        {"head_width": 10, "discriminator_weights": "random", "discriminator_norm": "batch"},
    ),
    "sara patch": ("sara", {"head_width": 10, "structure_weight": 0.0, "adversarial_weight": 0.0}),
    "sara structure": ("sara", {"head_width": 10, "patch_weight": 0.0, "adversarial_weight": 0.0}),
    "sara sum": (
        "sara",
        {"head_width": 10, "patch_weight": 0.0, "adversarial_weight": 0.0, "structure_reduction": "sum"},
    ),
    "sara adversarial": (
        "sara",
        {"head_width": 10, "patch_weight": 0.0, "structure_weight": 0.0, "discriminator_weights": "random"},
    ),
    "dya": ("dya", {"head_width": 10}),
    "dya both": ("dya", {"head_width": 10, "modulation": "both"}),
    "ahpa": ("ahpa", SMALL_ROUTER),
    **{
        f"ahpa router {kind}": ("ahpa", {**SMALL_ROUTER, "router": kind})
        for kind in ("static", "linear", "table", "attention", "content")
    },
    **{f"ahpa time {kind}": ("ahpa", {**SMALL_ROUTER, "time_embedding": kind}) for kind in ("sinusoidal", "fourier")},
    **{f"ahpa depth {depth}": ("ahpa", {**SMALL_ROUTER, "router_depth": depth}) for depth in (3, 8)},
    **{
        f"ahpa head {head}": ("ahpa", {**SMALL_ROUTER, "head": head, "head_width": 8})
        for head in ("linear", "mlp3", "mlp5", "conv2", "conv3", "conv5")
    },
    **{f"ahpa {loss}": ("ahpa", {**SMALL_ROUTER, "loss": loss}) for loss in ("l1", "smooth-l1")},
    **{f"ahpa {group}": ("ahpa", {**SMALL_ROUTER, "groups": (group,)}) for group in ("G1", "G2", "G3", "G4")},
    "ahpa full union": ("ahpa", {**SMALL_ROUTER, "groups": ("G1", "G2", "G3", "G4")}),
    "ahpa full union linear": (
        "ahpa",
        {**SMALL_ROUTER, "groups": ("G1", "G2", "G3", "G4"), "router": "linear"},
    ),
    "ahpa split 2+6": ("ahpa", {**SMALL_ROUTER, "split": (2, 6)}),
    "ahpa split 6+2": ("ahpa", {**SMALL_ROUTER, "split": (6, 2)}),
    "ahpa rms": ("ahpa", {**SMALL_ROUTER, "normalize": "rms"}),
    "ahpa standardize": ("ahpa", {**SMALL_ROUTER, "normalize": "standardize"}),
    "ahpa whiten": ("ahpa", {**SMALL_ROUTER, "normalize": "whiten"}),
    "ahpa entropy floor": ("ahpa", {**SMALL_ROUTER, "entropy_floor": 0.95}),
    "ahpa several blocks": ("ahpa", {**SMALL_ROUTER, "depths": (1, 3, 5)}),
    "ahpa several blocks content": ("ahpa", {**SMALL_ROUTER, "depths": (1, 3), "router": "content"}),
    "sra": ("sra", {}),
    "sra cosine": ("sra", {"loss": "cosine"}),
    "sra fixed": ("sra", {"interval_kind": "fixed", "interval": 0.1}),
    "sra no head": ("sra", {"head": False}),
    "sra2": ("sra2", {"head_width": 10}),
    "sra2 conv cosine": ("sra2", {"head": "conv", "loss": "cosine"}),
    "sra2 linear": ("sra2", {"head": "linear"}),
    "reg": ("reg", {"head_width": 10}),
}


def make(name: str, options: dict[str, Any] | None = None, *, info: BackboneInfo = INFO) -> Alignment:
    """A method with random, nowhere zero parameters, so that gradients can flow through all of it."""
    torch.manual_seed(0)
    module = build([(name, config_class(name)(**(options or {})))], info, FEATURES)
    module.calibrate(statistics)
    return randomize(module)


def statistics(names: Sequence[str]) -> dict[str, LayerStatistics]:
    """Of tokens that no test draws: what a cache could have given."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for name in names:
        layers, _, width = FEATURES[name].shape
        mixing = torch.randn(layers, width, width, generator=g, dtype=torch.float64)
        found[name] = LayerStatistics(
            mean=torch.randn(layers, width, generator=g, dtype=torch.float64),
            covariance=mixing @ mixing.mT,
            neighbour=torch.full((layers,), torch.nan, dtype=torch.float64),
            count=1,
        )
    return found


def randomize(module: Alignment) -> Alignment:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


class EchoTeacher(nn.Module):
    """Stands in for the EMA model: remembers its calls, and depends on t' and on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.calls: list[tuple[Tensor, int]] = []

    def forward(self, t: Tensor, depth: int) -> Tensor:
        self.calls.append((t.detach().clone(), depth))
        return torch.cos(torch.arange(N)[None, :, None] * t[:, None, None]) + depth * self.weight


def inputs_for(module: Alignment, *, seed: int = 1, requires_grad: bool = False, **changes: Any) -> AlignInputs:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(requires_grad)

    values: dict[str, Any] = {
        "hidden": {tap: draw(B, N, WIDTH) for tap in module.taps},
        "t": torch.rand(B, generator=g),
        "targets": {name: draw(B, *FEATURES[name].shape) for name in module.reads},
        "time_embedding": draw(B, WIDTH),
        "latent": draw(B, INFO.latent_channels, INFO.latent_size, INFO.latent_size),
        "uniform": torch.rand(B, generator=g),
        "teacher": EchoTeacher() if module.needs_teacher else None,
        "stream_hidden": {
            name: {tap: draw(B, 1, WIDTH) for tap in module.taps} for name in module.reads if name.endswith(".cls")
        },
    }
    return AlignInputs(**{**values, **changes})
