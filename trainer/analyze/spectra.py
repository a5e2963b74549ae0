"""Spectra of representations: how many directions carry their energy."""

from __future__ import annotations

import torch
from torch import Tensor

from featcache.errors import UserError


class Spectrum:
    """Singular values of a tall matrix [m, D] that is seen chunk by chunk; memory is D x D float64."""

    def __init__(self, *, centred: bool = True) -> None:
        self._centred = centred
        self._rows = 0
        self._gram: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Rows [m, D]."""
        x = rows.double()
        gram, total = x.T @ x, x.sum(dim=0)
        if self._gram is None or self._sum is None:
            self._gram, self._sum = gram, total
        else:
            self._gram, self._sum = self._gram + gram, self._sum + total
        self._rows += len(x)

    def singular_values(self) -> Tensor:
        """float64 [D], descending, of the rows seen so far (minus their mean, if centred)."""
        assert self._gram is not None and self._sum is not None, "no rows were added"
        gram = self._gram
        if self._centred:
            gram = gram - torch.outer(self._sum, self._sum) / self._rows
        values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).sqrt()
        return values


def energy(singular_values: Tensor) -> Tensor:
    """Share of the squared singular values in the first 1, 2, ... of them, [D] -> [D] in (0, 1]."""
    squares = singular_values.square()
    total = squares.sum()
    if not total > 0:
        raise UserError("the representation is constant: it has no spectrum", remedy="Look at another block or time.")
    return squares.cumsum(0) / total


def effective_rank(singular_values: Tensor) -> float:
    """`exp` of the entropy of the normalised singular values (Roy & Vetterli 2007): 1 to D."""
    p = singular_values / singular_values.sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def self_similarity(tokens: Tensor, patch: int) -> Tensor:
    """Cosine of one patch with all patches of its image (SARA, Fig. 2a). [B, N, D] -> float32 [B, N].

    Raises:
        UserError: there is no such patch.
    """
    _, N, _ = tokens.shape
    if not 0 <= patch < N:
        raise UserError(f"there is no patch {patch} among {N}", remedy=f"Choose 0 to {N - 1}.")
    return torch.nn.functional.cosine_similarity(tokens.float(), tokens[:, patch : patch + 1].float(), dim=-1)
