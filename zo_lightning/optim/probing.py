"""What a step rule may ask of the model around the current point."""

from __future__ import annotations

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

    def loss(self) -> float:
        """See :meth:`Probe.loss`."""
        (loss,) = self._mean(self._evaluator.at([Point()], self._path.show))
        return loss

    def pair(self, direction: int, smoothing: float) -> tuple[float, float]:
        """See :meth:`Probe.pair`."""
        # negative queries: directions that no step uses
        points = [Point(-1 - direction, smoothing), Point(-1 - direction, -smoothing)]
        plus, minus = self._mean(self._evaluator.at(points, self._path.show, stackable=self._path.stackable))
        return plus, minus

    def _mean(self, losses: list[Tensor]) -> list[float]:
        means = torch.stack([x.mean().double() for x in losses])
        values: list[float] = self._ranks.mean(means, losses[0].numel()).tolist()
        return values
