"""Sparse directions: only some of the entries, or of the tensors, are moved at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from zo_lightning.optim.directions.base import Address, Directions, matrix_shape, source_of
from zo_lightning.optim.directions.dense import Gaussian, Rademacher
from zo_lightning.optim.randomness import stable_seed

__all__ = ["Block", "Tensors"]


class Block(Directions):
    """A block of random rows × random columns of every matrix, and random entries of every vector, moved by ±1 (JAGUAR, 2025).

    The publication moves one coordinate at a time; its code, and this family, a block in every tensor at once. With
    ``signs="ones"`` all entries of the block move together, as in that code, so that only the sum of the gradient over the
    block is estimated; ``"random"`` ones estimate each entry.

    Args:
        fraction: Share of the rows and of the columns that a block has (of the entries of a vector); at least one each.
        signs: ``"random"`` or ``"ones"``.

    Raises:
        ValueError: If ``fraction`` is not in (0, 1], or ``signs`` is neither.
    """

    name = "block"
    sparse = True

    def __init__(self, fraction: float = 0.1, signs: Literal["random", "ones"] = "random") -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        if signs not in ("random", "ones"):
            raise ValueError(f"signs must be 'random' or 'ones', got {signs!r}")
        self.fraction = fraction
        self.signs = signs
        self._shares = [fraction**2]
        self._sizes = [1]
        self._step: tuple[int, int] | None = None
        self._blocks: dict[Any, tuple[Tensor, ...]] = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor:
        """See :meth:`Directions.draw`."""
        z = torch.zeros(matrix_shape(shape), dtype=torch.float32, device=device)
        if self._step != (address.seed, address.step):
            self._step, self._blocks = (address.seed, address.step), {}
        # a probe, its other side and the update want the same block; of what it holds, a block is but a small part
        key = (address.name, address.query, shape, device)
        if key not in self._blocks:
            self._blocks[key] = tuple(part.to(device) for part in self._block(address, *z.shape))
        rows, columns, signs = self._blocks[key]
        z[rows[:, None], columns] = signs
        return z.view(shape)

    def _block(self, address: Address, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """The block's rows and columns, and its entries."""
        source = source_of(address, "block", torch.device("cpu"))
        chosen = [self._some(size, source) for size in (rows, columns)]
        signs = torch.ones(len(chosen[0]), len(chosen[1]), dtype=torch.float32, device="cpu")
        if self.signs == "random":
            signs.random_(0, 2, generator=source).mul_(2).sub_(1)
        return chosen[0], chosen[1], signs

    def _some(self, size: int, source: torch.Generator) -> Tensor:
        """Some of ``size`` indices; a dimension of one has one."""
        return torch.randperm(size, generator=source, device="cpu")[: self._count(size)]

    def _count(self, size: int) -> int:
        return max(1, int(size * self.fraction))

    def prepare(self, shapes: Mapping[str, torch.Size]) -> None:
        """See :meth:`Directions.prepare`."""
        sizes = [matrix_shape(shape) for shape in shapes.values()]
        self._sizes = [rows * columns for rows, columns in sizes]
        self._shares = [self._count(rows) * self._count(columns) / (rows * columns) for rows, columns in sizes]

    @property
    def density(self) -> float:
        """See :meth:`Directions.density`."""
        return sum(share * size for share, size in zip(self._shares, self._sizes, strict=True)) / sum(self._sizes)

    @property
    def densest(self) -> float:
        """See :meth:`Directions.densest`; a vector's."""
        return max(self._shares)

    def whole(self) -> Directions:
        """See :meth:`Directions.whole`."""
        return Rademacher()

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        return f"{self.name}(fraction={self.fraction}, signs={self.signs})"


class Tensors(Directions):
    """Gaussian directions of some whole tensors, chosen anew for each direction (Sparse JAGUAR and LDSD-JAGUAR, 2026).

    Args:
        fraction: Share of the tensors that move; at least one.

    Raises:
        ValueError: If ``fraction`` is not in (0, 1].
    """

    name = "tensors"
    sparse = True

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        self.fraction = fraction
        self._names: tuple[str, ...] = ()
        self._gaussian = Gaussian()
        self._chosen: dict[tuple[int, int, int], frozenset[str]] = {}

    def prepare(self, shapes: Mapping[str, torch.Size]) -> None:
        """See :meth:`Directions.prepare`."""
        self._names = tuple(shapes)
        self._chosen = {}

    def moves(self, address: Address) -> bool:
        """See :meth:`Directions.moves`: those of the smallest hash, whatever the order of the names."""
        if not self._names:  # nothing to choose among
            return True
        key = (address.seed, address.step, address.query)
        if key not in self._chosen:
            if any(step != address.step for _, step, _ in self._chosen):
                self._chosen = {}
            count = max(1, int(len(self._names) * self.fraction))
            by_hash = sorted(self._names, key=lambda name: (stable_seed(*key, name, "tensors"), name))
            self._chosen[key] = frozenset(by_hash[:count])
        return address.name in self._chosen[key]

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor:
        """See :meth:`Directions.draw`."""
        if not self.moves(address):
            return torch.zeros(shape, dtype=torch.float32, device=device)
        return self._gaussian.draw(address, shape, device)

    @property
    def density(self) -> float:
        """See :meth:`Directions.density`."""
        return self.fraction

    def whole(self) -> Directions:
        """See :meth:`Directions.whole`."""
        return self._gaussian

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        return f"{self.name}(fraction={self.fraction})"
