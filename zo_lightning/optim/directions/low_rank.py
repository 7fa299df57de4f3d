"""Low-rank directions: a matrix is moved by a product of two thin factors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from zo_lightning.optim.directions.base import Address, Directions, Factors, matrix_shape, normal, source_of

__all__ = ["LowRank", "SubZeroDirections", "Subspace"]

Held = dict[tuple[int, str, int, int], tuple[int, Tensor]]
"""By seed, name and shape: the interval, and the factor that is held in it."""

_CPU = torch.device("cpu")


class LowRank(Directions):
    """Products ``U Vᵀ`` for matrices, Gaussian for vectors (LOZO, Chen et al. 2024; SubZero, Yu et al. 2024).

    U (m × r) has fresh standard normal entries at every step. V (n × r) is held for ``interval`` steps. Both are drawn on the
    CPU, so that the directions are the same on every device. A tensor of more than two dimensions is seen as the matrix of
    its first dimension by all others.

    Args:
        rank: r, clipped at the matrix's smaller side.
        interval: Number of steps ν for which V is held.
        right: Whether V has ``"orthonormal"`` columns, or ``"gaussian"`` entries as in LOZO, which makes U Vᵀ about √n longer.

    Raises:
        ValueError: If ``rank`` or ``interval`` is less than 1.
    """

    name = "low_rank"
    low_rank = True

    def __init__(self, rank: int = 1, interval: int = 50, right: Literal["orthonormal", "gaussian"] = "orthonormal") -> None:
        _check(rank, interval)
        if right not in ("orthonormal", "gaussian"):
            raise ValueError(f"right must be 'orthonormal' or 'gaussian', got {right!r}")
        self.rank = rank
        self.interval = interval
        self.kind = right
        self._held: Held = {}
        self._lefts: Held = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        if len(shape) < 2:
            return normal(shape, source_of(address, "vector", _CPU), _CPU).to(device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        left = normal(torch.Size((m, r)), source_of(address, "left", _CPU), _CPU)
        return Factors(left.to(device), self.right(address, n, r).to(device))

    def right(self, address: Address, n: int, r: int) -> Tensor:
        """The held factor V of shape (n, r), on the CPU: it depends on the step only through ``step // interval``."""
        return _held_factor(self._held, address, "right", n, r, self.interval, orthonormal=self.kind == "orthonormal")

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        kind = "" if self.kind == "orthonormal" else f", right={self.kind}"
        return f"{self.name}(rank={self.rank}, interval={self.interval}{kind})"


class SubZeroDirections(LowRank):
    """``√(mn)/r · U Z Vᵀ`` with orthonormal U and V held for ``interval`` steps, a fresh Gaussian Z (SubZero, Yu et al., 2024).

    Entries have a root mean square of one, as those of dense Gaussian directions, but only r² numbers are fresh at each step.

    Args:
        rank: r, clipped at the matrix's smaller side.
        interval: Number of steps T₀ for which U and V are held.
    """

    name = "subzero"

    def __init__(self, rank: int = 48, interval: int = 1000) -> None:
        super().__init__(rank, interval)

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        if len(shape) < 2:
            return super().draw(address, shape, device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        core = normal(torch.Size((r, r)), source_of(address, "core", _CPU), _CPU)
        left = _held_factor(self._lefts, address, "held left", m, r, self.interval) @ core * (math.sqrt(m * n) / r)
        return Factors(left.to(device), self.right(address, n, r).to(device))


class Subspace(Directions):
    """``P u`` with a held orthonormal P (m × r) and a fresh standard normal u (r × n); Gaussian for vectors (ZO-Muon, 2026).

    The mirror image of :class:`LowRank`: the held factor is on the side of the outputs, so that the matrices are formed in the
    forward. ``low_rank`` with the same rank is the faster choice.

    Args:
        rank: r, clipped at the matrix's smaller side.
        interval: Number of steps ν for which P is held.

    Raises:
        ValueError: If ``rank`` or ``interval`` is less than 1.
    """

    name = "subspace"
    factored = True

    def __init__(self, rank: int = 64, interval: int = 100) -> None:
        _check(rank, interval)
        self.rank = rank
        self.interval = interval
        self._held: Held = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        if len(shape) < 2:
            return normal(shape, source_of(address, "vector", _CPU), _CPU).to(device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        basis = _held_factor(self._held, address, "held left", m, r, self.interval)
        fresh = normal(torch.Size((n, r)), source_of(address, "right", _CPU), _CPU)
        return Factors(basis.to(device), fresh.to(device), "left")

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        return f"{self.name}(rank={self.rank}, interval={self.interval})"


def _held_factor(
    held: Held, address: Address, part: str, rows: int, r: int, interval: int, *, orthonormal: bool = True
) -> Tensor:
    """A factor of shape (rows, r) on the CPU, the same for all steps and queries of an interval."""
    window, key = address.step // interval, (address.seed, address.name, rows, r)
    cached = held.get(key)
    if cached is None or cached[0] != window:
        source = source_of(Address(address.seed, window, address.name), part, _CPU)
        gaussian = normal(torch.Size((rows, r)), source, _CPU)
        cached = held[key] = (window, torch.linalg.qr(gaussian).Q if orthonormal else gaussian)
    return cached[1]


def _check(rank: int, interval: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if interval < 1:
        raise ValueError(f"interval must be at least 1 step, got {interval}")
