"""Norms of parameter groups and their linear minimisation oracles.

A group of tensors carries a norm ‖·‖; its oracle is ``lmo(g) = argmin_{‖s‖≤1} ⟨g, s⟩``, so that
``⟨g, lmo(g)⟩ = -‖g‖_*`` with the dual norm ‖·‖_* (Pethick et al., 2025, "Training Deep Learning Models with Norm-Constrained
LMOs"). Over several tensors the norm is the maximum of its members' norms and the dual norm their sum; ``euclidean`` is the
exception and treats the group as one long vector. The ``radius`` divides the norm: a step of unit norm is ``radius`` long.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors, matrix_shape

__all__ = ["GEOMETRIES", "Column", "Euclidean", "Geometry", "Row", "Sign", "Spectral", "make_geometry", "polar"]


@dataclass(frozen=True)
class Geometry(ABC):
    """A norm with its dual norm and its linear minimisation oracle.

    Subclasses define the three on one member; groups follow from that.

    Attributes:
        radius: Length of a step of unit norm; > 0.
        transposed: The weight is stored as (in, out), as ``nn.Embedding`` and transformers' ``Conv1D`` do.
        name: What the geometry is called in configurations.
        coupled: True where a member's oracle depends on the other members of its group, which needs a pre-pass.
        by_rows: True where the oracle of a row of a dense matrix does not depend on its other rows (but for the coupling).
    """

    radius: float = 1.0
    transposed: bool = False
    name: ClassVar[str]
    coupled: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius of the {self.name} geometry must be positive, got {self.radius}")

    # ---- groups --------------------------------------------------------------------------------------------------------
    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The group's norm: the largest of its members' norms, over ``radius``.

        Args:
            tensors: The members, each of its parameter's shape.

        Returns:
            A scalar tensor.
        """
        return torch.stack([self.member_norm(x) for x in tensors]).amax() / self.radius

    def dual_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm dual to :meth:`norm`: the sum of the members' dual norms, times ``radius``; a scalar tensor."""
        return torch.stack([self.member_dual_norm(g) for g in tensors]).sum() * self.radius

    def lmo(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The minimiser of ``⟨g, s⟩`` over the unit ball of :meth:`norm`.

        Where a member is zero every feasible point is a minimiser; zero is returned.
        """
        scale = self.coupling(torch.stack([_wide(g).square().sum() for g in tensors]).sum()) if self.coupled else None
        return [self._negative(self.extreme_point(g, scale)) for g in tensors]

    # ---- members -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def member_norm(self, x: Tensor) -> Tensor:
        """Norm of one member at radius 1."""

    @abstractmethod
    def member_dual_norm(self, g: Tensor) -> Tensor:
        """Dual norm of one member at radius 1."""

    @abstractmethod
    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """The point of the ball farthest along ``z``, which is ``-lmo(z)``: a unit-norm direction to probe along.

        Args:
            z: One member, dense or (where :meth:`accepts` says so) as factors.
            scale: For coupled geometries, :meth:`coupling` of the group's sum of squares.

        Returns:
            The same kind as ``z``, times ``radius``.
        """

    def extreme_point_(self, z: Tensor) -> Tensor:
        """:meth:`extreme_point` of a geometry that is not coupled, for a z whose memory may serve for the result."""
        point = self.extreme_point(z)
        assert isinstance(point, Tensor)
        return point

    def coupling(self, sum_of_squares: Tensor) -> Tensor:
        """What a coupled oracle needs to know of its group: one over its Euclidean norm (zero for a zero group)."""
        return torch.where(sum_of_squares > 0, sum_of_squares.rsqrt(), torch.zeros_like(sum_of_squares))

    def accepts(self, directions: Directions, shape: torch.Size) -> str | None:
        """Return None if a matrix of ``shape`` can be probed along ``directions`` in this geometry, else the reason."""
        return None

    @staticmethod
    def _negative(point: Tensor | Factors) -> Tensor:
        return -(point.dense() if isinstance(point, Factors) else point)

    def aspect(self, shape: torch.Size) -> float:
        """√(m/n) with m = out and n = in of the weight seen as a matrix (1 for vectors)."""
        if len(shape) < 2:
            return 1.0
        rows, columns = matrix_shape(shape)
        return (columns / rows) ** 0.5 if self.transposed else (rows / columns) ** 0.5


class Euclidean(Geometry):
    """‖·‖₂ over the whole group, its own dual; ``lmo(g) = -g/‖g‖₂``."""

    name = "euclidean"
    coupled = True
    by_rows = True

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """See :meth:`Geometry.norm`."""
        return torch.stack([_wide(x).square().sum() for x in tensors]).sum().sqrt() / self.radius

    def dual_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """See :meth:`Geometry.dual_norm`."""
        return torch.stack([_wide(g).square().sum() for g in tensors]).sum().sqrt() * self.radius

    def member_norm(self, x: Tensor) -> Tensor:
        """See :meth:`Geometry.member_norm`."""
        return _wide(x).norm()

    def member_dual_norm(self, g: Tensor) -> Tensor:
        """See :meth:`Geometry.member_dual_norm`."""
        return _wide(g).norm()

    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """See :meth:`Geometry.extreme_point`."""
        if scale is None:
            raise ValueError("the euclidean geometry needs the norm of the whole group")
        factor = scale * self.radius
        return z.scaled(factor) if isinstance(z, Factors) else z * factor


class Sign(Geometry):
    """‖·‖∞ with dual ‖·‖₁; ``lmo(g) = -sign(g)``."""

    name = "sign"
    by_rows = True

    def member_norm(self, x: Tensor) -> Tensor:
        """See :meth:`Geometry.member_norm`."""
        return _wide(x).abs().amax()

    def member_dual_norm(self, g: Tensor) -> Tensor:
        """See :meth:`Geometry.member_dual_norm`."""
        return _wide(g).abs().sum()

    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """See :meth:`Geometry.extreme_point`."""
        if isinstance(z, Factors):  # rank one only: sign(u vᵀ) = sign(u) sign(v)ᵀ
            return Factors(z.left.sign() * self.radius, z.right.sign())
        return z.sign() if self.radius == 1 else z.sign() * self.radius

    def extreme_point_(self, z: Tensor) -> Tensor:
        """See :meth:`Geometry.extreme_point_`."""
        return z.sign_() if self.radius == 1 else z.sign_().mul_(self.radius)

    def accepts(self, directions: Directions, shape: torch.Size) -> str | None:
        """See :meth:`Geometry.accepts`."""
        if directions.low_rank and len(shape) > 1 and getattr(directions, "rank", 1) > 1:
            return "the sign of a product U Vᵀ of rank above 1 is not low-rank; use rank 1 or the spectral geometry"
        return None


class Spectral(Geometry):
    """√(n/m)·σ_max of an m × n matrix, dual √(m/n)·‖g‖_nuclear; ``lmo(g) = -√(m/n)·polar(g)``.

    A vector counts as a matrix of one column without the aspect factor, where all three are the Euclidean ones.
    """

    name = "spectral"

    def member_norm(self, x: Tensor) -> Tensor:
        """See :meth:`Geometry.member_norm`."""
        return torch.linalg.matrix_norm(_matrix(x), 2) / self.aspect(x.shape)

    def member_dual_norm(self, g: Tensor) -> Tensor:
        """See :meth:`Geometry.member_dual_norm`."""
        return torch.linalg.matrix_norm(_matrix(g), "nuc") * self.aspect(g.shape)

    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """See :meth:`Geometry.extreme_point`; for factors, ``polar(U Vᵀ) = polar(U) Vᵀ`` as the held V is orthonormal."""
        if isinstance(z, Factors):
            shape = torch.Size((z.left.shape[0], z.right.shape[0]))
            return z.with_fresh(polar_thin(z.fresh) * (self.aspect(shape) * self.radius))
        return (polar(_matrix(z)) * (self.aspect(z.shape) * self.radius)).reshape(z.shape)


class Row(Geometry):
    """Largest root-mean-square of a row, max_i ‖w_i‖₂/√n; dual √n·Σ_i ‖g_i‖₂; the oracle has rows -√n·g_i/‖g_i‖₂.

    Rows are those of the weight as it is stored: outputs of a Linear, tokens of an Embedding.
    """

    name = "row"
    by_rows = True

    def member_norm(self, x: Tensor) -> Tensor:
        """See :meth:`Geometry.member_norm`."""
        w = self._rows(x)
        return w.norm(dim=1).amax() / w.shape[1] ** 0.5

    def member_dual_norm(self, g: Tensor) -> Tensor:
        """See :meth:`Geometry.member_dual_norm`."""
        w = self._rows(g)
        return w.norm(dim=1).sum() * w.shape[1] ** 0.5

    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """See :meth:`Geometry.extreme_point`; for factors ‖row i of U Vᵀ‖ = ‖row i of U‖ because V is orthonormal."""
        if isinstance(z, Factors):
            return Factors(_unit_rows(z.left) * (z.right.shape[0] ** 0.5 * self.radius), z.right)
        w = self._rows(z)
        unit = _unit_rows(w) * (w.shape[1] ** 0.5 * self.radius)
        return self._back(unit, z.shape)

    def _rows(self, x: Tensor) -> Tensor:
        return _matrix(x)

    def _back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.reshape(shape)


class Column(Row):
    """As :class:`Row`, on the columns."""

    name = "column"
    by_rows = False

    def extreme_point(self, z: Tensor | Factors, scale: Tensor | None = None) -> Tensor | Factors:
        """See :meth:`Geometry.extreme_point`."""
        if isinstance(z, Factors):
            raise ValueError("the column geometry does not keep a held V")
        return super().extreme_point(z, scale)

    def accepts(self, directions: Directions, shape: torch.Size) -> str | None:
        """See :meth:`Geometry.accepts`."""
        if directions.low_rank and len(shape) > 1:
            return "normalising the columns of U Vᵀ does not keep the held V; use row, or dense directions"
        return None

    def _rows(self, x: Tensor) -> Tensor:
        return _matrix(x).T

    def _back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.T.reshape(shape)


GEOMETRIES: dict[str, type[Geometry]] = {g.name: g for g in (Column, Euclidean, Row, Sign, Spectral)}
"""The geometries by name."""


def make_geometry(name: str, radius: float = 1.0, transposed: bool = False) -> Geometry:
    """Return the geometry called ``name``.

    Raises:
        ValueError: If the name is unknown or the radius is not positive.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(sorted(GEOMETRIES))}, got {name!r}")
    return GEOMETRIES[name](radius=radius, transposed=transposed)


