"""FZOO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["FZOO"]


class FZOO(ZerothOrder):
    """One-sided probes along ±1 directions, and steps in units of the losses' standard deviation (FZOO, 2025).

    See :class:`Standardised`.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        num_directions: Directions q per step, which cost q + 1 forwards; at least 2.
        weight_decay: Decoupled weight decay.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        smoothing: float = 1e-3,
        *,
        num_directions: int = 8,
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
            directions="rademacher",
            update="standardised",
            num_directions=num_directions,
            sides=1,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
