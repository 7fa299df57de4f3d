"""LDSD over some of the tensors, with JAGUAR's step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from zo_lightning.optim.directions import Tensors
from zo_lightning.optim.sampling import LearnedMean
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["LDSDJaguar"]


class LDSDJaguar(ZerothOrder):
    """The directions of :class:`LDSD` in a few tensors at a time, and ``x ← x - η sign(M)`` on all entries (LDSD-JAGUAR, 2026).

    M is the momentum of the tensors that were moved, and stays for the others. The mean begins at a random unit vector in each
    tensor, and learns only from directions that moved the tensor. State: the mean and M.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Step size η of each entry.
        smoothing: Smoothing radius ε.
        k: Directions that are tried.
        mean_rate: η_μ; 0 leaves only the choice of the best direction.
        sigma: σ, the standard deviation about the mean (called variance in the released code).
        momentum: β of M.
        fraction: Share of the tensors that a direction moves.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        smoothing: float = 1e-3,
        *,
        k: int = 5,
        mean_rate: float = 1e-3,
        sigma: float = 1.0,
        momentum: float = 0.9,
        fraction: float = 0.1,
        weight_decay: float = 0.0,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr,
            smoothing,
            directions=Tensors(fraction),
            update="sign",
            num_directions=k,
            scheme="best_of",
            sampler=LearnedMean(mean_rate, sigma, "unit", torch.initial_seed() if seed is None else seed),
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
