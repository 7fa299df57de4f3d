"""Steps along the estimate itself, with its length, with a length of one, or in units of the losses' spread."""

from __future__ import annotations

import math
import statistics
from typing import Any

from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.updates.base import Update, negative

__all__ = ["SGD", "Standardised", "Unit"]


class SGD(Update):
    """Plain steps ``x ← x - η estimate`` (MeZO, Malladi et al., 2023): probes along z itself, scaled by the slope."""

    name = "sgd"
    normalised = False

    def probe(self, z: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """See :meth:`Update.probe`."""
        if scale is None:
            return z
        return z.scaled(scale) if isinstance(z, Factors) else z * scale

    def multiple(self, directions: Directions, geometry: Geometry) -> float | None:
        """See :meth:`Update.multiple`."""
        return None if directions.coupled else 1.0

    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        return negative(estimate)


class Unit(SGD):
    """Steps ``x ← x - γ Σ_i ρ_i u_i / ‖ρ‖₂``: those of :class:`SGD` with the size of the slopes divided out.

    Along one direction that is ``γ sign(ρ) u``. For directions of equal curvature that are nearly orthogonal, as random ones in
    many dimensions are, the curvature along the step is that along any of them: what the parameter-free rule measures. It is
    this project's way to let the rule drive a method whose steps are not normalised.
    """

    name = "unit"
    normalised = True

    def weights(self, slopes: list[float], smoothing: float) -> list[float]:
        """See :meth:`Update.weights`."""
        length = math.hypot(*slopes)
        return [slope / length for slope in slopes] if length > 0 else slopes


class Standardised(SGD):
    """Steps ``x ← x - η/(τ q σ) Σ_i (f_i - f) u_i`` with σ the standard deviation of the probes' losses (FZOO, 2025).

    With one-sided slopes ``ρ_i = (f_i - f)/τ`` that is ``w_i = ρ_i / (q σ)``, and ``σ = τ std(ρ)``, since f is the same for
    all. The deviation has q - 1 in its denominator.
    """

    name = "standardised"
    normalised = True
    replayable = False

    def weights(self, slopes: list[float], smoothing: float) -> list[float]:
        """See :meth:`Update.weights`; zeros where all losses are equal."""
        sigma = smoothing * statistics.stdev(slopes)
        return [slope / (len(slopes) * sigma) if sigma > 0 else 0.0 for slope in slopes]

    def rate(self, length: float, smoothing: float, count: int) -> float:
        """See :meth:`Update.rate`; slopes of zero mean have ``‖w‖₂ = 1/(τ √q)`` but for the deviation's denominator."""
        return length * smoothing * math.sqrt(count)

    def check(self, directions: Directions, count: int) -> None:
        """See :meth:`Update.check`."""
        super().check(directions, count)
        if count < 2:
            raise ValueError(f"the spread of the losses needs at least 2 directions per step, got num_directions={count}")
