"""HiZOO: directions scaled by an estimate of the Hessian's diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim.sampling.base import Draw, Sampler
from zo_lightning.optim.step_rules import StepReport

__all__ = ["DiagonalHessian"]


class DiagonalHessian(Sampler):
    """Directions ``u = z/√H`` with a running estimate of the Hessian's diagonal (HiZOO, Zhao et al., 2024).

    The rule is::

        H ← (1 - α) H + α |f₊ + f₋ - 2 f| / (2 ε²) · H z²          x ← x - η ρ z/√H

    H begins at one. Its logarithm is kept, in float32 whatever the weights' dtype: beside one the increments of a small α would
    be lost in half precision, and often in float32 too, and H would stay one for ever. The step is taken with the new H.

    Args:
        alpha: α, the weight of the newest curvature, in [0, 1).

    Raises:
        ValueError: If ``alpha`` is out of its range.
    """

    name = "diagonal_hessian"
    wants_base = True
    dense = True

    def __init__(self, alpha: float = 1e-8) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {alpha}")
        self.alpha = alpha

    def shape(self, z: Tensor, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        """See :meth:`Sampler.shape`."""
        return z.mul_(torch.exp(state["log_hessian"] * -0.5)) if "log_hessian" in state else z

    def before_update(self, draw: Draw, parameter: nn.Parameter, state: dict[str, Any], report: StepReport) -> None:
        """See :meth:`Sampler.before_update`."""
        assert report.curvature is not None
        z = draw(report.taken[0])
        if "log_hessian" not in state:
            state["log_hessian"] = torch.zeros_like(z)
        # (1 - α) + α |c| z²/2, of which the logarithm is added
        state["log_hessian"].add_(z.square_().mul_(self.alpha * abs(report.curvature) / 2).sub_(self.alpha).log1p_())
