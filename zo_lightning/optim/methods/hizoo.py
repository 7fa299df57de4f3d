"""HiZOO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.sampling import DiagonalHessian
from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["HiZOO"]


class HiZOO(ZerothOrder):
    """ZO-SGD along ``z/√H`` with a running estimate H of the Hessian's diagonal (HiZOO, Zhao et al., 2024).

    See :class:`DiagonalHessian`. Three forwards per step; one float32 number per weight.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        alpha: α, the weight of the newest curvature.
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
        alpha: float = 1e-8,
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
            sampler=DiagonalHessian(alpha),
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
