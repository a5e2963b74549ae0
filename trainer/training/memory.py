"""How much memory a run will take, told before it takes any."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models import ModelConfig

# Share of what autograd would keep that a compiled step keeps: torch's partitioner computes the cheap rest anew.
COMPILED = 0.8
# Beside what autograd keeps: gradients of a block's activations, and what the allocator leaves between blocks. Measured on
# the CPU, where the estimate is with it within a fifth of the process's peak (tests/trainer/test_memory.py).
WORK = 1.25
# Decoded features: as stored values, as normalised ones, and as what a head makes of them.
COPIES_OF_TARGETS = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """What of a run decides on its memory, on one rank.

    backbone, heads, adversary: trained parameters. rows: images of a micro-batch. targets: values of the features that an
    image's alignment reads. low: whether autocast multiplies in 16 bits. ranks: that the backbone is split over (FSDP2), 1
    if it is not. keeps_gradients: they outlive a micro-batch (several of them, or DDP's buckets). averages: of the weights.
    recompute: blocks keep their input alone.
    """

    cfg: ModelConfig
    backbone: int
    heads: int = 0
    adversary: int = 0
    rows: int = 1
    targets: int = 0
    low: bool = False
    compiled: bool = False
    ranks: int = 1
    keeps_gradients: bool = False
    averages: int = 1
    recompute: bool = False


def activation_bytes(cfg: ModelConfig, *, low: bool, compiled: bool, recompute: bool = False) -> float:
    """Bytes that autograd keeps of the backbone's forward pass for one image.

    Of each token in each block, in widths D of the model: in float32 the inputs of both norms, their outputs, both
    modulated inputs, queries, keys, values, what attention gives, and what each half gives before its gate, 12 values;
    and of the MLP 2 values of its hidden width (4 where it is gated). Rotation adds 4, norms of queries and keys 3. Under
    autocast, 4 of the 12 stay float32 and what is multiplied takes 2 bytes. A compiled step keeps four fifths. Blocks that are
    computed again keep their input, and one of them all this at a time. Text tokens count as the image's, also in the last
    block, which keeps less of them.
    """
    hidden = (4 if cfg.mlp == "swiglu" else 2) * cfg.mlp_width / cfg.width
    more = (4 if cfg.rope else 0) + (3 if cfg.qk_norm else 0)
    per_value = 4 * 4 + 2 * (8 + hidden) + 3 * more if low else 4 * (12 + hidden + more)
    tokens = cfg.sequence
    block = per_value * tokens * cfg.width * (COMPILED if compiled else 1.0)
    return 4 * tokens * cfg.width * cfg.depth + block if recompute else block * cfg.depth


def estimate_bytes(size: Size) -> float:
    """Peak bytes of a rank's training, about.

    With P, H, A parameters of backbone, heads and discriminator, all float32, R ranks that share the backbone:

        weights + averages + AdamW  (4 + 4 * averages + 8) P / R  +  12 (H + A)
        gradients                   4 P / R + 4 (H + A), G
        16-bit copies of weights    2 P under autocast, for the length of a step; one block's if it is split
        activations                 1.25 rows * (backbone's, see `activation_bytes`, + 3 * targets * (2 or 4 bytes)), K
        a gathered block            8 P / depth if it is split: two of them, for the next is gathered meanwhile

    Gradients arise while activations go, so the peak is the larger of G and K; their sum where gradients stay from one
    micro-batch to the next. Not in it: what the process takes before, the reader's buffers, a GPU's context and libraries'
    work spaces.
    """
    P, side = size.backbone / size.ranks, size.heads + size.adversary
    state = (12 + 4 * size.averages) * P + 12 * side
    gradients = 4 * P + 4 * side
    per_image = activation_bytes(size.cfg, low=size.low, compiled=size.compiled, recompute=size.recompute)
    per_image += COPIES_OF_TARGETS * size.targets * (2 if size.low else 4)
    kept = WORK * size.rows * per_image
    if size.low:
        kept += 2 * (size.backbone / size.cfg.depth if size.ranks > 1 else size.backbone)
    if size.ranks > 1:
        state += 8 * size.backbone / size.cfg.depth
    return state + (gradients + kept if size.keeps_gradients else max(gradients, kept))
