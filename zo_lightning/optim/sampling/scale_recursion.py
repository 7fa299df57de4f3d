"""What the scales of ZO Fine-tuner are a function of, and what makes a perturbation of them as long as MeZO's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments", "ScaleHistory", "moments", "normaliser", "weights_of"]

Moments = list[tuple[float, float]]
"""Mean and variance of each tensor."""

_CHUNK = 1 << 24  # entries that are widened to float32 at a time
# "embed" is what the released code looks for; the others are GPT-2's names
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.")


@dataclass
class ScaleHistory:
    """What the next scales depend on besides the weights, for P parameter tensors.

    Attributes:
        sigma: σ_{j,t-1}; at first 1.
        plus: L⁺_{t-1}, the loss at x + εu; at first 0.
        minus: L⁻_{t-1}, that at x - εu.
    """

    sigma: list[float] = field(default_factory=list)
    plus: float = 0.0
    minus: float = 0.0

    @classmethod
    def begin(cls, count: int) -> ScaleHistory:
        """That of the first step."""
        return cls([1.0] * count)

    def inputs(self, statistics: Moments) -> Tensor:
        """The networks' inputs ``s_j = (mean x_j, var x_j, L⁺, L⁻, σ_j)``, shape (P, 5), float64 on the CPU."""
        rows = [
            (mean, variance, self.plus, self.minus, sigma)
            for (mean, variance), sigma in zip(statistics, self.sigma, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {"sigma": list(self.sigma), "plus": self.plus, "minus": self.minus}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ScaleHistory:
        """Go on from ``state``."""
        return cls(list(state["sigma"]), float(state["plus"]), float(state["minus"]))


@torch.no_grad()
def moments(parameters: Sequence[Tensor]) -> Moments:
    """Mean and unbiased variance of each tensor, in float32 or wider, brought to the host in one synchronisation per device.

    The released code synchronises for each tensor. Tensors are looked at in pieces, so that those of half precision are never
    whole in float32; the pieces' moments are joined in float64 (Chan et al., 1979), since sums of squares would lose the
    variance of a tensor that is nearly constant, as the weights of a LayerNorm are. A single entry has the variance zero.
    """
    found: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    for index, parameter in enumerate(parameters):
        if not parameter.numel():
            continue
        for piece in parameter.detach().reshape(-1).split(_CHUNK):
            wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
            pair = torch.stack(torch.var_mean(wide, correction=0)).double()
            found.setdefault(parameter.device, []).append((index, piece.numel(), pair))
    parts: list[list[tuple[int, float, float]]] = [[] for _ in parameters]
    for entries in found.values():
        values = torch.stack([pair for _, _, pair in entries]).tolist()
        for (index, count, _), (variance, mean) in zip(entries, values, strict=True):
            parts[index].append((count, mean, variance))
    return [_joined(pieces) for pieces in parts]


def _joined(pieces: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    total = sum(count for count, _, _ in pieces)
    if not total:
        return 0.0, 0.0
    mean = sum(count * average for count, average, _ in pieces) / total
    squares = sum(count * (variance + (average - mean) ** 2) for count, average, variance in pieces)
    return mean, squares / (total - 1) if total > 1 else 0.0


def weights_of(names: Sequence[str], parameters: Sequence[Tensor], embedding_rows: int | None = None) -> list[float]:
    """w_j, what a tensor counts in the normaliser: the number of its entries.

    Args:
        names: The names of the parameters.
        parameters: The parameters.
        embedding_rows: How many rows of an embedding count, because a batch looks up few of them; None for all. The released
            code takes 15 · batch size · processes.
    """
    return [
        float(p.numel() if embedding_rows is None or p.dim() != 2 or not _EMBEDDING.search(name) else _rows(p, embedding_rows))
        for name, p in zip(names, parameters, strict=True)
    ]


def _rows(table: Tensor, rows: int) -> int:
    return min(rows, table.shape[0]) * table.shape[1]


def normaliser(weights: Sequence[float], sigma: Sequence[float]) -> float:
    """``N = √(Σ w_j) / √(Σ w_j σ_j²)``, with which ``E Σ_j w_j N² σ_j²`` is that of σ = 1: exactly 1 for σ = 1.

    Raises:
        ValueError: If all scales are zero, or one is not finite.
    """
    square = math.fsum(w * s * s for w, s in zip(weights, sigma, strict=True))
    if not (square > 0 and math.isfinite(square)):
        raise ValueError(
            f"the scales cannot be normalised: Σ w σ² is {square}, with σ from {min(sigma)} to {max(sigma)}; use other networks"
        )
    return math.sqrt(math.fsum(weights)) / math.sqrt(square)
