"""What an update rule is: how random directions become probes, and estimates of the gradient become steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors
from zo_lightning.optim.geometry import Geometry

__all__ = ["Update", "negative"]


class Update(ABC):
    """How random directions become probes and estimates become steps.

    Attributes:
        name: What the rule is called in configurations.
        normalised: True where a step has the length ``lr`` whatever the loss's scale, which is what the parameter-free rule
            needs.
        oracle: True where probes and steps are extreme points of the group's norm; otherwise geometry and radius play no part.
        along: True where a step of one direction without momentum is a multiple of the direction, so that no estimate of the
            gradient is formed.
        dense: True where the rule treats every entry by itself and needs dense directions.
        remembers: True where the rule keeps a state of each parameter.
        replayable: True where the slopes and ``lr`` are all that a step is a function of.
    """

    name: ClassVar[str]
    normalised: bool
    oracle: ClassVar[bool] = False
    along: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    replayable: ClassVar[bool] = True

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

    def weights(self, slopes: list[float], smoothing: float) -> list[float]:
        """The weights w of the estimate ``Σ_i w_i u_i``: by default those of the mean of ``ρ_i u_i``.

        Args:
            slopes: The directional derivatives ρ.
            smoothing: τ of the probes.
        """
        return [slope / len(slopes) for slope in slopes]

    def coefficient(self, weight: float) -> float:
        """The factor of u in a step of one direction without momentum, which needs no stored gradient.

        The step is ``-lr`` times this times u.
        """
        return weight

    @abstractmethod
    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """The step per unit of ``lr`` from an estimate of the gradient (several directions, or momentum), of its kind.

        Args:
            estimate: Of the parameter's gradient, in the parameter's unit.
            geometry: The parameter's geometry.
            scale: One over the Euclidean norm of the group's estimate, where the geometry is coupled.
            state: The parameter's state, which the rule may read and write.
        """

    def rate(self, length: float, smoothing: float, count: int) -> float:
        """The ``lr`` for which a step of ``count`` directions has the length ``length``, in the units of the directions."""
        return length

    def check(self, directions: Directions, count: int) -> None:
        """Refuse directions, or a number of them, that the rule does not work with.

        Raises:
            ValueError: If it does not.
        """
        if self.dense and directions.low_rank:
            raise ValueError(
                f"the update rule {self.name!r} treats every entry by itself, which a product U Vᵀ does not keep; use dense "
                "directions"
            )


def negative(x: Tensor | Factors) -> Tensor | Factors:
    """``-x``."""
    return x.scaled(-1.0) if isinstance(x, Factors) else -x
