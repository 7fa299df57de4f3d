"""Families of random directions, each a pure function of (seed, step, parameter name, shape).

A direction is drawn tensor by tensor in float32, never for the whole model at once, and drawn again where it is needed:
for the probe at ``+τ``, for the probe at ``-τ`` and for the update.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_lightning.optim import kernels
from zo_lightning.optim.kernels import Kind
from zo_lightning.optim.randomness import generator, in_parallel, stable_seed

__all__ = [
    "DIRECTIONS",
    "Address",
    "Dense",
    "Directions",
    "Factors",
    "Gaussian",
    "LowRank",
    "Rademacher",
    "Sphere",
    "block_rows",
    "make_directions",
]


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
        right: Shape (n, r), the V, with orthonormal columns.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The product, of shape (m, n)."""
        return self.left @ self.right.T

    def scaled(self, factor: float | Tensor) -> Factors:
        """The factors of ``factor`` times the product."""
        return Factors(self.left * factor, self.right)


class Directions(ABC):
    """A distribution of directions z with zero mean.

    Attributes:
        name: What the family is called in configurations.
        coupled: True where a tensor's direction is normalised over its whole parameter group, which needs a pre-pass.
        low_rank: True where matrices come as :class:`Factors`.
    """

    name: ClassVar[str]
    coupled: ClassVar[bool] = False
    low_rank: ClassVar[bool] = False

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


class Dense(Directions):
    """Directions with independent entries, drawn in blocks of rows that can be had one by one.

    On a CPU blocks are drawn in parallel. On a GPU :mod:`zo_lightning.optim.kernels` draws them where Triton is installed:
    other numbers than those of torch's generator.
    """

    kind: ClassVar[Kind]

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor:
        """See :meth:`Directions.draw`."""
        return self.rows(address, shape, 0, matrix_shape(shape)[0], device).view(shape)

    def rows(self, address: Address, shape: torch.Size, first: int, last: int, device: torch.device) -> Tensor:
        """Rows of the draw of a parameter seen as a matrix.

        Args:
            address: See :meth:`Directions.draw`.
            shape: Shape of the parameter.
            first: First row, a multiple of :func:`block_rows`.
            last: One more than the last row, another one, or the number of rows.
            device: Device of the parameter.

        Returns:
            Shape (last - first, columns), float32.
        """
        step, columns = block_rows(shape, device), matrix_shape(shape)[1]
        out = torch.empty(last - first, columns, dtype=torch.float32, device=device)
        starts = range(first, last, step)

        def fill(start: int) -> None:
            block = out[start - first : start - first + step]
            seed = self.block_seed(address, start // step)
            if in_kernels:
                kernels.fill(block, seed, self.kind)
            else:
                self._fill(block, torch.Generator(device).manual_seed(seed))

        in_kernels = kernels.available(device)
        in_parallel(fill, starts, device)
        return out

    def block_seed(self, address: Address, block: int) -> int:
        """The seed of block number ``block`` of :func:`block_rows` rows."""
        return stable_seed(address.seed, address.step, address.query, address.name, f"dense{block}")

    @abstractmethod
    def _fill(self, out: Tensor, source: torch.Generator) -> None:
        """Fill a block of rows."""


class Gaussian(Dense):
    """Independent standard normal entries (Nesterov and Spokoiny, 2017; MeZO)."""

    name = "gaussian"
    kind = "gaussian"

    def _fill(self, out: Tensor, source: torch.Generator) -> None:
        out.normal_(generator=source)


class Rademacher(Dense):
    """Independent entries ±1 with equal probability (SPSA; FZOO)."""

    name = "rademacher"
    kind = "rademacher"

    def _fill(self, out: Tensor, source: torch.Generator) -> None:
        out.random_(0, 2, generator=source).mul_(2.0).sub_(1.0)


class Sphere(Gaussian):
    """Uniform on the unit sphere of the parameter group: a Gaussian divided by the group's Euclidean norm.

    :meth:`draw` returns the Gaussian; whoever holds the whole group divides (``coupled`` says so).
    """

    name = "sphere"
    coupled = True


class LowRank(Directions):
    """Products ``U Vᵀ`` for matrices, Gaussian for vectors (LOZO, Chen et al. 2024; SubZero, Yu et al. 2024).

    U (m × r) has fresh standard normal entries at every step. V (n × r) has orthonormal columns and is held for ``interval``
    steps. Both are drawn on the CPU, so that the directions are the same on every device. A tensor of more than two
    dimensions is seen as the matrix of its first dimension by all others.

    Args:
        rank: r, clipped at the matrix's smaller side.
        interval: Number of steps ν for which V is held.

    Raises:
        ValueError: If ``rank`` or ``interval`` is less than 1.
    """

    name = "low_rank"
    low_rank = True

    def __init__(self, rank: int = 1, interval: int = 50) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        self.rank = rank
        self.interval = interval
        self._held: dict[tuple[int, str, int, int], tuple[int, Tensor]] = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        cpu = torch.device("cpu")
        if len(shape) < 2:
            return _normal(shape, _generator(address, "vector", cpu), cpu).to(device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        left = _normal(torch.Size((m, r)), _generator(address, "left", cpu), cpu)
        return Factors(left.to(device), self.right(address, n, r).to(device))

    def right(self, address: Address, n: int, r: int) -> Tensor:
        """The held factor V of shape (n, r), on the CPU: it depends on the step only through ``step // interval``."""
        window = address.step // self.interval
        key = (address.seed, address.name, n, r)
        cached = self._held.get(key)
        if cached is None or cached[0] != window:
            held = Address(address.seed, window, address.name)
            cpu = torch.device("cpu")
            gaussian = _normal(torch.Size((n, r)), _generator(held, "right", cpu), cpu)
            cached = self._held[key] = (window, torch.linalg.qr(gaussian).Q)
        return cached[1]

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        return f"{self.name}(rank={self.rank}, interval={self.interval})"


DIRECTIONS: dict[str, type[Directions]] = {family.name: family for family in (Gaussian, LowRank, Rademacher, Sphere)}
"""The families by name."""


def make_directions(directions: str | Directions, **settings: int) -> Directions:
    """Return the family called ``directions`` (an instance is returned as it is).

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(directions, Directions):
        return directions
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(sorted(DIRECTIONS))}, got {directions!r}")
    family = DIRECTIONS[directions]
    return family(**settings) if family is LowRank else family()


def block_rows(shape: torch.Size, device: torch.device) -> int:
    """How many rows of a parameter, seen as a matrix, are drawn from one generator."""
    entries = _BLOCK_CPU if device.type == "cpu" else _BLOCK
    return max(1, entries // max(1, matrix_shape(shape)[1]))


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix: its first dimension by all others; a scalar is 1 by 1."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _generator(address: Address, part: str, device: torch.device) -> torch.Generator:
    return generator(address.seed, address.step, address.query, address.name, part, device=device)


def _normal(shape: torch.Size, source: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float32, device=device)
