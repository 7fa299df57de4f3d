"""Several processes that take one step together: what they tell each other is a few numbers per step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Alone", "Ranks"]


class Ranks(ABC):
    """The processes of a run; each evaluates the losses of its own part of the batch.

    They hold the same weights and draw the same directions, so that the losses at the probes are all that they need to share.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        split: Whether each probes along directions of its own: a step then averages over ``size`` times as many.
    """

    rank: int
    size: int
    split: bool

    @abstractmethod
    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, shape (size, k), the same on each; ``values`` has shape (k,), float64."""

    def mean(self, values: Tensor, weight: int) -> Tensor:
        """The mean over the processes.

        Args:
            values: Shape (k,), float64.
            weight: Of this process, the number of its losses: the mean is that of the joint batch.
        """
        if self.size == 1:
            return values
        table = self.gather(torch.cat([values, values.new_tensor([weight])]))
        shares = table[:, -1:] / table[:, -1].sum()
        # no matrix product, whose last bit may depend on where in memory each process has the table
        return (table[:, :-1] * shares).sum(0)


class Alone(Ranks):
    """One process."""

    rank, size, split = 0, 1, False

    def gather(self, values: Tensor) -> Tensor:
        """See :meth:`Ranks.gather`."""
        return values.unsqueeze(0)
