"""A first-order run that begins anew every few epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Restarts"]


class Restarts:
    """Takes parameters back to where they began, and lets a learning rate fall to zero in between.

    Args:
        parameters: The parameters; copies of them as they are now are kept on the CPU.
        epochs: Epochs from one restart to the next.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], epochs: int) -> None:
        self._parameters = list(parameters)
        self._start = [p.detach().cpu().clone() for p in self._parameters]
        self._epochs = epochs
        self._period = 0
        self._steps = 0  # since the last restart

    @torch.no_grad()
    def begin(self, epoch: int) -> bool:
        """Restart if ``epoch`` is of another period than the last step was; True where it was."""
        period = epoch // self._epochs
        if period == self._period:
            return False
        self._period, self._steps = period, 0
        for parameter, start in zip(self._parameters, self._start, strict=True):
            parameter.copy_(start)
        return True

    def take(self, steps_per_epoch: int) -> float:
        """Count a step; what its learning rate is multiplied by, ``1 - t/T`` with T steps from one restart to the next."""
        left = 1 - self._steps / (self._epochs * steps_per_epoch)
        self._steps += 1
        return left

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the weights to go back to are not among them, since a run that goes on loads them anew."""
        return {"period": self._period, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._period, self._steps = int(state["period"]), int(state["steps"])
