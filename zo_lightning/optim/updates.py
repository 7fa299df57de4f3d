"""Update rules: what a step does with the estimated gradient, and along which unit its probes go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors
from zo_lightning.optim.geometry import Geometry

__all__ = ["LMO", "SGD", "UPDATES", "Update", "make_update"]


class Update(ABC):
    """How random directions become probes and estimates become steps.

    Attributes:
        name: What the rule is called in configurations.
        normalised: True where a step has the length ``lr`` in the group's norm whatever the loss's scale, which is what the
            parameter-free rule needs.
    """

    name: ClassVar[str]
    normalised: ClassVar[bool]

    @abstractmethod
    def probe(self, z: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """The direction u to probe along, from the random direction z.

        Args:
            z: The random direction's part for one parameter.
            geometry: The parameter's geometry.
            scale: One over the Euclidean norm of z over the group, where the directions or the geometry are coupled.
        """

    def probe_(self, z: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
        """:meth:`probe` of a dense z whose memory may serve for the result."""
        u = self.probe(z, geometry, scale)
        assert isinstance(u, Tensor)
        return u

    @abstractmethod
    def multiple(self, directions: Directions, geometry: Geometry) -> float | None:
        """The number f for which the probe is f times z whatever z, or None if there is none."""

    @abstractmethod
    def coefficient(self, slope: float) -> float:
        """The factor of u in a step of one direction without momentum, which needs no stored gradient.

        The step is ``-lr`` times this times u.
        """

    @abstractmethod
    def step(self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """The step per unit of ``lr`` from an estimate of the gradient (several directions, or momentum), of its kind."""


class LMO(Update):
    """Steps of unit norm: ``x ← x + γ lmo(estimate)``, probes along ``u = -lmo(z)`` (docs/adanaged.md)."""

    name = "lmo"
    normalised = True

    def probe(self, z: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """See :meth:`Update.probe`."""
        return geometry.extreme_point(z, scale)

    def probe_(self, z: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
        """See :meth:`Update.probe_`."""
        return super().probe_(z, geometry, scale) if geometry.coupled else geometry.extreme_point_(z)

    def multiple(self, directions: Directions, geometry: Geometry) -> float | None:
        """See :meth:`Update.multiple`; the sign of ±1 is itself."""
        return geometry.radius if geometry.name == "sign" and directions.name == "rademacher" else None

    def coefficient(self, slope: float) -> float:
        """See :meth:`Update.coefficient`; ``-lmo(ρ u) = sign(ρ) u`` for a unit extreme point u."""
        return float((slope > 0) - (slope < 0))

    def step(self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        return _negative(geometry.extreme_point(estimate, scale))


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

    def coefficient(self, slope: float) -> float:
        """See :meth:`Update.coefficient`."""
        return slope

    def step(self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None) -> Tensor | Factors:
        """See :meth:`Update.step`."""
        return _negative(estimate)


def _negative(x: Tensor | Factors) -> Tensor | Factors:
    return x.scaled(-1.0) if isinstance(x, Factors) else -x


UPDATES: dict[str, type[Update]] = {rule.name: rule for rule in (LMO, SGD)}
"""The update rules by name."""


def make_update(update: str | Update) -> Update:
    """Return the update rule called ``update`` (an instance is returned as it is).

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(update, Update):
        return update
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(sorted(UPDATES))}, got {update!r}")
    return UPDATES[update]()
