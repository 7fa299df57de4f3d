"""ZO-SignSGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["ZOSignSGD"]


class ZOSignSGD(ZerothOrder):
    """``x ← x - η sign(g)`` with ``g = mean_i ρ_i z_i`` over Gaussian directions (Liu et al., 2019).

    The sign is that of each entry, not of ρ alone as in ZO-Bench's code, whose step is ``sign(ρ) z``.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Step size η of each entry.
        smoothing: Smoothing radius ε.
        num_directions: Directions q per step.
        sides: 2 for central differences, 1 for one-sided ones.
        momentum: β of a moving average of g; one float32 buffer.
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
        num_directions: int = 1,
        sides: int = 2,
        momentum: float = 0.0,
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
            update="sign",
            num_directions=num_directions,
            sides=sides,
            momentum=momentum,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
