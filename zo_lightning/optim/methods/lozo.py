"""LOZO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.directions import LowRank
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["LOZO"]


class LOZO(ZerothOrder):
    """ZO-SGD along ``U Vᵀ`` with Gaussian U and V, V held for some steps (LOZO, Chen et al., 2024).

    The probe and the step of every step share U and V, also where V is drawn anew: in the released code they do not.
    Momentum is kept as a left factor and goes over to the next V by projection. Vectors move along dense Gaussian directions.

    The publication's estimate has a factor 1/r, the code behind its figures has none; nor has this.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        rank: r.
        interval: Steps ν for which V is held.
        momentum: β of a moving average of g; one left factor.
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
        rank: int = 2,
        interval: int = 50,
        momentum: float = 0.0,
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
            directions=LowRank(rank, interval, "gaussian"),
            update="unit" if normalised else "sgd",
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
