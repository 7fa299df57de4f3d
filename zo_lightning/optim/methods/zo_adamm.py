"""ZO-AdaMM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from zo_lightning.optim.step_rules import StepRule
from zo_lightning.optim.updates import AdaMM
from zo_lightning.optim.zeroth_order import ZerothOrder

__all__ = ["ZOAdaMM"]


class ZOAdaMM(ZerothOrder):
    """Adaptive moments of the estimates over Gaussian directions (Chen et al., 2019); see :class:`AdaMM`.

    What ZO-Bench calls by this name is Adam: without the maximum of the second moments.

    Args:
        params: See :class:`ZerothOrder`.
        lr: Learning rate η.
        smoothing: Smoothing radius ε.
        num_directions: Directions q per step.
        sides: 2 for central differences, 1 for one-sided ones.
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
        num_directions: int = 1,
        sides: int = 2,
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
            num_directions=num_directions,
            sides=sides,
            weight_decay=weight_decay,
            seed=seed,
            step_rule=step_rule,
            probes=probes,
            max_nonfinite=max_nonfinite,
        )
