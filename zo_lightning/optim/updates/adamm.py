"""Adaptive moments of the estimates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_lightning.optim.directions import Factors
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.updates.sgd import SGD

__all__ = ["AdaMM"]


class AdaMM(SGD):
    """Steps along the first moment over the root of the largest second one (ZO-AdaMM, Chen et al., 2019).

    Entry by entry::

        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
        v̂ ← max(v̂, v)                x ← x - η m / (√v̂ + ε)

    without bias correction. The state is m, v and v̂, in float32.

    Args:
        beta1: β₁, in [0, 1).
        beta2: β₂, in [0, 1).
        eps: ε, > 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "adamm"
    normalised = True
    along = False
    dense = True
    remembers = True

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-10) -> None:
        for key, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{key} must be in [0, 1), got {beta}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        assert isinstance(estimate, Tensor)
        if "first_moment" not in state:
            for key in ("first_moment", "second_moment", "largest_second_moment"):
                state[key] = torch.zeros_like(estimate)
        m, v, largest = state["first_moment"], state["second_moment"], state["largest_second_moment"]
        m.mul_(self.beta1).add_(estimate, alpha=1 - self.beta1)
        v.mul_(self.beta2).addcmul_(estimate, estimate, value=1 - self.beta2)
        torch.maximum(largest, v, out=largest)
        return -m / (largest.sqrt() + self.eps)
