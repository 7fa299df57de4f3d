"""Probing schemes: at which points a step evaluates the loss, and which directions it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from zo_lightning.optim.evaluations import Evaluations
from zo_lightning.optim.path import Point
from zo_lightning.optim.probing import Prober
from zo_lightning.optim.updates import Update

__all__ = ["SCHEMES", "BestOf", "Conservative", "Differences", "Plan", "Scheme", "make_scheme"]


@dataclass(frozen=True)
class Plan:
    """What a step wants to know.

    Attributes:
        smoothing: τ of the probes.
        count: Number of directions q.
        sides: 2 for central differences, 1 for one-sided ones.
        first: Number of the first direction.
        curvature: Whether the second difference is wanted, and with it the loss at x.
        curve_smoothing: τ for measuring it along a direction of its own; None: along the first of the step.
        rates: Step size of each group.
    """

    smoothing: float
    count: int
    sides: int
    first: int = 0
    curvature: bool = False
    curve_smoothing: float | None = None
    rates: tuple[float, ...] = ()


class Scheme(ABC):
    """At which points a step evaluates the loss.

    Attributes:
        name: What it is called in configurations.
        whole: True where later points depend on the losses at earlier ones, so that the batch cannot come in parts, nor can
            processes have directions of their own.
        based: True where the loss at x is evaluated in every step.
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False
    based: ClassVar[bool] = False

    @abstractmethod
    def probe(self, prober: Prober, plan: Plan, update: Update) -> Evaluations:
        """Evaluate the losses.

        Args:
            prober: Evaluates points.
            plan: What the step wants to know.
            update: The update rule.
        """

    @abstractmethod
    def forwards(self, count: int, sides: int) -> int:
        """Batch losses of a step of ``count`` directions, without what it is asked for besides."""

    def check(self, update: Update, count: int, sides: int, momentum: float, weight_decay: float) -> None:  # noqa: B027
        """Refuse settings that the scheme does not work with.

        Raises:
            ValueError: If it does not.
        """


class Differences(Scheme):
    """Central differences along each direction, or one-sided ones with a shared loss at x."""

    name = "differences"

    def probe(self, prober: Prober, plan: Plan, update: Update) -> Evaluations:
        """See :meth:`Scheme.probe`."""
        seen = Evaluations()
        if plan.curvature or plan.sides == 1:
            seen.base = prober.at([Point()])[0]
        own_curve = plan.curvature and plan.curve_smoothing is not None
        signs = (1, -1) if plan.sides == 2 else (1,)
        points = [Point(plan.first + query, sign * plan.smoothing) for query in range(plan.count) for sign in signs]
        if plan.sides == 1 and plan.curvature and not own_curve:
            points.insert(1, Point(plan.first, -plan.smoothing))
        for point, values in zip(points, prober.at(points), strict=True):
            (seen.plus if point.tau > 0 else seen.minus).append(values)
        measure_curve(seen, prober, plan)
        return seen

    def forwards(self, count: int, sides: int) -> int:
        """See :meth:`Scheme.forwards`."""
        return 2 * count if sides == 2 else count + 1


class BestOf(Scheme):
    """One-sided probes along k directions, and the other side of the best one, which alone makes the step (LDSD, 2026).

    The loss at the best probe is used again, so that a step costs k + 1 forwards.
    """

    name = "best_of"
    whole = True

    def probe(self, prober: Prober, plan: Plan, update: Update) -> Evaluations:
        """See :meth:`Scheme.probe`."""
        seen = Evaluations()
        if plan.curvature:
            seen.base = prober.at([Point()])[0]
        seen.plus = prober.at([Point(query, plan.smoothing) for query in range(plan.count)])
        losses = prober.means(seen.plus)
        seen.best = min(range(plan.count), key=losses.__getitem__)
        seen.minus = prober.at([Point(seen.best, -plan.smoothing)])
        measure_curve(seen, prober, plan)
        return seen

    def forwards(self, count: int, sides: int) -> int:
        """See :meth:`Scheme.forwards`."""
        return count + 1

    def check(self, update: Update, count: int, sides: int, momentum: float, weight_decay: float) -> None:
        """See :meth:`Scheme.check`."""
        if sides != 2:
            raise ValueError(f"scheme 'best_of' takes both sides of the best direction, got sides={sides}")


class Conservative(Scheme):
    """The step, the step to the other side, or none: whichever has the lowest loss on the batch (ZO-SGD-Cons, ZO-Bench, 2024).

    A step costs 5 forwards: at ``x ± τu``, at x, and at the two places where it may end. The loss of the batch never rises, but
    for the rounding of half-precision weights.
    """

    name = "conservative"
    whole = True
    based = True

    def probe(self, prober: Prober, plan: Plan, update: Update) -> Evaluations:
        """See :meth:`Scheme.probe`."""
        if len(set(plan.rates)) > 1:
            raise ValueError(f"scheme 'conservative' needs one lr for all parameter groups, got {sorted(set(plan.rates))}")
        points = [Point(0, plan.smoothing), Point(0, -plan.smoothing)]
        plus, minus = prober.at(points)
        base = prober.at([Point()])[0]
        seen = Evaluations([plus], [minus], base)
        f_plus, f_minus, f_base = prober.means([plus, minus, base])
        slope = (f_plus - f_minus) / (2 * plan.smoothing)
        move = plan.rates[0] * update.coefficient(update.weights([slope], plan.smoothing)[0])
        seen.factor = 0.0
        if move:
            trials = prober.means(prober.at([Point(0, -move), Point(0, move)]))
            better = [(loss, -sign) for loss, sign in zip(trials, (1.0, -1.0), strict=True) if loss <= f_base]
            seen.factor = -min(better)[1] if better else 0.0
        measure_curve(seen, prober, plan)
        return seen

    def forwards(self, count: int, sides: int) -> int:
        """See :meth:`Scheme.forwards`."""
        return 5

    def check(self, update: Update, count: int, sides: int, momentum: float, weight_decay: float) -> None:
        """See :meth:`Scheme.check`."""
        if count != 1 or sides != 2 or momentum or weight_decay or not update.along:
            raise ValueError(
                "scheme 'conservative' tries steps along one direction: it needs num_directions=1, sides=2, no momentum, no "
                f"weight decay and an update along the direction, got num_directions={count}, sides={sides}, "
                f"momentum={momentum}, weight_decay={weight_decay}, update={update.name!r}"
            )


def measure_curve(seen: Evaluations, prober: Prober, plan: Plan) -> None:
    """Evaluate both sides of a direction of its own, where the curvature is to be measured along one."""
    if plan.curvature and plan.curve_smoothing is not None:
        seen.curve = prober.at([Point(-1, plan.curve_smoothing), Point(-1, -plan.curve_smoothing)])
        seen.curve_smoothing = plan.curve_smoothing


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Differences, BestOf, Conservative)}
"""The probing schemes by name."""


def make_scheme(scheme: str | Scheme) -> Scheme:
    """Return the scheme called ``scheme`` (an instance is returned as it is).

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(sorted(SCHEMES))}, got {scheme!r}")
    return SCHEMES[scheme]()
