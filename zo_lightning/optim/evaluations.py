"""The losses that one step evaluates, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zo_lightning.optim.step_rules import StepReport

__all__ = ["Evaluations", "cross_validated_gain"]


@dataclass
class Evaluations:
    """Losses per example (or one for the batch) at the points of a step; they stay on their device until :meth:`report`.

    Attributes:
        plus: At ``x + τ u_i``, one for each direction.
        minus: At ``x - τ u_i``; with one-sided differences only the first direction's, where the curvature is measured.
        base: At x, where it is needed.
    """

    plus: list[Tensor] = field(default_factory=list)
    minus: list[Tensor] = field(default_factory=list)
    base: Tensor | None = None

    def report(self, step: int, tau: float, sides: int) -> StepReport:
        """Bring the step's numbers to the host, in one synchronisation.

        Args:
            step: Index of the step.
            tau: Smoothing radius τ of the probes.
            sides: 2 for central differences, 1 for one-sided ones.
        """
        q = len(self.plus)
        span = 2 * tau if sides == 2 else tau
        others = self.minus if sides == 2 else [self.base] * q
        pairs = [(plus, other) for plus, other in zip(self.plus, others, strict=True) if other is not None]
        points = [*self.plus, *self.minus, *([] if self.base is None else [self.base])]
        gains = [cross_validated_gain((plus - other) / span) for plus, other in pairs]
        values = torch.stack([*(x.mean() for x in points), *gains]).double().tolist()
        f_plus, f_minus = values[:q], values[q : q + len(self.minus)]
        f_base = None if self.base is None else values[q + len(self.minus)]
        references = f_minus if sides == 2 else [f_base] * q
        curvature = None
        if f_base is not None and f_minus:
            curvature = (f_plus[0] - 2 * f_base + f_minus[0]) / tau**2
        return StepReport(
            step=step,
            loss=sum(f_plus + f_minus) / len(f_plus + f_minus),
            slopes=[(a - b) / span for a, b in zip(f_plus, references, strict=True) if b is not None],
            gain=sum(values[len(points) :]) / q,
            curvature=curvature,
            finite=all(math.isfinite(x) for x in values[: len(points)]),
        )


def cross_validated_gain(slopes: Tensor) -> Tensor:
    """``(1/n) Σ_i sign(ρ̄_{-i}) ρ_i``: an unbiased estimate of the gain along the chosen sign.

    With one loss for the whole batch there is nothing to leave out and |ρ| is returned, which is biased upwards.
    """
    n = slopes.numel()
    if n < 2:
        return slopes.abs().mean()
    rest = (slopes.sum() - slopes) / (n - 1)
    return (rest.sign() * slopes).mean()
