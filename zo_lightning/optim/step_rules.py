"""Step rules: who decides the step size and the smoothing radius, and what they learn from each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Probe", "StepReport", "StepRule"]


@dataclass
class StepReport:
    """What one step measured, as plain numbers.

    Attributes:
        step: Index of the step.
        loss: Mean of the losses at the probes.
        slopes: Directional derivatives ρ along each direction that the step is made of.
        gain: Cross-validated gain of the step per unit length: unbiased for ``E[sign ρ]·⟨∇f, u⟩`` where the closure returns
            losses per example, else ``|ρ|``.
        curvature: Signed second difference ``(f₊ - 2f + f₋)/τ²`` along the first direction, where it was asked for.
        finite: Whether every loss was; otherwise the update was skipped.
        lr: Step size γ of the update.
        rates: The same of each parameter group, schedulers included.
        smoothing: Smoothing radius τ of the probes.
        forwards: Batch losses that the step evaluated.
        began_written: Whether no update was pending when this one was taken: all of them were in the weights.
        ended_written: The same after it.
        queries: The numbers of these directions among those of the step; empty for 0, 1, ...
        plus: Mean loss at ``x + τ u`` for each direction that was asked.
        minus: The same at ``x - τ u``, where it was.
        asked: The numbers of the directions of ``plus``.
    """

    step: int
    loss: float
    slopes: list[float]
    gain: float
    curvature: float | None = None
    finite: bool = True
    lr: float = 0.0
    smoothing: float = 0.0
    forwards: int = 0
    rates: list[float] = field(default_factory=list)
    began_written: bool = True
    ended_written: bool = True
    queries: list[int] = field(default_factory=list)
    plus: list[float] = field(default_factory=list)
    minus: list[float] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @property
    def taken(self) -> list[int]:
        """The numbers of the directions that the step is made of."""
        return self.queries or list(range(len(self.slopes)))


class Probe(ABC):
    """Lets a step rule evaluate the step's batch around the current point."""

    @abstractmethod
    def loss(self) -> float:
        """Loss at the current point; one forward."""

    @abstractmethod
    def pair(self, direction: int, smoothing: float) -> tuple[float, float]:
        """Losses at ``x ± smoothing · u`` along the fresh direction number ``direction``; two forwards."""


class StepRule(ABC):
    """Sets the step size and the smoothing radius before each step.

    Attributes:
        step_size: γ for the coming step.
        smoothing: τ for the coming step.
    """

    step_size: float
    smoothing: float

    @abstractmethod
    def before_step(self, step: int, probe: Probe) -> bool:
        """Set :attr:`step_size` and :attr:`smoothing`, with forwards of ``probe`` if need be.

        Returns:
            Whether the step should measure the curvature (one forward more).
        """

    @abstractmethod
    def after_step(self, report: StepReport) -> None:
        """Learn from what the step measured."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
