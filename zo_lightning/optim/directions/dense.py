"""Dense directions: every entry of a parameter is moved."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from zo_lightning.optim import kernels
from zo_lightning.optim.directions.base import Address, Directions, block_rows, matrix_shape
from zo_lightning.optim.kernels import Kind
from zo_lightning.optim.randomness import in_parallel, stable_seed

__all__ = ["Dense", "Gaussian", "Rademacher", "Sphere"]


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
