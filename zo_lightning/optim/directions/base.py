"""What a family of random directions is: a pure function of (seed, step, parameter name, shape)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zo_lightning.optim.randomness import generator

__all__ = ["Address", "Directions", "Factors", "block_rows", "matrix_shape", "normal", "source_of"]

_BLOCK_CPU = 1 << 18  # entries: a megabyte, which stays in a core's cache
_BLOCK = 1 << 24  # on an accelerator every block is a kernel of its own


@dataclass(frozen=True)
class Address:
    """What a direction is a function of, besides the tensor's shape.

    Attributes:
        seed: The run's seed.
        step: Index of the optimizer step, from 0.
        name: The parameter's qualified name.
        query: Which of the step's directions; calibration uses negative numbers.
    """

    seed: int
    step: int
    name: str
    query: int = 0


@dataclass(frozen=True)
class Factors:
    """A matrix kept as the product ``left @ right.T`` of float32 factors.

    Attributes:
        left: Shape (m, r), the U of ``U Vᵀ``.
        right: Shape (n, r), the V.
        held: Which of the two is the same for all directions of a step, by default V. Its columns are orthonormal, unless
            the family says otherwise.
    """

    left: Tensor
    right: Tensor
    held: Literal["left", "right"] = "right"

    def dense(self) -> Tensor:
        """The product, of shape (m, n)."""
        return self.left @ self.right.T

    def scaled(self, factor: float | Tensor) -> Factors:
        """The factors of ``factor`` times the product."""
        return self.with_fresh(self.fresh * factor)

    @property
    def fresh(self) -> Tensor:
        """The factor that is not held."""
        return self.left if self.held == "right" else self.right

    def with_fresh(self, fresh: Tensor) -> Factors:
        """The same held factor with another one beside it."""
        return Factors(fresh, self.right) if self.held == "right" else Factors(self.left, fresh, "left")


class Directions(ABC):
    """A distribution of directions z with zero mean.

    Attributes:
        name: What the family is called in configurations.
        coupled: True where a tensor's direction is normalised over its whole parameter group, which needs a pre-pass.
        low_rank: True where matrices come as :class:`Factors` that hold V for several steps.
        factored: True where matrices come as :class:`Factors` whose held factor has orthonormal columns and is that of all
            directions of a step, without being low-rank in the sense above.
        sparse: True where entries of zero are not probed, so that an average over steps leaves them as they are.
    """

    name: ClassVar[str]
    coupled: ClassVar[bool] = False
    low_rank: ClassVar[bool] = False
    factored: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    @abstractmethod
    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """Draw the part of the direction that belongs to one parameter.

        Args:
            address: What the draw is for.
            shape: Shape of the parameter.
            device: Device of the parameter.

        Returns:
            A float32 tensor of ``shape``, or factors of the parameter seen as a matrix (see :func:`matrix_shape`).
        """

    def signature(self) -> str:
        """The family and its settings in one string: equal signatures and addresses give equal directions."""
        return self.name

    def prepare(self, shapes: Mapping[str, torch.Size]) -> None:  # noqa: B027 (optional)
        """Learn the names and shapes of the parameters, for a family that chooses among them or their entries."""

    def moves(self, address: Address) -> bool:
        """Whether the direction moves this parameter at all; only a sparse family is asked."""
        return True

    @property
    def density(self) -> float:
        """The share of the entries that one direction moves."""
        return 1.0

    @property
    def densest(self) -> float:
        """The largest such share that a parameter has, on average."""
        return self.density

    def whole(self) -> Directions | None:
        """Directions that move every entry by as much, along which a step rule measures; None: these do."""
        return None


def block_rows(shape: torch.Size, device: torch.device) -> int:
    """How many rows of a parameter, seen as a matrix, are drawn from one generator."""
    entries = _BLOCK_CPU if device.type == "cpu" else _BLOCK
    return max(1, entries // max(1, matrix_shape(shape)[1]))


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix: its first dimension by all others; a scalar is 1 by 1."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def source_of(address: Address, part: str, device: torch.device) -> torch.Generator:
    """The generator of one part of a draw."""
    return generator(address.seed, address.step, address.query, address.name, part, device=device)


def normal(shape: torch.Size, source: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal numbers in float32."""
    return torch.randn(shape, generator=source, dtype=torch.float32, device=device)
