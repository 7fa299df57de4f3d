"""Steps of unit norm along the linear minimisation oracle of each group's norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.updates.base import Update, negative

__all__ = ["LMO"]


class LMO(Update):
    """Steps of unit norm: ``x ← x + γ lmo(estimate)``, probes along ``u = -lmo(z)`` (docs/adanaged.md)."""

    name = "lmo"
    normalised = True
    oracle = True

    def probe(self, z: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """See :meth:`Update.probe`."""
        return geometry.extreme_point(z, scale)

    def probe_(self, z: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
        """See :meth:`Update.probe_`."""
        return super().probe_(z, geometry, scale) if geometry.coupled else geometry.extreme_point_(z)

    def multiple(self, directions: Directions, geometry: Geometry) -> float | None:
        """See :meth:`Update.multiple`; the sign of ±1 is itself."""
        return geometry.radius if geometry.name == "sign" and directions.name == "rademacher" else None

    def coefficient(self, weight: float) -> float:
        """See :meth:`Update.coefficient`; ``-lmo(ρ u) = sign(ρ) u`` for a unit extreme point u."""
        return float((weight > 0) - (weight < 0))

    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        return negative(geometry.extreme_point(estimate, scale))
