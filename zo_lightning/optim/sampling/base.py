"""What learns the distribution of the directions while a run goes on."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from zo_lightning.optim.step_rules import StepReport

__all__ = ["Draw", "Sampler"]


class Draw(Protocol):
    """The random directions z of one parameter, by the number of the query."""

    def __call__(self, query: int) -> Tensor:
        """Draw z anew, from its own seed; the caller may write into it."""

    def moves(self, query: int) -> bool:
        """Whether the parameter is moved along it at all."""


class Sampler(ABC):
    """Turns a random direction z into the direction u to probe along, by what the losses have told so far.

    The hooks run in this order in a step: :meth:`begin` (again for each part of the batch, and for what is only rehearsed),
    :meth:`shape` for each parameter and probe, and in the update for each parameter :meth:`before_update`, :meth:`shape` for
    the estimate, :meth:`after_update`; at last :meth:`end`. What is learned of a parameter belongs into its ``state``, which
    the optimizer saves and resumes.

    Attributes:
        name: What it is called in messages.
        shapes: False where :meth:`shape` leaves the direction as it is, so that it can be drawn in pieces and in registers as
            without a sampler.
        wants_base: Whether every step has to evaluate the loss at x itself.
        dense: True where directions have to be dense.
        carried: Keys of a parameter's state that, for low-rank directions, are left factors: they go over to a new V.
    """

    name: ClassVar[str]
    shapes: ClassVar[bool] = True
    wants_base: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    carried: ClassVar[tuple[str, ...]] = ()

    def begin(self, groups: list[dict[str, Any]], step: int) -> None:  # noqa: B027 (optional)
        """A step begins; the ``units`` of the groups' parameters may be set.

        Args:
            groups: The optimizer's parameter groups.
            step: Index of the step.
        """

    def shape(self, z: Tensor, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        """The direction u.

        Args:
            z: The random direction's part, of the parameter's shape (of low-rank directions the left factor, transposed); its
                memory may serve for the result.
            parameter: The parameter.
            state: Its state.
        """
        return z

    def before_update(  # noqa: B027 (optional)
        self, draw: Draw, parameter: nn.Parameter, state: dict[str, Any], report: StepReport
    ) -> None:
        """Learn, before the parameter's step is formed."""

    def after_update(  # noqa: B027 (optional)
        self, draw: Draw, parameter: nn.Parameter, state: dict[str, Any], report: StepReport
    ) -> None:
        """Learn, after the parameter's step."""

    def end(self, report: StepReport) -> None:  # noqa: B027 (optional)
        """The step is over."""

    def state_dict(self) -> dict[str, Any]:
        """What is not of one parameter, as plain numbers, lists and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Go on from ``state``."""
