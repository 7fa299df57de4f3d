"""LDSD with adaptive moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.sampling import LearnedMean
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.updates import AdaMM
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["LDSDAdaMM"]


class LDSDAdaMM(ZerothOrder):
    """The directions of :class:`LDSD`, and the step of :class:`AdaMM` (LDSD-AdaMM, 2026). State: the mean and three moments.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        k: Directions that are tried.
        mean_rate: η_μ; 0 leaves only the choice of the best direction.
        sigma: σ, the standard deviation about the mean (called variance in the released code).
        beta1: β₁ of the first moment.
        beta2: β₂ of the second moment.
        eps: Added to the root of the second moment.
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
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-10,
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
            directions="gaussian",
            update=AdaMM(beta1, beta2, eps),
            num_directions=k,
            scheme="best_of",
            sampler=LearnedMean(mean_rate, sigma),
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
