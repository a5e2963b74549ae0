"""SRA: self-representation alignment with the model's own EMA at a lower noise level (Jiang et al., 2025).

Reads nothing from the cache; taps one early block and asks the EMA teacher for a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from featcache.errors import UserError
from featcache.settings import Count, NotNegative, Positive, Share, settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.heads import mlp, tap_depth
from trainer.align.losses import negative_cosine, smooth_l1
from trainer.models.config import takes_text

Loss = Literal["smooth-l1", "cosine"]
Interval = Literal["uniform", "fixed"]

STUDENT_DEPTHS = {"B": 3, "L": 6, "XL": 8}
TEACHER_DEPTHS = {"SiT": {"B": 8, "L": 16, "XL": 20}, "DiT": {"B": 7, "L": 14, "XL": 16}}
TEXT_DEPTHS = {"L": 8}, {"L": 16}  # of MMDiT: the paper says "without any tuning", the blocks are ours


@settings(where="sra")
class SraConfig:
    """Options of SRA.

    student_depth, teacher_depth: blocks (1-based) m -> n; None: SiT 3 -> 8 (B), 6 -> 16 (L), 8 -> 20 (XL),
        DiT 8 -> 16 (XL), in proportion elsewhere. The paper's numbers for L and for DiT-B and L are not
        legible in our copy: 6 -> 16, 3 -> 7 and 6 -> 14 (DiT-XL's share of the blocks) are ours. MMDiT-L 8 -> 16 (ours).
    interval: largest lead of the teacher in t: it sees `t' = max(t - k, 0)`. The paper gives 0.2 for SiT;
        its value for DiT is not legible in our copy, so that we use 0.2 there, too.
    interval_kind: `uniform`, k ~ U(0, interval) per sample; `fixed`, k = interval (ablation).
    weight: lambda.
    loss: `smooth-l1` or `cosine` over channels.
    beta: of smooth L1.
    head: whether the student passes a two-layer MLP with SiLU; without it hidden states are compared as
        they are (ablation).
    head_ratio: inner width of the MLP in multiples of the backbone's: 2 in the authors' code.
    head_width: that width itself; None: as head_ratio says.
    """

    student_depth: Count | None = None
    teacher_depth: Count | None = None
    interval: Share = 0.2
    interval_kind: Interval = "uniform"
    weight: NotNegative = 0.2
    loss: Loss = "smooth-l1"
    beta: Positive = 0.05
    head: bool = True
    head_ratio: Positive = 2.0
    head_width: Count | None = None

    def required(self) -> tuple[str, ...]:
        return ()

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        return ()


class Sra(Alignment):
    """`L = weight * smooth_l1(head(h_m(x_t)), h'_n(x_t'))`, h' the EMA model, mean over all entries.

    The teacher gets the same image, noise and (already dropped) labels, runs only its first n blocks and has
    no gradient; both are the trainer's part (`AlignInputs.teacher`). The cosine is taken over channels.
    """

    needs_teacher = True

    def __init__(self, config: SraConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        teacher_depths = TEACHER_DEPTHS["DiT" if info.name.startswith("DiT") else "SiT"]
        student_depths = STUDENT_DEPTHS
        if takes_text(info.name):
            student_depths, teacher_depths = TEXT_DEPTHS
        self.student_depth = tap_depth("sra", config.student_depth, student_depths, info)
        self.teacher_depth = tap_depth("sra", config.teacher_depth, teacher_depths, info)
        if self.teacher_depth < self.student_depth:
            raise UserError(
                f"sra: teacher block {self.teacher_depth} lies before student block {self.student_depth}",
                remedy="Choose teacher_depth above student_depth.",
            )
        self.taps = (self.student_depth,)
        self.head: nn.Module = nn.Identity()
        if config.head:
            hidden = config.head_width or max(1, round(config.head_ratio * info.width))
            self.head = mlp(info.width, info.width, depth=2, hidden=hidden)

    def teacher_time(self, inputs: AlignInputs) -> Tensor:
        """`t' = max(t - k, 0)`, [B] float32."""
        k = self.config.interval * inputs.uniform if self.config.interval_kind == "uniform" else self.config.interval
        return (inputs.t - k).clamp(min=0)

    def pair(self, inputs: AlignInputs) -> tuple[Tensor, Tensor]:
        """Projected student and teacher, [B, N, D] each."""
        assert inputs.teacher is not None, "sra sets needs_teacher: the trainer must provide the EMA model"
        target = inputs.teacher(self.teacher_time(inputs), self.teacher_depth).detach()
        return self.head(inputs.hidden[self.student_depth]), target

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        p, y = self.pair(inputs)
        loss = negative_cosine(p, y) if self.config.loss == "cosine" else smooth_l1(p, y, self.config.beta)
        return {self.config.loss: self.config.weight * loss}

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {"similarity": cosine_per_token(*self.pair(inputs)).mean()}
