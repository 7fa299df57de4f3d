"""Families of random directions, each a pure function of (seed, step, parameter name, shape).

A direction is drawn tensor by tensor in float32, never for the whole model at once, and drawn again where it is needed:
for the probe at ``+τ``, for the probe at ``-τ`` and for the update.
"""

from __future__ import annotations

from zo_lightning.optim.directions.base import Address, Directions, Factors, block_rows, matrix_shape
from zo_lightning.optim.directions.dense import Dense, Gaussian, Rademacher, Sphere
from zo_lightning.optim.directions.low_rank import LowRank, Subspace, SubZeroDirections
from zo_lightning.optim.directions.sparse import Block, Tensors

__all__ = [
    "DIRECTIONS",
    "Address",
    "Block",
    "Dense",
    "Directions",
    "Factors",
    "Gaussian",
    "LowRank",
    "Rademacher",
    "Sphere",
    "SubZeroDirections",
    "Subspace",
    "Tensors",
    "block_rows",
    "make_directions",
    "matrix_shape",
]

DIRECTIONS: dict[str, type[Directions]] = {
    family.name: family for family in (Block, Gaussian, LowRank, Rademacher, Sphere, SubZeroDirections, Subspace, Tensors)
}
"""The families by name."""


def make_directions(directions: str | Directions, rank: int = 1, interval: int = 50) -> Directions:
    """Return the family called ``directions`` (an instance is returned as it is).

    Args:
        directions: A name of :data:`DIRECTIONS`.
        rank: Of families that have one.
        interval: Of families that hold a factor.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(directions, Directions):
        return directions
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(sorted(DIRECTIONS))}, got {directions!r}")
    family = DIRECTIONS[directions]
    if issubclass(family, (LowRank, Subspace)):
        return family(rank, interval)
    return family()
