"""The losses that one step evaluates, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.ranks import Ranks
from zo_lightning.optim.step_rules import StepReport

__all__ = ["Evaluations", "Gathered", "cross_validated_gain"]


@dataclass
class Evaluations:
    """Losses per example (or one for the batch) at the points of a step; they stay on their device until :meth:`report`.

    Attributes:
        plus: At ``x + τ u_i``, one for each direction.
        minus: At ``x - τ u_i``; with one-sided differences only the first direction's, where the curvature is measured.
        base: At x, where it is needed.
        curve: At ``x ± τ w``, where the curvature is measured along a direction w of its own.
        curve_smoothing: τ of these.
        best: The direction that alone makes the step, and whose loss at the other side is the only one in ``minus``; None: all.
        factor: What the slopes are multiplied by for the step.
    """

    plus: list[Tensor] = field(default_factory=list)
    minus: list[Tensor] = field(default_factory=list)
    base: Tensor | None = None
    curve: list[Tensor] = field(default_factory=list)
    curve_smoothing: float = 0.0
    best: int | None = None
    factor: float = 1.0

    @property
    def count(self) -> int:
        """The number of losses at each point."""
        return self.plus[0].numel()

    def loss(self) -> Tensor:
        """The mean of the losses at the probes, a scalar."""
        return torch.stack([*self.plus, *self.minus]).mean()

    def and_those_of(self, other: Evaluations) -> Evaluations:
        """These and the losses of another part of the batch, at the same points."""

        def joined(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.cat(pair) for pair in zip(ours, theirs, strict=True)]

        return replace(
            self,
            plus=joined(self.plus, other.plus),
            minus=joined(self.minus, other.minus),
            base=None if self.base is None or other.base is None else torch.cat([self.base, other.base]),
            curve=joined(self.curve, other.curve),
        )

    def pairs(self, sides: int) -> list[tuple[Tensor, Tensor]]:
        """The losses of which each slope is a difference."""
        if self.best is not None:
            return [(self.plus[self.best], self.minus[0])]
        others = self.minus if sides == 2 else [self.base] * len(self.plus)
        return [(plus, other) for plus, other in zip(self.plus, others, strict=True) if other is not None]

    def report(self, step: int, tau: float, sides: int, ranks: Ranks) -> StepReport:
        """Bring the step's numbers to the host, in one synchronisation.

        Args:
            step: Index of the step.
            tau: Smoothing radius τ of the probes.
            sides: 2 for central differences, 1 for one-sided ones.
            ranks: The processes that take the step together.
        """
        q, span = len(self.plus), 2 * tau if sides == 2 else tau
        points = [*self.plus, *self.minus, *([] if self.base is None else [self.base]), *self.curve]
        gains = [cross_validated_gain((plus - other) / span) for plus, other in self.pairs(sides)]
        values = torch.stack([*(x.mean() for x in points), *gains]).double()
        table = ranks.gather(values) if ranks.split else ranks.mean(values, self.count).unsqueeze(0)
        rows: list[list[float]] = table.tolist()
        probes = q + len(self.minus)
        slopes: list[float] = []
        curvatures: list[float] = []
        for row in rows:
            f_plus, f_minus = row[:q], row[q:probes]
            f_base = None if self.base is None else row[probes]
            chosen = range(q) if self.best is None else [self.best]
            references = f_minus if sides == 2 else [f_base] * q
            slopes += [
                self.factor * (f_plus[i] - other) / span
                for i, other in zip(chosen, references, strict=True)
                if other is not None
            ]
            if f_base is None:
                continue
            if self.curve:
                above, below = row[probes + 1 : len(points)]
                curvatures.append((above - 2 * f_base + below) / self.curve_smoothing**2)
            elif f_minus:
                curvatures.append((f_plus[chosen[0]] - 2 * f_base + f_minus[0]) / tau**2)
        seen = [x for row in rows for x in row[:probes]]
        return StepReport(
            step=step,
            loss=sum(seen) / len(seen),
            slopes=slopes,
            gain=sum(x for row in rows for x in row[len(points) :]) / len(slopes),
            curvature=sum(curvatures) / len(curvatures) if curvatures else None,
            finite=all(math.isfinite(x) for row in rows for x in row[: len(points)]),
            queries=[] if self.best is None else [self.best],
            plus=[x for row in rows for x in row[:q]],
            minus=[x for row in rows for x in row[q:probes]],
            asked=list(range(q * len(rows))),
        )


@dataclass
class Gathered:
    """What is known of a step before it is taken, while the parts of its batch come in.

    Attributes:
        forwards: Batch losses evaluated before the first part was probed.
        want_curvature: Whether the step rule wants to know the curvature.
        multipliers: What to multiply each group's ``lr`` by.
        losses: The losses so far.
        parts: The number of parts that they are of.
    """

    forwards: int
    want_curvature: bool = False
    multipliers: list[float] = field(default_factory=list)
    losses: Evaluations = field(default_factory=Evaluations)
    parts: int = 0

    def add(self, part: Evaluations) -> None:
        """Take in the losses of a part of the batch."""
        self.losses = self.losses.and_those_of(part) if self.losses.plus else part
        self.parts += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and tensors."""
        return {**vars(self), "losses": {key: _on(value, torch.device("cpu")) for key, value in vars(self.losses).items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Gathered:
        """Go on from ``state``, with the losses on ``device``."""
        return cls(**{**state, "losses": Evaluations(**{key: _on(value, device) for key, value in state["losses"].items()})})


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [x.to(device) for x in value]
    return value.to(device) if isinstance(value, Tensor) else value


def cross_validated_gain(slopes: Tensor) -> Tensor:
    """``(1/n) Σ_i sign(ρ̄_{-i}) ρ_i``: an unbiased estimate of the gain along the chosen sign.

    With one loss for the whole batch there is nothing to leave out and |ρ| is returned, which is biased upwards.
    """
    n = slopes.numel()
    if n < 2:
        return slopes.abs().mean()
    rest = (slopes.sum() - slopes) / (n - 1)
    return (rest.sign() * slopes).mean()
