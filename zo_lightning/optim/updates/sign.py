"""Steps along the sign of the estimate's entries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_lightning.optim.directions import Factors
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.updates.sgd import SGD

__all__ = ["Sign"]


class Sign(SGD):
    """``x ← x - η sign(estimate)`` entry by entry, with probes along z itself.

    With Gaussian directions ZO-SignSGD (Liu et al., 2019); with momentum over sparse directions JAGUAR SignSGD (2025), where
    every entry moves at every step by the sign of what is remembered of it. An entry of zero stays.
    """

    name = "sign"
    normalised = True
    along = False
    dense = True

    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        assert isinstance(estimate, Tensor)
        return -estimate.sign()
