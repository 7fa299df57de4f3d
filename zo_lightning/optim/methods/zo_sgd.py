"""ZO-SGD, known as MeZO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["ZOSGD"]


class ZOSGD(ZerothOrder):
    """``x ← x - η g`` with ``g = mean_i ρ_i z_i`` over Gaussian directions (MeZO, Malladi et al., 2023).

    Momentum is the moving average ``m ← β m + (1 - β) g``, so that η is 1/(1 - β) times that of heavy-ball momentum.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        num_directions: Directions q per step.
        sides: 2 for central differences, 1 for one-sided ones.
        momentum: β; one float32 buffer.
        weight_decay: Decoupled weight decay.
        normalised: Steps ``η Σ ρ_i z_i / ‖ρ‖``, which a step rule can drive.
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
        num_directions: int = 1,
        sides: int = 2,
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
            directions="gaussian",
            update="unit" if normalised else "sgd",
            num_directions=num_directions,
            sides=sides,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
