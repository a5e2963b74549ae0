"""A plain SiT training loop, as the public code is structured: what `benchmarks/gpu.py` sets the trainer's step against.

Our own writing of the structure of SiT's and REPA's `train.py`: timm's attention (fused) and MLP, nothing compiled,
float32 master weights, autocast to bfloat16, AdamW as it comes, gradients clipped, an average updated parameter by
parameter, and the loss fetched by the host in every step. Parameters have the official names, so the trainer's weights fit.

`online` adds what REPA's loop does before each step: DINOv2-B under autocast on the images, and its projector and cosine.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.blocks import sincos_positions, sinusoid
from trainer.models.config import ModelConfig

ONLINE_DEPTH = 8  # REPA's block for XL
ENCODER = "vit_base_patch14_dinov2"


class TanhGelu(nn.GELU):
    """By its approximation, as a class that timm makes itself."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class PlainBlock(nn.Module):
    """adaLN-Zero block of timm's parts, [B, N, D]."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        from timm.layers.mlp import Mlp
        from timm.models.vision_transformer import Attention

        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, mlp_width, act_layer=TanhGelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        out: Tensor = x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)
        return out


class PlainSiT(nn.Module):
    """SiT of `cfg`'s size: x [B, C, H, W], t [B] in [0, 1], y [B] => prediction [B, C_out, H, W] and the tokens after block
    `tap` (None without one)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        width, patch = cfg.width, cfg.patch_size
        self.cfg = cfg
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(cfg.in_channels, width, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(cfg.num_classes + 1, width)})
        self.register_buffer("pos_embed", sincos_positions(width, cfg.grid), persistent=False)
        self.blocks = nn.ModuleList(PlainBlock(width, cfg.heads, cfg.mlp_width) for _ in range(cfg.depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * cfg.out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](sinusoid(t)) + self.y_embedder["embedding_table"](y)
        kept = None
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            kept = h if depth == tap else kept
        shift, scale = self.final_layer["adaLN_modulation"](c).unsqueeze(1).chunk(2, dim=2)
        normal = F.layer_norm(h, h.shape[-1:], eps=1e-6)
        out = self.final_layer["linear"](normal * (1 + scale) + shift)
        p, side = self.cfg.patch_size, self.cfg.grid
        image = out.reshape(len(x), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(x), -1, side * p, side * p), kept


class PlainLoop:
    """Model, average, optimiser and a batch that is already on the device; `step` trains once.

    online: with DINOv2-B (seeded random weights; images of 224 px) and REPA's loss. precision: bf16 or fp32.
    """

    def __init__(
        self, cfg: ModelConfig, batch: int, device: torch.device, *, online: bool = False, precision: str = "bf16"
    ) -> None:
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        self.model = PlainSiT(cfg).to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.encoder: Any = None
        self.projector: nn.Module | None = None
        trained = list(self.model.parameters())
        if online:
            import timm

            self.encoder = timm.create_model(ENCODER, img_size=224, num_classes=0).to(device).eval()
            layers = [nn.Linear(cfg.width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, 768)]
            self.projector = nn.Sequential(*layers).to(device)
            self.images = torch.randint(0, 256, (batch, 3, 224, 224), device=device, dtype=torch.uint8)
            trained += self.projector.parameters()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
        side, channels = cfg.latent_size, cfg.latent_channels
        self.moments = torch.randn(batch, 2 * channels, side, side, device=device)
        self.labels = torch.arange(batch, device=device) % cfg.num_classes
        self.loss_sum = 0.0

    def step(self) -> None:
        """One step of the optimiser, the loss fetched as the public loops do."""
        mean, logvar = self.moments.chunk(2, dim=1)
        latent = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * 0.18215
        labels = torch.where(torch.rand(len(mean), device=self.device) < 0.1, self.model.cfg.num_classes, self.labels)
        t, noise = torch.rand(len(mean), device=self.device), torch.randn_like(latent)
        times = t.reshape(-1, 1, 1, 1)
        low = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        target = None
        if self.encoder is not None:
            with torch.no_grad(), low:
                target = self.encoder.forward_features(self.images.float() / 127.5 - 1)[:, 1:]
        with low:
            tap = min(ONLINE_DEPTH, len(self.model.blocks)) if target is not None else None
            out, hidden = self.model((1 - times) * latent + times * noise, t, labels, tap=tap)
            projected = self.projector(hidden) if self.projector is not None else None
        loss = (out.float() - (noise - latent)).square().mean()
        if projected is not None and target is not None and projected.shape[1] == target.shape[1]:
            loss = loss - 0.5 * F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        self.loss_sum += loss.item()
