"""How a model is moved to the points of a step, and how the update is kept: the mechanism below the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim.directions import Address, Directions, Factors
from zo_lightning.optim.displacement import Displacement
from zo_lightning.optim.geometry import Geometry, make_geometry
from zo_lightning.optim.sampling import Sampler
from zo_lightning.optim.shown import Shown
from zo_lightning.optim.step_rules import StepReport
from zo_lightning.optim.updates import Update

__all__ = ["Path", "Point", "Setting"]


@dataclass(frozen=True)
class Point:
    """A point ``x + τ u_query`` of a step; τ = 0 is x itself."""

    query: int = 0
    tau: float = 0.0


@dataclass
class Setting:
    """What a path knows of its optimizer.

    Attributes:
        groups: The optimizer's parameter groups: plain data that others may change between steps.
        directions: The family of directions.
        update: The update rule.
        state: The optimizer's state by parameter.
        sampler: What shapes the directions, if anything does.
    """

    groups: list[dict[str, Any]]
    directions: Directions
    update: Update
    state: Mapping[Any, dict[str, Any]]
    sampler: Sampler | None = None

    @property
    def head(self) -> dict[str, Any]:
        """The group from which what is one for all is read."""
        return self.groups[0]

    def address(self, name: str, query: int) -> Address:
        """What the direction of the parameter ``name`` is drawn for in the coming step."""
        return Address(self.head["seed"], self.head["step"], name, query)

    def needs_scale(self, geometry: Geometry) -> bool:
        """Whether a direction needs the Euclidean norm of the whole group's."""
        return geometry.coupled if self.update.oracle else self.directions.coupled

    def family(self, query: int) -> Directions:
        """The directions that a query is one of: negative ones are those along which a step rule measures."""
        return (self.directions.whole() or self.directions) if query < 0 else self.directions

    @property
    def shaper(self) -> Sampler | None:
        """The sampler, if directions have to go through it."""
        return self.sampler if self.sampler is not None and self.sampler.shapes else None

    def memory(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, for what keeps one; else a dictionary that nobody keeps."""
        return self.state[parameter] if self.update.remembers or self.sampler is not None else {}

    def members(self) -> Iterator[tuple[int, Geometry, str, nn.Parameter, float]]:
        """Number and geometry of the group, name, parameter and unit of length, group by group."""
        for index, group in enumerate(self.groups):
            geometry = geometry_of(group)
            units = group["units"] or [1.0] * len(group["params"])
            for name, parameter, unit in zip(group["param_names"], group["params"], units, strict=True):
                yield index, geometry, name, parameter, unit


class Path(ABC):
    """Moves a model along directions and applies the update.

    Attributes:
        setting: What the path knows of its optimizer.
        displacement: Where the weights are shown.
        dirty: Whether an update is pending, that is, not yet written into the weights.
        version: Grows with every change of a pending update.
    """

    dirty: bool = False
    version: int = 0

    def __init__(self, setting: Setting, displacement: Displacement) -> None:
        self.setting = setting
        self.displacement = displacement

    @property
    def stackable(self) -> bool:
        """Whether several points can be shown in one forward: not where a parameter is moved in place."""
        return self.displacement.module is not None and not self.displacement.in_place

    @contextmanager
    def show(self, points: Sequence[Point]) -> Iterator[None]:
        """Within this context forward passes see the weights at ``points``, one for each part of the batch."""
        with self.displacement.at(self.stand_ins(points)):
            yield

    def begin(self) -> None:  # noqa: B027 (optional)
        """A step begins."""

    @abstractmethod
    def stand_ins(self, points: Sequence[Point]) -> Mapping[nn.Parameter, Shown]:
        """The displaced weights, each with as many parts as there are points."""

    def look_ahead(self) -> None:  # noqa: B027 (optional)
        """All forwards of a step are under way, and the host has nothing to do until their losses are there."""

    @abstractmethod
    def apply(self, report: StepReport) -> None:
        """Take the step.

        Args:
            report: The directional derivatives, the directions that they are of, and the step size of each group.
        """

    # ---- pending updates: a path that writes the weights at once has none ----------------------------------------------
    def refresh(self) -> None:  # noqa: B027 (optional)
        """The weights may have been written by others."""

    def fold(self) -> None:  # noqa: B027 (optional)
        """Write the pending update into the weights."""

    @property
    def moved_away(self) -> bool:
        """Whether the weights are on another device than the pending update."""
        return False

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether an update of ``parameter`` may be pending."""
        return False

    def folded(self, parameter: nn.Parameter, device: torch.device | None = None) -> Tensor:
        """A copy of ``parameter`` as it will be when the pending update is written now, on ``device``."""
        return parameter.detach().to(device or parameter.device, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on exactly, besides the optimizer's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Go on from ``state``."""

    def end(self) -> None:  # noqa: B027 (optional)
        """A step is over, or was given up: drop what was kept of its directions."""


def sum_of_squares(parts: Iterable[Tensor | Factors]) -> Tensor:
    """The squared Euclidean norm of a direction's parts together; of factors the fresh one's, as the other is orthonormal."""
    squares = [(z.fresh if isinstance(z, Factors) else z).square().sum() for z in parts]  # one by one: parts may be drawn here
    total = squares[0]
    for square in squares[1:]:
        total = total + square.to(total.device)
    return total


def geometry_of(group: dict[str, Any]) -> Geometry:
    """The geometry of a parameter group."""
    return make_geometry(group["geometry"], group["radius"], group["transposed"])
