"""SubZero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import SubZeroDirections
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["SubZero"]


class SubZero(ZerothOrder):
    """ZO-SGD along ``√(mn)/r · U Z Vᵀ`` with held orthonormal U and V (SubZero, Yu et al., 2024).

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        rank: r.
        interval: Steps T₀ for which U and V are held.
        weight_decay: Decoupled weight decay.
        normalised: Steps ``η Σ ρ_i u_i / ‖ρ‖``, which a step rule can drive.
        seed: See :class:`ZerothOrder`.
        step_rule: See :class:`ZerothOrder`; needs ``normalised``.
        probes: See :class:`ZerothOrder`.
        max_nonfinite: See :class:`ZerothOrder`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        smoothing: float = 1e-3,
        *,
        rank: int = 48,
        interval: int = 1000,
        weight_decay: float = 0.0,
        normalised: bool = False,
        seed: int | None = None,
        step_rule: StepRule | None = None,
        probes: Literal["auto", "sequential", "stacked"] = "auto",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            params,
            lr,
            smoothing,
            directions=SubZeroDirections(rank, interval),
            update="unit" if normalised else "sgd",
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