def polar(g: Tensor) -> Tensor:
    """The polar factor ``U Vᵀ`` of ``g = U Σ Vᵀ`` (singular vectors of zero singular values left out).

    Args:
        g: Shape (m, n), of any floating dtype; worked on in float32 or wider.

    Returns:
        Same shape; zero for a zero matrix.
    """
    g = _wide(g)
    if min(g.shape) == 1:  # a vector: no decomposition needed
        norm = g.norm()
        return torch.where(norm > 0, g / norm, torch.zeros_like(g))
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    kept = (S[0] * max(g.shape) * torch.finfo(S.dtype).eps < S).to(S.dtype)
    return (U * kept) @ Vh


def polar_thin(g: Tensor) -> Tensor:
    """The polar factor of a matrix of few columns by work on r × r: ``g (gᵀ g)^(-1/2)``.

    The Gram matrix is float64, in which squaring the singular values loses nothing of a float32 matrix.

    Args:
        g: Shape (m, r).

    Returns:
        As :func:`polar`.
    """
    if min(g.shape) == 1 or g.shape[0] < g.shape[1]:
        return polar(g)
    wide = g.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    smallest = values[-1] * (max(g.shape) * torch.finfo(torch.float32).eps) ** 2
    inverse = torch.where(values > smallest, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return (wide @ (vectors * inverse) @ vectors.T).to(_wide(g).dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _matrix(x: Tensor) -> Tensor:
    x = _wide(x)
    return x.reshape(matrix_shape(x.shape)) if x.dim() > 1 else x.reshape(-1, 1)


def _unit_rows(w: Tensor) -> Tensor:
    norms = w.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, w / norms, torch.zeros_like(w))
