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
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        if right not in ("orthonormal", "gaussian"):
            raise ValueError(f"right must be 'orthonormal' or 'gaussian', got {right!r}")
        self.rank = rank
        self.interval = interval
        self.kind = right
        self._held: Held = {}
        self._lefts: Held = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        cpu = torch.device("cpu")
        if len(shape) < 2:
            return normal(shape, source_of(address, "vector", cpu), cpu).to(device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        left = normal(torch.Size((m, r)), source_of(address, "left", cpu), cpu)
        return Factors(left.to(device), self.right(address, n, r).to(device))

    def right(self, address: Address, n: int, r: int) -> Tensor:
        """The held factor V of shape (n, r), on the CPU: it depends on the step only through ``step // interval``."""
        window = address.step // self.interval
        key = (address.seed, address.name, n, r)
        cached = self._held.get(key)
        if cached is None or cached[0] != window:
            held = Address(address.seed, window, address.name)
            cpu = torch.device("cpu")
            gaussian = normal(torch.Size((n, r)), source_of(held, "right", cpu), cpu)
            cached = self._held[key] = (window, gaussian if self.kind == "gaussian" else torch.linalg.qr(gaussian).Q)
        return cached[1]

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
        r, cpu = min(self.rank, m, n), torch.device("cpu")
        core = normal(torch.Size((r, r)), source_of(address, "core", cpu), cpu)
        left = held_basis(self._lefts, address, "left", m, r, self.interval) @ core * (math.sqrt(m * n) / r)
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
        LowRank(rank, interval)  # checks them
        self.rank = rank
        self.interval = interval
        self._held: Held = {}

    def draw(self, address: Address, shape: torch.Size, device: torch.device) -> Tensor | Factors:
        """See :meth:`Directions.draw`."""
        cpu = torch.device("cpu")
        if len(shape) < 2:
            return normal(shape, source_of(address, "vector", cpu), cpu).to(device)
        m, n = matrix_shape(shape)
        r = min(self.rank, m, n)
        basis = held_basis(self._held, address, "left", m, r, self.interval)
        fresh = normal(torch.Size((n, r)), source_of(address, "right", cpu), cpu)
        return Factors(basis.to(device), fresh.to(device), "left")

    def signature(self) -> str:
        """See :meth:`Directions.signature`."""
        return f"{self.name}(rank={self.rank}, interval={self.interval})"


def held_basis(held: Held, address: Address, part: str, m: int, r: int, interval: int) -> Tensor:
    """An orthonormal basis of shape (m, r) on the CPU, the same for all steps and queries of an interval."""
    window, key = address.step // interval, (address.seed, address.name, m, r)
    cached = held.get(key)
    if cached is None or cached[0] != window:
        source = source_of(Address(address.seed, window, address.name), f"held {part}", torch.device("cpu"))
        gaussian = normal(torch.Size((m, r)), source, torch.device("cpu"))
        cached = held[key] = (window, torch.linalg.qr(gaussian).Q)
    return cached[1]
