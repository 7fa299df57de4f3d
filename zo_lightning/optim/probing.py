"""What a step rule may ask of the model around the current point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.optim.evaluator import Evaluator
from zo_lightning.optim.path import Path, Point
from zo_lightning.optim.ranks import Ranks
from zo_lightning.optim.step_rules import Probe

__all__ = ["Prober"]


class Prober(Probe):
    """Losses at and around the current point, of all processes together.

    Args:
        path: Moves the model.
        evaluator: Evaluates the batch of this process.
        ranks: The processes.
    """

    def __init__(self, path: Path, evaluator: Evaluator, ranks: Ranks) -> None:
        self._path, self._evaluator, self._ranks = path, evaluator, ranks

    def at(self, points: Sequence[Point]) -> list[Tensor]:
        """Losses of this process's batch at each point; several in one forward where that is possible."""
        return self._evaluator.at(points, self._path.show, stackable=self._path.stackable)

    def means(self, losses: list[Tensor]) -> list[float]:
        """Their means over the joint batch, as plain numbers."""
        means = torch.stack([x.mean().double() for x in losses])
        values: list[float] = self._ranks.mean(means, losses[0].numel()).tolist()
        return values

    def loss(self) -> float:
        """See :meth:`Probe.loss`."""
        (loss,) = self.means(self.at([Point()]))
        return loss

    def pair(self, direction: int, smoothing: float) -> tuple[float, float]:
        """See :meth:`Probe.pair`."""
        # negative queries: directions that no step uses
        plus, minus = self.means(self.at([Point(-1 - direction, smoothing), Point(-1 - direction, -smoothing)]))
        return plus, minus
