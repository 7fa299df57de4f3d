"""Steps along an orthogonalised estimate of each matrix."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from zo_lightning.optim.directions import Directions, Factors, matrix_shape
from zo_lightning.optim.geometry import Geometry
from zo_lightning.optim.updates.sgd import SGD

__all__ = ["Muon", "newton_schulz"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
_LONG = 4  # times as long as wide
_PIECE = 1 << 20  # entries that are float64 at a time
_EIGEN = 128  # from here a CPU's eigendecomposition of a Gram matrix costs less than products, half to a third at 256


class Muon(SGD):
    """``X ← X - η NS(estimate)`` for matrices: all singular values about one (Muon, Jordan et al., 2024).

    Probes go along z itself. Over sparse directions with momentum JAGUAR Muon (2025), over a subspace with several one-sided
    probes ZO-Muon (2026).

    Args:
        iterations: Newton-Schulz iterations.
        vectors: ``"sign"`` moves vectors by the sign of their estimate, ``"sgd"`` along it.
        vector_rate: The learning rate of vectors over that of matrices. ZO-Muon's code has 1e-7 beside 1e-2.
        unit_entries: Multiply matrices by √max(m, n), so that their entries have a root mean square of about one, as a step of
            :class:`Sign` has: by that a step rule can drive the steps.

    Raises:
        ValueError: If an argument is out of its range.
    """

    name = "muon"
    along = False

    def __init__(
        self,
        iterations: int = 5,
        vectors: Literal["sign", "sgd"] = "sign",
        vector_rate: float = 1.0,
        unit_entries: bool = False,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if vectors not in ("sign", "sgd"):
            raise ValueError(f"vectors must be 'sign' or 'sgd', got {vectors!r}")
        if not vector_rate >= 0:
            raise ValueError(f"vector_rate must be >= 0, got {vector_rate}")
        self.iterations = iterations
        self.vectors = vectors
        self.vector_rate = vector_rate
        self.unit_entries = unit_entries
        self.normalised = unit_entries

    def step(
        self, estimate: Tensor | Factors, geometry: Geometry, scale: Tensor | None, state: dict[str, Any]
    ) -> Tensor | Factors:
        """See :meth:`Update.step`; for factors with an orthonormal held one, ``NS(P u) = P NS(u)``."""
        if isinstance(estimate, Factors):
            size = math.sqrt(max(len(estimate.left), len(estimate.right))) if self.unit_entries else 1.0
            return estimate.with_fresh(newton_schulz(estimate.fresh, self.iterations).mul_(-size))
        if estimate.dim() < 2:
            return -(estimate.sign() if self.vectors == "sign" else estimate) * self.vector_rate
        shape = matrix_shape(estimate.shape)
        size = math.sqrt(max(shape)) if self.unit_entries else 1.0
        return newton_schulz(estimate.reshape(shape), self.iterations).mul_(-size).reshape(estimate.shape)

    def check(self, directions: Directions, count: int) -> None:
        """See :meth:`Update.check`."""
        super().check(directions, count)
        if directions.low_rank and getattr(directions, "kind", "") == "gaussian":
            raise ValueError("the update rule 'muon' needs a held factor with orthonormal columns; use right='orthonormal'")


def newton_schulz(g: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of ``g`` to about one: ``X ← a X + (b A + c A²) X`` with ``A = X Xᵀ``, from ``g/‖g‖_F``.

    In float32 or wider whatever the weights' dtype: in half precision the norm of a large estimate overflows and the step
    silently becomes zero.

    Args:
        g: Shape (m, n).
        iterations: Quintic iterations.

    Returns:
        Same shape; zero for a zero matrix.
    """
    a, b, c = _QUINTIC
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    peak = wide.abs().amax()  # the square of a huge entry would overflow
    start = wide / torch.where(peak > 0, peak, torch.ones_like(peak))
    start /= start.norm() + 1e-7
    tall = start.shape[0] > start.shape[1]
    x = start.T if tall else start
    if x.shape[1] < _LONG * x.shape[0]:
        for _ in range(iterations):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x
    # Of a long matrix, all iterations are polynomials of its small Gram matrix, applied to it at the end. In float64: else
    # rounding makes eigenvalues near zero negative, and iterations make these large.
    gram = torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for piece in x.split(max(1, _PIECE // x.shape[0]), dim=1):
        double = piece.double()
        gram.addmm_(double, double.T)
    total = _product_of_factors(gram, iterations).to(x.dtype)
    return start @ total.T if tall else total @ start


def _product_of_factors(gram: Tensor, iterations: int) -> Tensor:
    """What all iterations together multiply a matrix by: the product of their ``a + b A + c A²``.

    Args:
        gram: A at the first iteration, float64.
        iterations: Quintic iterations.
    """
    a, b, c = _QUINTIC
    if gram.device.type == "cpu" and len(gram) >= _EIGEN and gram.isfinite().all():
        values, vectors = torch.linalg.eigh(gram)
        product = torch.ones_like(values)
        for _ in range(iterations):
            factors = a + b * values + c * values.square()
            product *= factors
            values = values * factors.square()
        return (vectors * product) @ vectors.T
    total = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for left in reversed(range(iterations)):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        total = factor @ total
        if left:
            gram = factor @ gram @ factor
    return total
